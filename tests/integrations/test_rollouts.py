"""Repeats on batches that TRL generates: GRPO and RLOO."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from abr_trainer import ABRConfig, ABRMixin
from abr_trainer.data.demo import DEMO_MODEL
from abr_trainer.integrations.trl import ABRGRPOConfig, ABRGRPOTrainer, ABRRLOOConfig, ABRRLOOTrainer
from abr_trainer.records.files import read_lines
from abr_trainer.report.of_run import report_on_run
from abr_trainer.report.page import render_page
from abr_trainer.report.why import explain_batch
from abr_trainer.schedulers import ConstantScheduler, FollowScheduler, KLScheduler, RepeatScheduler
from tests.conftest import Scripted, log_without_times, tiny_llama, weights

pytestmark = pytest.mark.slow

OPTIONS = {
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 8,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "max_steps": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "beta": 0.0,
    "seed": 3,
}
PROMPTS = Dataset.from_list([{"prompt": text} for text in ("The fox", "A bear", "She said", "It was")] * 6)
THEIRS = {"GRPO": (GRPOTrainer, GRPOConfig), "RLOO": (RLOOTrainer, RLOOConfig)}
OURS = {"GRPO": (ABRGRPOTrainer, ABRGRPOConfig), "RLOO": (ABRRLOOTrainer, ABRRLOOConfig)}


def even_tokens(completion_ids, **kwargs):
    """Reward tokens with even numbers."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def same_for_all(completion_ids, **kwargs):
    return [1.0] * len(completion_ids)


