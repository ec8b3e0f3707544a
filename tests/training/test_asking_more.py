"""What a rule may ask of the trainer beside a number of repeats: to stop early, to go back, and more to look at."""

from __future__ import annotations

import functools
import json
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import Trainer, TrainingArguments, set_seed

from abr_trainer import ABRTrainer
from abr_trainer.records.files import CHECKSUMS_NAME, read_lines
from abr_trainer.schedulers import ConstantScheduler, RepeatScheduler, ReplayScheduler, RobustOutlierSkip
from tests.conftest import (
    ScaledMixin,
    Scripted,
    broken_row,
    tiny_llama,
    token_rows,
    trained_by_hand,
    weights,
    without_seconds,
)
from tests.jobs import build_model

pytestmark = pytest.mark.slow

BY_HAND = {"weight_decay": 0.0, "optim": "adamw_torch"}


class UntilItHelpsLess(RepeatScheduler):
    """Up to six passes, as long as the last one has lowered the loss by `least` nats."""

    def __init__(self, least):
        self.least = least
        self.asked = []
        self.outcomes = []

    def decide(self, observation):
        return 6

    def goes_on(self, observation, losses, accuracy):
        self.asked.append((observation.batch, len(losses)))
        return losses[-2] - losses[-1] > self.least

    def observe(self, outcome):
        self.outcomes.append(outcome)


class Later(RepeatScheduler):
    """Each batch once, and each once more `spacing` batches later."""

    wants = frozenset({"inputs"})

    def __init__(self, spacing):
        self.spacing = spacing
        self.seen = []
        self.outcomes = []

    def decide(self, observation):
        return 1

    def replay(self, observation):
        return [batch for batch in self.seen if batch + self.spacing == observation.batch]

    def held(self):
        return self.seen

    def observe(self, outcome):
        self.outcomes.append(outcome)
        self.seen = [*self.seen, outcome.observation.batch][-self.spacing :]

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state.get("seen", [])


class Looking(Scripted):
    """Decide by a script, and keep what was seen."""

    def __init__(self, *repeats, wants=()):
        super().__init__(*repeats)
        self.wants = frozenset(wants)
        self.asked = []
        self.accuracies = []

    def decide(self, observation):
        self.asked.append(observation)
        return super().decide(observation)

    def goes_on(self, observation, losses, accuracy):
        self.accuracies.append(accuracy)
        return True


# ---- Stopping early ----


@pytest.mark.parametrize(("accumulation", "least"), [(1, 0.05), (4, 0.1)])
def test_a_batch_ends_where_the_rule_says_so(train, accumulation, least):
    rule = UntilItHelpsLess(least)
    ours = train(repeat_scheduler=rule, gradient_accumulation_steps=accumulation, **BY_HAND)
    repeats = [outcome.repeats for outcome in rule.outcomes]
    assert 2 <= min(repeats) < 6, "the rule never stopped"
    expected, losses = trained_by_hand([[i] * n for i, n in enumerate(repeats)], accumulation, token_rows(12))
    assert torch.equal(weights(ours.model), weights(expected))
    for outcome, passes in zip(rule.outcomes, losses, strict=True):
        assert outcome.losses == pytest.approx(passes, rel=1e-6)
        assert len(outcome.losses) == outcome.repeats
    assert rule.asked[:2] == [(0, 2), (0, 3)][: len(rule.asked)], "asked from the second pass on"
    assert ours.ledger.passes == ours.ledger.updates == sum(repeats)


# ---- Going back ----


@pytest.mark.parametrize(
    ("accumulation", "spacing", "plan"),
    [
        (1, 2, [[0], [1], [2, 0], [3, 1], [4, 2], [5, 3]]),
        (4, 1, [[0], [1, 0]]),
        (2, 1, [[0], [1, 0], [2, 1]]),
    ],
)
def test_a_replayed_batch_is_an_update_on_all_of_it(train, accumulation, spacing, plan):
    rule = Later(spacing)
    ours = train(repeat_scheduler=rule, gradient_accumulation_steps=accumulation, **BY_HAND)
    expected, losses = trained_by_hand(plan, accumulation, token_rows(12))
    assert torch.equal(weights(ours.model), weights(expected))
    for outcome, batches, passes in zip(rule.outcomes, plan, losses, strict=True):
        assert (outcome.repeats, outcome.updates) == (1, len(batches))
        assert [batch for batch, _ in outcome.replayed] == batches[1:]
        assert [loss for _, loss in outcome.replayed] == pytest.approx(passes[1:], rel=1e-6)
    assert ours.ledger.updates == ours.ledger.passes == sum(map(len, plan))
    trace = list(read_lines(Path(ours.args.output_dir, "abr_trace.jsonl")))
    assert [[earlier["step"] - 1 for earlier in batch.get("replayed", [])] for batch in trace] == [
        batches[1:] for batches in plan
    ]


