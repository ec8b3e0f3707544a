"""Whatever Trainer can do: with one repeat it is stock training, with repeats and skips it is stock training on the
batches as they were trained on.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
from pathlib import Path

import optuna
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from abr_trainer import ABRConfig, ABRTrainer
from abr_trainer.records.files import read_lines
from tests.conftest import ScaledMixin, Scripted, Stream, log_without_times, tiny_llama, token_rows, weights

pytestmark = pytest.mark.slow

BASELINE = functools.partial(ABRConfig, repeat_scheduler="baseline", skip_outliers="none")


def adapted(**changes):
    return get_peft_model(tiny_llama(**changes), LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.0))


def mean_over_targets(outputs, labels, num_items_in_batch=None):
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


FEATURES = {
    "bf16": {"bf16": True},
    "no clipping": {"max_grad_norm": 0.0},
    "activation checkpointing": {"gradient_checkpointing": True},
    "activation checkpointing, reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "torch_compile": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "tokens averaged on each device": {"average_tokens_across_devices": False},
    "schedule-free": {"optim": "schedule_free_adamw"},
    "8-bit AdamW": {"optim": "adamw_bnb_8bit", "model": functools.partial(tiny_llama, hidden_size=64)},
    "paged AdamW": {"optim": "paged_adamw_32bit"},
    "paged 8-bit AdamW": {"optim": "paged_adamw_8bit", "model": functools.partial(tiny_llama, hidden_size=64)},
    "dropout": {"model": functools.partial(tiny_llama, attention_dropout=0.5)},
    "NEFTune": {"neftune_noise_alpha": 5.0},
    "compute_loss_func": {"trainer_options": {"compute_loss_func": mean_over_targets}},
    "LoRA": {"model": adapted},
    "tokens counted": {"include_num_input_tokens_seen": "all"},
}
RANDOM = ("dropout", "NEFTune")  # a skip draws random numbers in its forward


def trained(train, feature, **options):
    options = {"lr_scheduler_type": "constant", **FEATURES[feature], **options}
    return train(**{**options, "model": options.get("model", tiny_llama)()})


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("feature", FEATURES)
def test_repeats_and_skips_are_stock_training_on_the_batches_as_trained_on(train, feature, accumulation):
    rows, size = token_rows(6 * accumulation), 2 * accumulation
    first, second, third = (rows[start : start + size] for start in range(0, len(rows), size))
    decisions, as_trained_on = ((3, 1, 2), [first] * 3 + [second] + [third] * 2)
    if feature not in RANDOM:
        decisions, as_trained_on = ((2, 0, 2), [first] * 2 + [third] * 2)
    ours = trained(
        train, feature, data=rows, repeat_scheduler=Scripted(*decisions), gradient_accumulation_steps=accumulation
    )
    theirs = trained(
        train,
        feature,
        trainer_cls=Trainer,
        config_cls=TrainingArguments,
        data=list(itertools.chain(*as_trained_on)),
        gradient_accumulation_steps=accumulation,
    )
    assert torch.equal(weights(ours.model), weights(theirs.model))
    assert not torch.equal(weights(ours.model), weights(FEATURES[feature].get("model", tiny_llama)()))


class Seeing(Scripted):
    """Decide by a script, and keep the accuracies."""

    wants = frozenset({"accuracy"})


@pytest.mark.parametrize("feature", FEATURES)
def test_looking_at_the_accuracy_changes_nothing_in_what_is_trained(train, feature):
    options = {"gradient_accumulation_steps": 2, "feature": feature}
    seeing = Seeing(2, 0, 2)
    ours = trained(train, repeat_scheduler=seeing, **options)
    blind = trained(train, repeat_scheduler=Scripted(2, 0, 2), **options)
    assert torch.equal(weights(ours.model), weights(blind.model))
    assert ours.ledger.passes == blind.ledger.passes
    model = FEATURES[feature].get("model", tiny_llama)()
    labels = torch.stack([row["labels"] for row in token_rows(12)[:4]])
    with torch.no_grad():
        predicted = model(input_ids=labels).logits[:, :-1].argmax(-1)
    if feature not in RANDOM:
        by_hand = (predicted == labels[:, 1:]).float().mean().item()
        assert seeing.outcomes[0].observation.accuracy == pytest.approx(
            by_hand, abs=0.03 if feature == "bf16" else 1e-6
        )
    assert all(0 <= outcome.observation.accuracy <= 1 for outcome in seeing.outcomes)


@pytest.mark.launches
@pytest.mark.skipif("ABR_TEST_INDUCTOR" not in os.environ, reason="compiles for minutes: set ABR_TEST_INDUCTOR=1")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_repeats_and_skips_are_stock_training_under_inductor(train, mode):
    rows = token_rows(6)
    options = {"torch_compile": True, "torch_compile_mode": mode, "lr_scheduler_type": "constant"}
    rule = Seeing(2, 0, 2)
    ours = train(data=rows, repeat_scheduler=rule, **options)
    torch.compiler.reset()
    theirs = train(trainer_cls=Trainer, config_cls=TrainingArguments, data=rows[:2] * 2 + rows[4:] * 2, **options)
    assert torch.equal(weights(ours.model), weights(theirs.model))
    assert all(outcome.observation.accuracy is not None for outcome in rule.outcomes)


def ragged_rows():
    rows = token_rows(14)
    return [{name: value[: 4 + i % 7] for name, value in row.items()} for i, row in enumerate(rows)]


def pad(rows):
    return {
        name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
        for name, value in (("input_ids", 0), ("labels", -100))
    }


@pytest.mark.parametrize(
    "options",
    [
        *({**options, "gradient_accumulation_steps": 2} for options in FEATURES.values()),
        {
            "data": ragged_rows(),
            "train_sampling_strategy": "group_by_length",
            "trainer_options": {"data_collator": pad},
        },
        {"train_sampling_strategy": "random", "num_train_epochs": 3, "gradient_accumulation_steps": 4},
        {"data": Stream(token_rows(12)), "max_steps": 8, "gradient_accumulation_steps": 2},
        {"data": Stream(token_rows(12)), "max_steps": 9, "accelerator_config": {"dispatch_batches": False}},
        {"dataloader_drop_last": True, "data": token_rows(11)},
        {"accelerator_config": {"split_batches": True}},
        {
            "max_steps": 4,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "trainer_options": {"eval_dataset": token_rows(3)},
        },
    ],
    ids=[
        *FEATURES,
        "group_by_length",
        "shuffled",
        "stream",
        "stream, not dispatched",
        "drop_last",
        "split_batches",
        "evaluated",
    ],
)
def test_a_baseline_is_trainer(train, options):
    options = {"learning_rate": 3e-3, "warmup_steps": 2, **options}
    build_model = options.pop("model", tiny_llama)
    ours = train(config_cls=BASELINE, model=build_model(), **options)
    theirs = train(trainer_cls=Trainer, config_cls=TrainingArguments, model=build_model(), **options)
    assert torch.equal(weights(ours.model), weights(theirs.model))
    for mine, stock in zip(log_without_times(ours), log_without_times(theirs), strict=True):
        assert stock.items() <= mine.items()


class OverflowingTrainer(ScaledMixin, Trainer):
    init_scale = 2.0**127


class OverflowingABRTrainer(ScaledMixin, ABRTrainer):
    init_scale = 2.0**127


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_overflow_inside_a_pass_is_one_rejected_update(train, accumulation, max_grad_norm):
    rows, size = token_rows(6 * accumulation), 2 * accumulation
    options = {
        "gradient_accumulation_steps": accumulation,
        "max_grad_norm": max_grad_norm,
        "lr_scheduler_type": "constant",
    }
    scheduler = Scripted(8, 0, 2)
    ours = train(trainer_cls=OverflowingABRTrainer, data=rows, repeat_scheduler=scheduler, **options)
    scale = ours.accelerator.scaler.state_dict()
    as_trained_on = rows[:size] * 8 + rows[2 * size :] * 2
    theirs = train(trainer_cls=OverflowingTrainer, config_cls=TrainingArguments, data=as_trained_on, **options)
    assert torch.equal(weights(ours.model), weights(theirs.model))
    assert scale == theirs.accelerator.scaler.state_dict()
    losses = scheduler.outcomes[0].losses
    assert losses[1] == losses[0]  # the first update was rejected
    assert losses[-1] < losses[0]


# ---- Libraries that replace parts of Trainer ----


def counted_by_unsloth(self, epoch_iterator, num_batches, device=None, *args, **kwargs):
    """What Unsloth puts in place of `Trainer.get_batch_samples`: it counts targets itself, whatever Trainer knows."""
    batches = list(itertools.islice(epoch_iterator, num_batches))
    return batches, sum((batch["labels"][..., 1:] != -100).sum() for batch in batches) if batches else None


counted_by_unsloth.__name__ = "_unsloth_get_batch_samples"


@pytest.fixture
def unsloth(monkeypatch):
    """A stand-in for what Unsloth replaces, from its source: the real one needs a GPU."""

    def loss_of_unsloth(*args, **kwargs):
        return ForCausalLMLoss(*args, **kwargs)

    monkeypatch.setattr(Trainer, "get_batch_samples", counted_by_unsloth)
    monkeypatch.setitem(
        LOSS_MAPPING, "ForCausalLM", loss_of_unsloth
    )  # Trainer no longer knows that labels are shifted


@pytest.mark.parametrize("accumulation", [1, 2])
def test_under_unsloth_repeats_and_skips_are_its_training_on_the_batches_as_trained_on(train, unsloth, accumulation):
    rows, size = token_rows(6 * accumulation), 2 * accumulation
    options = {"gradient_accumulation_steps": accumulation, "lr_scheduler_type": "constant", "logging_steps": 1}
    rule = Seeing(2, 0, 2)
    ours = train(data=rows, repeat_scheduler=rule, **options)
    as_trained_on = rows[:size] * 2 + rows[2 * size :] * 2
    theirs = train(trainer_cls=Trainer, config_cls=TrainingArguments, data=as_trained_on, **options)
    assert torch.equal(weights(ours.model), weights(theirs.model))
    first = rule.outcomes[0].observation
    labels = torch.stack([row["labels"] for row in rows[:size]])
    with torch.no_grad():
        output = tiny_llama()(input_ids=labels, labels=labels)
    hits = output.logits[:, :-1].argmax(-1) == labels[:, 1:]
    assert first.loss == pytest.approx(output.loss.item(), rel=1e-5)
    assert first.accuracy == pytest.approx(hits.float().mean().item())
    assert "perplexity" in ours.state.log_history[0]
    assert "eval_perplexity" in ours.evaluate(rows)


class Hiding(ABRTrainer):
    """As if a library had put its own function over ours."""

    get_batch_samples = counted_by_unsloth


def test_a_hidden_get_batch_samples_is_right_where_no_batch_can_be_cut_off(train):
    rows = token_rows(6)
    options = {"lr_scheduler_type": "constant"}
    ours = train(trainer_cls=Hiding, data=rows, repeat_scheduler=Scripted(2, 0, 2), **options)
    theirs = train(trainer_cls=Trainer, config_cls=TrainingArguments, data=rows[:2] * 2 + rows[4:] * 2, **options)
    assert torch.equal(weights(ours.model), weights(theirs.model))


def test_a_hidden_get_batch_samples_is_refused_where_a_batch_can_be_cut_off(build):
    trainer = build(trainer_cls=Hiding, data=Stream(token_rows(6)), max_steps=4, repeat_scheduler=Scripted(1))
    before = weights(trainer.model).clone()
    with pytest.raises(ValueError, match="test_drop_in replaces `get_batch_samples` of Hiding without calling it"):
        trainer.train()
    assert torch.equal(weights(trainer.model), before)


# ---- Subclasses ----


class Overriding:
    """A subclass of Trainer that overrides what subclasses override, and notes that it was asked."""

    def __init__(self, *args, **kwargs):
        self.asked = []
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.asked.append("loss")
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        return (result[0] * 2, result[1]) if return_outputs else result * 2

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.asked.append("step")
        return super().training_step(model, inputs, num_items_in_batch)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self.asked.append("samples")
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def log(self, logs, start_time=None):
        self.asked.append("log")
        super().log({**logs, "mine": 1.0}, start_time)


class OverridingTrainer(Overriding, Trainer):
    pass


class OverridingABRTrainer(Overriding, ABRTrainer):
    pass


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("config_cls", [TrainingArguments, BASELINE])
def test_a_subclass_overrides_what_it_likes(train, config_cls, accumulation):
    options = {"gradient_accumulation_steps": accumulation}
    ours = train(trainer_cls=OverridingABRTrainer, config_cls=config_cls, **options)
    theirs = train(trainer_cls=OverridingTrainer, config_cls=TrainingArguments, **options)
    assert torch.equal(weights(ours.model), weights(theirs.model))
    assert ours.asked == theirs.asked
    assert all(logs["mine"] == 1.0 for logs in ours.state.log_history)


class AtTrainEnd(TrainerCallback):
    def __init__(self, note):
        self.note = note

    def on_train_end(self, args, state, control, **kwargs):
        self.note()


def test_a_hyperparameter_search_starts_each_trial_clean(tmp_path):
    """Each trial has its own budget, ledger, trace and rule; none sees what the one before it spent or learnt."""
    trainer = ABRTrainer(
        model_init=lambda: tiny_llama(),
        args=ABRConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            max_passes=6,
            repeat_scheduler="abr",
            loss_threshold=2.0,
            skip_outliers="none",
            eval_strategy="epoch",
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=token_rows(12),
        eval_dataset=token_rows(2),
    )
    spent = []
    trainer.add_callback(AtTrainEnd(lambda: spent.append((trainer.ledger.passes, trainer.repeat_scheduler))))
    trainer.hyperparameter_search(
        hp_space=lambda trial: {
            "max_passes": trial.suggest_categorical("max_passes", [4, 9, 12]),
            "loss_threshold": trial.suggest_categorical("loss_threshold", [2.0]),
        },
        backend="optuna",
        n_trials=3,
        sampler=optuna.samplers.GridSampler({"max_passes": [4, 9, 12], "loss_threshold": [2.0]}, seed=0),
    )
    assert sorted(passes for passes, _ in spent) == [4, 9, 12]
    assert len({id(scheduler) for _, scheduler in spent}) == 3
    for number, (passes, _) in enumerate(spent):
        trace = list(read_lines(tmp_path / f"run-{number}" / "abr_trace.jsonl"))
        assert sum(batch["repeats"] for batch in trace) == passes
        assert [batch["step"] for batch in trace] == list(range(1, len(trace) + 1))
    assert not Path(tmp_path, "abr_trace.jsonl").exists()
    assert not list(tmp_path.rglob("_skipped_batches.jsonl")), (
        "from a folder in the output directory it would be pushed"
    )


def test_an_impossible_value_of_a_trial_is_told_by_its_flag(tmp_path):
    trainer = ABRTrainer(
        model_init=lambda: tiny_llama(),
        args=ABRConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True),
        train_dataset=token_rows(4),
        eval_dataset=token_rows(2),
    )
    with pytest.raises(ValueError, match="`loss_threshold` must be positive, got -1.0"):
        trainer.hyperparameter_search(
            hp_space=lambda trial: {"loss_threshold": trial.suggest_float("loss_threshold", -1.0, -1.0)},
            backend="optuna",
            n_trials=1,
        )


def test_a_value_of_a_trial_that_its_rule_does_not_read_is_refused(tmp_path):
    """One that is left from the trial before is not: the rule is chosen anew for each trial."""
    trainer = ABRTrainer(
        model_init=lambda: tiny_llama(),
        args=ABRConfig(output_dir=str(tmp_path), max_steps=1, save_strategy="no", report_to="none", use_cpu=True),
        train_dataset=token_rows(4),
        eval_dataset=token_rows(2),
    )

    def space(trial):
        name = ("abr", "fixed", "fixed")[trial.number]
        chosen = {"repeat_scheduler": trial.suggest_categorical(f"rule {trial.number}", [name])}
        if trial.number != 1:
            chosen["loss_threshold"] = trial.suggest_float("loss_threshold", 2.0, 2.0)
        return chosen

    with pytest.raises(ValueError, match="--loss_threshold 2.0 means nothing to --repeat_scheduler fixed"):
        trainer.hyperparameter_search(
            hp_space=space, backend="optuna", n_trials=3, compute_objective=lambda metrics: 0
        )
    assert {path.name for path in tmp_path.glob("run-*")} >= {"run-0", "run-1"}


def test_training_again_is_training_anew(build):
    """A second `train()` of one trainer equals stock Trainer's second, and counts from nothing."""
    ours, theirs = build(config_cls=BASELINE), build(trainer_cls=Trainer, config_cls=TrainingArguments)
    for trainer in (ours, theirs):
        trainer.train()
        trainer.train()
    assert torch.equal(weights(ours.model), weights(theirs.model))
    assert ours.ledger.batches == ours.state.global_step == theirs.state.global_step