@pytest.fixture
def train(tmp_path):
    def train(kind, classes, rule=None, reward=even_tokens, resume=None, name="run", model=None, **options):
        trainer_cls, config_cls = classes[kind]
        config = config_cls(output_dir=str(tmp_path / name), **{**OPTIONS, **options})
        if model is None:
            model = tiny_llama(vocab_size=2048)
        if config.beta:  # the reference is the model without its adapter
            model = get_peft_model(
                model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
            )
        extra = {} if rule is None else {"repeat_scheduler": rule}
        trainer = trainer_cls(
            model=model,
            args=config,
            reward_funcs=reward,
            train_dataset=PROMPTS,
            processing_class=AutoTokenizer.from_pretrained(DEMO_MODEL),
            **extra,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return train


def metrics(trainer):
    """The log, without times and without what we add."""
    ours = ("repeats", "skipped", "passes", "updates", "policy_kl", "step_time", "total_flos")
    logs = [
        {k: v for k, v in logs.items() if not k.startswith(("train_", *ours))} for logs in log_without_times(trainer)
    ]
    return [logs for logs in logs if "loss" in logs]


SHAPES = {
    "one micro-batch": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "slices": {"steps_per_generation": 4, "max_steps": 8},
    "LoRA, a reference": {"beta": 0.1},
    "rows as one": {"importance_sampling_level": "sequence"},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_one_repeat_is_trl_to_the_last_bit(train, kind, shape):
    if kind == "RLOO" and "importance_sampling_level" in SHAPES[shape]:
        pytest.skip("RLOO has no such option")
    theirs = train(kind, THEIRS, **SHAPES[shape])
    ours = train(kind, OURS, repeat_scheduler="baseline", **SHAPES[shape])
    assert torch.equal(weights(ours.model), weights(theirs.model))
    assert metrics(ours) == metrics(theirs)
    assert ours.state.log_history[0]["grad_norm"] > 0


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_repeats_are_num_iterations_of_trl(train, kind, accumulation):
    options = {"gradient_accumulation_steps": accumulation, "learning_rate": 1e-3}
    theirs = train(kind, THEIRS, num_iterations=3, **{**options, "max_steps": 12})
    ours = train(kind, OURS, rule=ConstantScheduler(3), skip_outliers="none", repeat_scheduler="baseline", **options)
    moved = (weights(theirs.model) - weights(tiny_llama(vocab_size=2048))).abs().max()
    assert moved > 5e-3
    torch.testing.assert_close(weights(ours.model), weights(theirs.model), rtol=1e-4, atol=1e-6)
    rewards = [logs["reward"] for logs in metrics(theirs) if "reward" in logs]
    assert [logs["reward"] for logs in metrics(ours)] == rewards, "the same rows were generated"
    assert (len(rewards), ours.ledger.updates, ours.ledger.passes) == (4, 12, 12)


def test_slices_of_a_generation_are_repeated_one_after_the_other(train):
    """TRL would make an update on each of the slices, and then come back to the first."""
    ours = train("GRPO", OURS, rule=Scripted(2), steps_per_generation=2, repeat_scheduler="baseline")
    assert (ours.ledger.batches, ours.ledger.updates) == (4, 8)
    drifts = [outcome.drifts for outcome in ours.repeat_scheduler.outcomes]
    assert [drift[0].kl > 0 for drift in drifts] == [False, True, False, True], "the second slice is off policy"


def test_metrics_and_counts_are_those_of_first_passes(train):
    once = train("GRPO", OURS, repeat_scheduler="baseline", max_steps=1)
    often = train("GRPO", OURS, rule=Scripted(3), repeat_scheduler="baseline", max_steps=1)
    assert metrics(often)[0] | {"grad_norm": 0} == metrics(once)[0] | {"grad_norm": 0}
    assert often._step == once._step == 1
    assert often.ledger.tokens == 3 * once.ledger.tokens > 0
    assert often.ledger.passes == 3, "generating is not counted in passes"
    assert 0 < often.ledger.generating_seconds < often.ledger.seconds


def test_the_divergence_is_that_of_a_loop_by_hand(train, tmp_path):
    trainer = train("GRPO", OURS, rule=Scripted(3), repeat_scheduler="baseline", max_steps=1)
    first, second, third = trainer.repeat_scheduler.outcomes[0].drifts
    assert (first.kl, first.clip_fraction, first.ess) == (0, 0, 1)
    assert 0 < second.kl < third.kl
    assert 0 < third.ess < second.ess < 1
    # The same updates by hand, from the same rows.
    made = trainer._buffered_inputs[0]
    model = tiny_llama(vocab_size=2048).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    ids = torch.cat([made["prompt_ids"], made["completion_ids"]], 1)
    there = torch.cat([made["prompt_mask"], made["completion_mask"]], 1)
    length = made["completion_ids"].shape[1]
    old, kls, clips = None, [], []
    for _ in range(3):
        logits = model(input_ids=ids, attention_mask=there).logits[:, -length - 1 : -1]
        now = logits.log_softmax(-1).gather(2, made["completion_ids"][..., None])[..., 0]
        old = now.detach() if old is None else old
        ratio = (now - old).exp()
        gains = made["advantages"][:, None]
        kls.append((ratio - 1 - (now - old)).mean().item())
        is_clipped = ((ratio > 1.2) & (gains > 0)) | ((ratio < 0.8) & (gains < 0))
        clips.append(is_clipped.float().mean().item())
        loss = -torch.min(ratio * gains, ratio.clamp(0.8, 1.2) * gains).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert [drift.kl for drift in (first, second, third)] == pytest.approx(kls, rel=1e-3, abs=1e-7)
    assert [drift.clip_fraction for drift in (first, second, third)] == pytest.approx(clips, abs=1e-6)
    line = next(iter(read_lines(tmp_path / "run" / "abr_trace.jsonl")))
    assert [drift["kl"] for drift in line["policy"]] == [first.kl, second.kl, third.kl]


def test_repeats_end_where_the_policy_has_moved_too_far(train, tmp_path):
    rule = KLScheduler(max_repeats=6, kl_limit=1e-3)
    trainer = train("GRPO", OURS, rule=rule, repeat_scheduler="baseline", learning_rate=3e-3)
    lines = list(read_lines(tmp_path / "run" / "abr_trace.jsonl"))
    for line in lines:
        kls = [drift["kl"] for drift in line["policy"]]
        assert all(kl <= 1e-3 for kl in kls[:-1])
        assert kls[-1] > 1e-3 or line["repeats"] == 6
        assert line["repeats"] == (len(kls) - 1 if line["reason"] == "off policy" else len(kls))
    assert any(1 < line["repeats"] < 6 for line in lines)
    logged = [logs["policy_kl"] for logs in trainer.state.log_history if "policy_kl" in logs]
    assert logged == [line["policy"][-1]["kl"] for line in lines]
    assert trainer.ledger.updates == sum(line["repeats"] for line in lines)


def test_a_pass_after_which_the_policy_exploded_makes_no_update(train):
    rule = KLScheduler(max_repeats=3, kl_limit=1e-6)
    wild = train("GRPO", OURS, rule=rule, repeat_scheduler="baseline", learning_rate=0.1)
    plain = train("GRPO", OURS, repeat_scheduler="baseline", learning_rate=0.1)
    assert torch.equal(weights(wild.model), weights(plain.model)), "each batch got its first update, and no other"
    assert wild.ledger.updates == 4
    assert wild.ledger.passes > 4


def test_a_run_over_generated_rows_is_followed_to_the_last_bit(train, tmp_path):
    options = {"repeat_scheduler": "baseline", "learning_rate": 3e-3, "max_steps": 6}
    first = train("GRPO", OURS, rule=KLScheduler(max_repeats=6, kl_limit=3e-5), name="first", **options)
    reasons = {line["reason"] for line in read_lines(tmp_path / "first" / "abr_trace.jsonl")}
    assert "off policy" in reasons
    again = train("GRPO", OURS, rule=FollowScheduler(trace=str(tmp_path / "first")), name="again", **options)
    assert torch.equal(weights(again.model), weights(first.model))
    assert again.ledger.passes == first.ledger.passes


def test_a_run_over_generated_rows_is_explained_and_has_a_page(train, tmp_path):
    train("GRPO", OURS, max_steps=6, learning_rate=3e-3)
    said = explain_batch(tmp_path / "run", 2)
    assert "while the divergence is not above 0.02" in said[0]
    assert any("divergence at second passes" in line for line in said)
    page = render_page(report_on_run(tmp_path / "run"))
    assert "generating" in page


def test_rows_whose_rewards_are_all_equal_are_skipped_without_a_backward(train, caplog):
    trainer = train("GRPO", OURS, reward=same_for_all, max_steps=24, max_consecutive_skips=5)
    assert torch.equal(weights(trainer.model), weights(tiny_llama(vocab_size=2048)))
    assert (trainer.ledger.skips, trainer.ledger.backwards) == (24, 0)
    assert "Batch 1 is skipped: all rewards of each group are equal" in caplog.text
    assert "kl skipped 24 of 24 batches" in caplog.text


def test_a_batch_with_a_penalty_learns_without_advantages(train):
    trainer = train("GRPO", OURS, reward=same_for_all, beta=0.1)
    assert trainer.ledger.skips == 0
    assert trainer.ledger.updates > 0


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
@pytest.mark.parametrize("save_steps", [3, 4])
def test_a_run_resumed_amid_a_generation_is_the_run_that_went_on(train, tmp_path, kind, save_steps):
    def rule():
        return KLScheduler(max_repeats=3, kl_limit=1e-3)

    options = {"steps_per_generation": 4, "max_steps": 10, "save_strategy": "steps", "save_steps": save_steps}
    options |= {"repeat_scheduler": "baseline", "learning_rate": 3e-3}
    whole = train(kind, OURS, rule=rule(), name="whole", **options)
    checkpoint = tmp_path / "whole" / f"checkpoint-{save_steps}"
    assert (checkpoint / "_abr_rollouts_0.safetensors").exists() == (save_steps == 3)
    resumed = train(kind, OURS, rule=rule(), name="resumed", resume=str(checkpoint), **options)
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert metrics(resumed) == metrics(whole)
    assert resumed.repeat_scheduler.state_dict() == whole.repeat_scheduler.state_dict()


def test_missing_rows_of_a_generation_are_named(train, tmp_path):
    options = {"steps_per_generation": 4, "max_steps": 4, "save_strategy": "steps", "save_steps": 3}
    train("GRPO", OURS, **options)
    checkpoint = tmp_path / "run" / "checkpoint-3"
    (checkpoint / "_abr_rollouts_0.safetensors").unlink()
    with pytest.raises(ValueError, match="is not a complete checkpoint: _abr_rollouts_0.safetensors is missing"):
        train("GRPO", OURS, resume=str(checkpoint), **options)


REFUSED = {
    "abr": ({"repeat_scheduler": "abr"}, "looks at it. Use --repeat_scheduler kl, fixed or baseline"),
    "outliers": ({"skip_outliers": "robust"}, "says nothing about it: use --skip_outliers none"),
    "rows": ({"skip_rows": "robust"}, "computes the loss itself"),
    "replay": ({"repeat_scheduler": "replay"}, "looks at it. Use --repeat_scheduler kl"),
}


@pytest.mark.parametrize("options", REFUSED)
def test_rules_that_say_nothing_about_generated_rows_are_refused(train, options):
    given, message = REFUSED[options]
    with pytest.raises(ValueError, match=message):
        train("GRPO", OURS, **given)


def test_the_rule_for_generated_rows_is_refused_elsewhere(build):
    with pytest.raises(ValueError, match=r"KLScheduler\(.*\) is for trainers that generate their batches"):
        build(repeat_scheduler=KLScheduler())


def test_a_rule_of_one_s_own_sees_how_far_the_policy_has_moved(train):
    class Twice(RepeatScheduler):
        def __init__(self):
            self.seen = []

        def decide(self, observation):
            return 2

        def observe(self, outcome):
            self.seen.append((outcome.observation.advantage, len(outcome.drifts)))

    rule = Twice()
    train("RLOO", OURS, rule=rule, repeat_scheduler="baseline")
    assert all(advantage > 0 and passes == 2 for advantage, passes in rule.seen)


def test_the_mixin_works_over_a_subclass_of_trl(train):
    class Theirs(GRPOTrainer):
        pass

    class Mine(ABRMixin, Theirs):
        pass

    @dataclass
    class Config(GRPOConfig, ABRConfig):
        pass

    mine = train("mine", {"mine": (Mine, Config)}, skip_outliers="none", repeat_scheduler="kl")
    ours = train("GRPO", OURS)
    assert torch.equal(weights(mine.model), weights(ours.model))
    json.dumps(mine.ledger.state_dict())