@pytest.mark.parametrize("kind", ["own loss", "classifier"])
def test_a_replayed_batch_counts_as_it_did_where_the_last_batch_of_an_epoch_is_short(train, kind):
    """18 rows: batches of four, four and one micro-batch. The last replays the first, and is no quarter of it."""

    class OwnLoss(ABRTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            return model(**inputs).loss

    rows = token_rows(18)
    options = {"trainer_cls": OwnLoss}
    if kind == "classifier":
        rows = [{"input_ids": row["input_ids"], "labels": torch.tensor(i % 3)} for i, row in enumerate(rows)]
        options = {"model": build_model("classifier")}
    rule = Later(2)
    rule.wants = frozenset({"inputs"})
    train(data=rows, repeat_scheduler=rule, gradient_accumulation_steps=4, learning_rate=0.0, **options)
    first, *_, last = rule.outcomes
    assert last.replayed == ((0, pytest.approx(first.losses[0], rel=1e-5)),)


def test_only_what_the_rule_wants_back_is_held(train):
    ours = train(repeat_scheduler=Later(2))
    assert sorted(ours._run.held) == [4, 5]


def test_a_budget_leaves_no_room_for_a_replay(train):
    # Batches cost 1, 2, 2 passes: of 4 passes, the replay after the third batch does not fit any more.
    rule = Later(1)
    ours = train(repeat_scheduler=rule, max_passes=4)
    assert [outcome.updates for outcome in rule.outcomes] == [1, 2, 1]
    assert ours.ledger.passes == 4


def test_a_replay_that_is_not_finite_is_no_update(train):
    rows = token_rows(6)
    rule = Later(1)
    ours = train(repeat_scheduler=rule, data=[*rows[:2], broken_row(rows[2]), broken_row(rows[3]), *rows[4:]])
    # Batch 1 is broken and skipped, and the rule holds it: replaying it after batch 2 gives no finite loss.
    assert [(outcome.repeats, outcome.updates) for outcome in rule.outcomes] == [(1, 1), (0, 0), (1, 1)]
    assert math.isnan(rule.outcomes[2].replayed[0][1])
    assert torch.isfinite(weights(ours.model)).all()
    assert ours.ledger.updates == 2


def test_replays_go_on_after_a_resume(train, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 1, "num_train_epochs": 2}
    rule = dict(quantile=0.0, spacing=2, buffer_size=4)
    whole = train(repeat_scheduler=ReplayScheduler(**rule), output_dir=str(tmp_path / "whole"), **options)
    checkpoint = tmp_path / "whole" / "checkpoint-6"
    assert (checkpoint / "_abr_held_0.safetensors").exists()
    resumed = train(
        repeat_scheduler=ReplayScheduler(**rule),
        output_dir=str(tmp_path / "resumed"),
        resume_from_checkpoint=str(checkpoint),
        **options,
    )
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert without_seconds(resumed.ledger.state_dict()) == without_seconds(whole.ledger.state_dict())
    assert resumed.ledger.updates > resumed.ledger.batches


def test_a_checkpoint_of_more_processes_cannot_give_back_what_they_held(train, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    train(repeat_scheduler=ReplayScheduler(quantile=0.0), output_dir=str(tmp_path / "run"), **options)
    state = tmp_path / "run" / "checkpoint-3" / "abr_state.json"
    written = json.loads(state.read_text())
    written["log"]["tr_loss"] *= 2
    state.write_text(json.dumps(written))
    (state.parent / CHECKSUMS_NAME).unlink()
    with pytest.raises(ValueError, match="holds batches to train on again, of 2 processes: resume with as many"):
        train(repeat_scheduler=ReplayScheduler(quantile=0.0), resume_from_checkpoint=str(state.parent), **options)


def test_a_batch_that_is_not_held_cannot_be_replayed(build):
    class Wrong(Later):
        def held(self):
            return ()

    with pytest.raises(ValueError, match=r"Wrong returned 0\. It must return batches that it held, by index from 0"):
        build(repeat_scheduler=Wrong(1)).train()


def test_inputs_that_are_no_tensors_cannot_be_held(build):
    class Names(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return token_rows(2)[index]

    def collate(rows):
        ids = torch.stack([row["input_ids"] for row in rows])
        return {"input_ids": ids, "labels": ids, "names": ["one", "two"]}

    class Nameless(ABRTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, {k: v for k, v in inputs.items() if k != "names"}, *args, **kwargs)

    trainer = build(
        trainer_cls=Nameless,
        data=Names(),
        repeat_scheduler=Later(1),
        remove_unused_columns=False,
        trainer_options={"data_collator": collate},
    )
    with pytest.raises(ValueError, match="its inputs must be tensors by name; names is something else"):
        trainer.train()


# ---- Looking at the accuracy ----


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_accuracy_is_the_share_of_targets_that_the_pass_predicts(train, accumulation):
    rule = Looking(2, wants=["accuracy"])
    rows = token_rows(12)
    for row in rows[:3]:
        row["labels"] = row["labels"].clone()
        row["labels"][:6] = -100
    train(repeat_scheduler=rule, data=rows, gradient_accumulation_steps=accumulation)
    first = rows[: 2 * accumulation]
    ids, labels = (torch.stack([row[name] for row in first]) for name in ("input_ids", "labels"))
    with torch.no_grad():
        predicted = tiny_llama()(input_ids=ids).logits[:, :-1].argmax(-1)
    targets = labels[:, 1:]
    kept = targets != -100
    assert rule.asked[0].accuracy == pytest.approx(((predicted == targets) & kept).sum().item() / kept.sum().item())
    assert all(0 <= seen.accuracy <= 1 for seen in rule.asked)
    assert rule.outcomes[-1].observation.accuracy == rule.asked[-1].accuracy


def test_the_accuracy_of_the_last_pass_is_there_when_the_rule_is_asked_to_go_on(train):
    rule = Looking(30, wants=["accuracy"])
    train(repeat_scheduler=rule, data=token_rows(2), learning_rate=3e-2)
    assert rule.accuracies[-1] > 0.9 > rule.asked[0].accuracy, "thirty passes over two rows memorise them"
    assert len(rule.accuracies) == 28, "asked before each pass from the third on"


def test_nobody_pays_for_an_accuracy_that_is_not_wanted(train):
    rule = Looking(2)
    ours = train(repeat_scheduler=rule)
    assert {seen.accuracy for seen in rule.asked} == {None}
    assert "accuracy" not in next(read_lines(Path(ours.args.output_dir, "abr_trace.jsonl")))


def without_logits():
    """A model that returns no logits while it trains, as under Liger's fused linear cross-entropy."""
    model = tiny_llama()
    forward = model.forward

    @functools.wraps(forward)
    def fused(*args, **kwargs):
        output = forward(*args, **kwargs)
        output["logits"] = None if model.training else output["logits"]
        return output

    model.forward = fused
    return model


class LossOfLogits(ABRTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return model(input_ids=inputs["input_ids"]).logits.square().mean()


class LossOfModules(ABRTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return model.lm_head(model.model(input_ids=inputs["input_ids"]).last_hidden_state).square().mean()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"trainer_cls": LossOfLogits, "data": [{"input_ids": each["input_ids"]} for each in token_rows(4)]},
            "labels",
        ),
        ({"model": without_logits}, "returns a loss without logits"),
        ({"trainer_cls": LossOfModules}, "computed without a forward of the model"),
    ],
)
@pytest.mark.parametrize("rule", [Looking(2, wants=["accuracy"]), RobustOutlierSkip(Looking(2, wants=["accuracy"]))])
def test_an_accuracy_that_cannot_be_seen_is_refused_before_the_first_update(build, options, reason, rule):
    trainer = build(repeat_scheduler=rule, **{**options, "model": options.get("model", tiny_llama)()})
    before = weights(trainer.model).clone()
    with pytest.raises(ValueError, match=f"The --repeat_scheduler looks at the token accuracy, but .*{reason}"):
        trainer.train()
    assert torch.equal(weights(trainer.model), before)


def test_a_model_without_logits_trains_as_stock_under_rules_that_need_none(train):
    rows = token_rows(6)
    ours = train(model=without_logits(), data=rows, repeat_scheduler=Scripted(2, 0, 2), lr_scheduler_type="constant")
    theirs = train(
        trainer_cls=Trainer,
        config_cls=TrainingArguments,
        model=without_logits(),
        data=rows[:2] * 2 + rows[4:] * 2,
        lr_scheduler_type="constant",
    )
    assert torch.equal(weights(ours.model), weights(theirs.model))
    assert "perplexity" in ours.state.log_history[0]
    assert ours.evaluate(rows)["eval_perplexity"] > 1, "evaluation makes logits"


def test_an_accuracy_behind_virtual_tokens_is_that_of_the_text(train):
    set_seed(0)
    adapter = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    rule = Looking(1, wants=["accuracy"])
    model = get_peft_model(tiny_llama(), adapter)
    rows = token_rows(4)
    with torch.no_grad():
        ids = torch.stack([row["input_ids"] for row in rows])
        predicted = model(input_ids=ids).logits.argmax(-1)[:, 2:-1]  # the last virtual token predicts the first target
    train(model=model, data=rows, repeat_scheduler=rule, per_device_train_batch_size=4)
    assert rule.asked[0].accuracy == pytest.approx((predicted == ids).float().mean().item())


class Reads(Scripted):
    """Would fail on an accuracy that is not there."""

    wants = frozenset({"accuracy"})

    def decide(self, observation):
        assert 0 <= observation.accuracy <= 1
        return super().decide(observation)


def test_a_loss_that_needs_more_forwards_is_charged_for_them(train):
    class Contrastive(ABRTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            with torch.no_grad():
                model(**inputs)
                model(input_ids=inputs["input_ids"][:, :4])
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = train(
        trainer_cls=Contrastive, repeat_scheduler=Reads(2, 0, 1), max_passes=7, gradient_accumulation_steps=2
    )
    # A pass is 1 + 2/3, over two micro-batches; the skip is 3 forwards for each and one backward: 1 + 1/3.
    # Of 7 passes, 2 * 5/3 + 4/3 are spent after the skip; the last batch takes 5/3, and 2/3 are left.
    assert trainer.ledger.passes == Fraction(19, 3)
    assert (trainer.ledger.forwards, trainer.ledger.backwards, trainer.ledger.updates) == (4 * 6, 2 * 3 + 1, 3)


# ---- Looking at the gradient ----


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_gradient_norm_is_that_of_the_whole_batch_before_clipping(train, accumulation):
    rule = Looking(2, wants=["grad_norm"])
    ours = train(repeat_scheduler=rule, gradient_accumulation_steps=accumulation, **BY_HAND)
    model = tiny_llama().train()
    ids = torch.stack([row["input_ids"] for row in token_rows(2 * accumulation)])
    model(input_ids=ids, labels=ids).loss.backward()
    norm = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm().item()
    before, after = rule.asked[:2]
    assert before.grad_norm is None
    assert after.grad_norm == pytest.approx(norm, rel=1e-5)
    assert before.batch == after.batch == 0
    batches = math.ceil(6 / accumulation)
    expected, _ = trained_by_hand([[i, i] for i in range(batches)], accumulation, token_rows(12))
    assert torch.equal(weights(ours.model), weights(expected)), "looking changes nothing"


class SkipsAfterBackward(Looking):
    """Skip these batches, once their gradient is known."""

    def __init__(self, *batches):
        super().__init__(1, wants=["grad_norm"])
        self.batches = batches

    def decide(self, observation):
        return 0 if observation.grad_norm is not None and observation.batch in self.batches else 1


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_batch_skipped_after_its_backward_never_happened_but_costs_a_pass(train, accumulation, scaled):
    trainer_cls = type("Scaled", (ScaledMixin, ABRTrainer), {}) if scaled else ABRTrainer
    options = {"trainer_cls": trainer_cls, "gradient_accumulation_steps": accumulation, "weight_decay": 0.1}
    late = train(repeat_scheduler=SkipsAfterBackward(0), **options)
    early = train(repeat_scheduler=Scripted(0, 1), **options)
    assert torch.equal(weights(late.model), weights(early.model))
    assert late.ledger.skips == early.ledger.skips == 1
    assert late.ledger.passes == math.ceil(6 / accumulation) > early.ledger.passes


def test_a_gradient_that_is_not_finite_is_no_update(train):
    """The loss is finite, its gradient is not: the weights must not see it."""

    class Broken(ABRTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if self.state.global_step == 1:
                loss = loss + 0 * (next(model.parameters()).sum() * 0).sqrt()  # 0 * inf in its derivative
            return loss

    rule = Looking(1, wants=["grad_norm"])
    ours = train(trainer_cls=Broken, repeat_scheduler=rule)
    assert [outcome.repeats for outcome in rule.outcomes] == [1, 0, 1, 1, 1, 1]
    assert rule.outcomes[1].reason == "non-finite"
    assert math.isfinite(rule.outcomes[1].losses[0])
    assert torch.isfinite(weights(ours.model)).all()


def test_wrappers_pass_on_what_their_rule_asks_for(train):
    rule = RobustOutlierSkip(Looking(2, wants=["accuracy", "grad_norm"]))
    train(repeat_scheduler=rule)
    assert rule.inner.asked[1].accuracy is not None
    assert rule.inner.asked[1].grad_norm is not None
    inside = RobustOutlierSkip(UntilItHelpsLess(least=math.inf))
    train(repeat_scheduler=inside)
    assert {outcome.repeats for outcome in inside.inner.outcomes} == {2}
    assert not RobustOutlierSkip(ConstantScheduler()).wants