def test_checkpoints_of_stock_and_of_plain_arguments_are_alike(train, tmp_path):
    names = []
    for trainer_cls in (Trainer, ABRTrainer):
        directory = tmp_path / trainer_cls.__name__
        train(
            trainer_cls=trainer_cls,
            config_cls=TrainingArguments,
            output_dir=str(directory),
            save_strategy="steps",
            save_steps=3,
        )
        names.append(sorted(str(path.relative_to(directory)) for path in directory.rglob("*")))
    assert names[0] == names[1]
    states = [
        json.loads(Path(tmp_path, cls, "checkpoint-6", "trainer_state.json").read_text())
        for cls in ("Trainer", "ABRTrainer")
    ]
    assert states[0] == states[1]


@pytest.mark.parametrize("trained_before", [False, True])
def test_methods_of_trainer_called_outside_of_train_are_those_of_trainer(build, trained_before):
    ours = build(repeat_scheduler=Scripted(3), gradient_accumulation_steps=2)
    theirs = build(trainer_cls=Trainer, config_cls=TrainingArguments, gradient_accumulation_steps=2)
    if trained_before:
        ours.train()
        theirs.model.load_state_dict(ours.model.state_dict())
    spent = ours.ledger.state_dict()
    found = []
    for trainer in (ours, theirs):
        trainer.create_optimizer()
        trainer.model.zero_grad()
        loader = iter(trainer.get_train_dataloader())
        batches, targets = trainer.get_batch_samples(loader, 2, trainer.args.device)
        losses = [trainer.training_step(trainer.model, batch, targets) for batch in batches]
        gradients = [parameter.grad.clone() for parameter in trainer.model.parameters()]
        rest = [len(trainer.get_batch_samples(loader, 3, trainer.args.device)[0]) for _ in range(2)]
        found.append((losses, gradients, rest))
    (our_losses, our_gradients, our_rest), (their_losses, their_gradients, their_rest) = found
    assert torch.equal(torch.stack(our_losses), torch.stack(their_losses))
    assert all(map(torch.equal, our_gradients, their_gradients))
    assert our_rest == their_rest == [3, 1]
    assert ours.ledger.state_dict() == spent, "none of this is a part of a run"


def test_the_state_of_a_resumed_run_is_that_of_an_unbroken_one_but_for_what_trainer_itself_measures(train, tmp_path):
    options = {
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "logging_steps": 1,
    }
    options |= {"trainer_options": {"eval_dataset": token_rows(4)}}
    told: list[dict[str, float]] = []

    class Listens(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            told.append(dict(logs))

    whole = train(repeat_scheduler=Scripted(2, 0, 3), **options)
    whole_state = json.loads(Path(whole.args.output_dir, "checkpoint-6", "trainer_state.json").read_text())
    resumed = train(
        repeat_scheduler=Scripted(2, 0, 3),
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"),
        **{**options, "trainer_options": {**options["trainer_options"], "callbacks": [Listens()]}},
    )
    state = json.loads(Path(resumed.args.output_dir, "checkpoint-6", "trainer_state.json").read_text())
    for each in (whole_state, state):
        for logs in each["log_history"]:
            for name in [name for name in logs if name.startswith("eval_") and ("second" in name or "time" in name)]:
                del logs[name]
    assert state == whole_state
    assert all("waiting_seconds" in logs for logs in told if "loss" in logs), "callbacks are told of times"
    assert {"train_seconds", "train_total_seconds", "train_waiting_seconds"} <= told[-1].keys()
    assert not [name for logs in resumed.state.log_history for name in logs if name.endswith("seconds")]


@pytest.mark.parametrize("checkpoint", [True, "nowhere"])
def test_a_checkpoint_that_is_not_there_is_told_in_the_words_of_trainer(build, checkpoint):
    told = []
    for options in ({"repeat_scheduler": Scripted(2)}, {"trainer_cls": Trainer, "config_cls": TrainingArguments}):
        trainer = build(**options)
        Path(trainer.args.output_dir).mkdir(exist_ok=True)
        with pytest.raises(ValueError, match="valid checkpoint") as caught:
            trainer.train(resume_from_checkpoint=checkpoint)
        told.append(str(caught.value))
    assert told[0] == told[1]
