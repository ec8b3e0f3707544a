"""Carrying out decisions: the invariants first."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from abr_trainer import ABRConfig, ABRTrainer
from abr_trainer.records.files import CHECKSUMS_NAME, read_lines
from abr_trainer.report.why import explain_batch
from abr_trainer.schedulers import ConstantScheduler, RepeatUntil, RobustOutlierSkip, RobustRows, ThresholdScheduler
from abr_trainer.training.trainer import TooManySkips
from tests.conftest import (
    ScaledMixin,
    Scripted,
    Stream,
    broken_row,
    log_without_times,
    tiny_llama,
    token_rows,
    trained_by_hand,
    weights,
)

ACCUMULATION = pytest.mark.parametrize("accumulation", [1, 4])  # 12 rows in twos: 6 micro-batches, so 4 + 2


# ---- One repeat is ordinary training ----


@ACCUMULATION
@pytest.mark.parametrize("how", ["plain arguments", "baseline", "constant"])
def test_one_repeat_is_ordinary_training(train, how, accumulation):
    options = {
        "plain arguments": {"config_cls": TrainingArguments},
        "baseline": {"repeat_scheduler": None, "skip_outliers": "none"},
        "constant": {"repeat_scheduler": ConstantScheduler(repeats=1)},
    }[how]
    run = {"gradient_accumulation_steps": accumulation, "num_train_epochs": 2, "model": None}
    if how == "baseline":
        options = {
            "config_cls": lambda **config: ABRConfig(repeat_scheduler="baseline", skip_outliers="none", **config)
        }
    theirs = train(trainer_cls=Trainer, config_cls=TrainingArguments, **run)
    ours = train(**options, **run)
    assert torch.equal(weights(ours.model), weights(theirs.model))
    stock_keys = [
        {key: logs.get(key) for key in stock}
        for logs, stock in zip(log_without_times(ours), log_without_times(theirs), strict=True)
    ]
    assert stock_keys == log_without_times(theirs)


def test_plain_arguments_add_nothing(build):
    ours = build(config_cls=TrainingArguments)
    theirs = build(trainer_cls=Trainer, config_cls=TrainingArguments)
    assert [type(c) for c in ours.callback_handler.callbacks] == [type(c) for c in theirs.callback_handler.callbacks]
    ours.train()
    theirs.train()
    assert [set(logs) for logs in ours.state.log_history] == [set(logs) for logs in theirs.state.log_history]
    assert not Path(ours.args.output_dir, "abr_trace.jsonl").exists()


# ---- Repeats ----


@pytest.mark.parametrize(
    ("accumulation", "repeats"), [(1, [3, 1, 2, 1, 4, 2]), (4, [3, 2]), (2, [1, 5, 2]), (5, [2, 3])]
)
def test_n_repeats_are_n_updates_on_the_whole_batch(train, accumulation, repeats):
    scheduler = Scripted(*repeats)
    ours = train(
        repeat_scheduler=scheduler, gradient_accumulation_steps=accumulation, weight_decay=0.0, optim="adamw_torch"
    )
    plan = [[index] * count for index, count in enumerate(repeats)]
    expected, losses = trained_by_hand(plan, accumulation, token_rows(12))
    assert torch.equal(weights(ours.model), weights(expected))
    for outcome, passes in zip(scheduler.outcomes, losses, strict=True):
        assert outcome.losses == pytest.approx(passes, rel=1e-6)
    assert ours.ledger.updates == ours.ledger.passes == sum(repeats)


def test_without_clipping_the_gradients_are_left_alone(train):
    ours = train(repeat_scheduler=Scripted(2), max_grad_norm=0.0, weight_decay=0.0, optim="adamw_torch")
    expected, _ = trained_by_hand([[index] * 2 for index in range(6)], 1, token_rows(12), max_grad_norm=math.inf)
    assert torch.equal(weights(ours.model), weights(expected))


def test_one_batch_of_eight_is_four_times_two(train):
    decisions = (3, 0, 2)
    rows = token_rows(24)
    whole = train(repeat_scheduler=Scripted(*decisions), data=rows, per_device_train_batch_size=8)
    parts = train(
        repeat_scheduler=Scripted(*decisions), data=rows, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    torch.testing.assert_close(weights(whole.model), weights(parts.model), rtol=1e-4, atol=1e-5)
    for one, other in zip(whole.repeat_scheduler.outcomes, parts.repeat_scheduler.outcomes, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-5)
        assert one.repeats == other.repeats


def test_the_first_pass_is_the_probe(train):
    forwards = []
    model = tiny_llama()
    model.register_forward_hook(lambda *_: forwards.append(1))
    trainer = train(model=model, repeat_scheduler=Scripted(1, 3, 0), gradient_accumulation_steps=2)
    assert len(forwards) == 2 * (1 + 3 + 1) == trainer.ledger.forwards
    assert trainer.ledger.backwards == 2 * (1 + 3) + 1  # the skip saves the backward of its last micro-batch


class CountUpdates(TrainerCallback):
    def __init__(self):
        self.events = []

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.events.append("pre")

    def on_optimizer_step(self, *args, **kwargs):
        self.events.append("step")

    def on_step_end(self, *args, **kwargs):
        self.events.append("end")


def test_optimizer_callbacks_see_every_update_and_step_callbacks_every_batch(train):
    counter = CountUpdates()
    train(repeat_scheduler=Scripted(2), data=token_rows(4), trainer_options={"callbacks": [counter]})
    assert counter.events == ["pre", "step", "pre", "step", "end"] * 2


# ---- Skips ----

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "sgd with momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1),
}


def snapshot(trainer):
    """Weights and every tensor the optimizer keeps."""
    states = trainer.optimizer.state_dict()["state"]
    return [weights(trainer.model)] + [
        value for state in states.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]


@ACCUMULATION
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_batch_never_happened(train, name, accumulation):
    rows = token_rows(2 * accumulation * 4)
    batch = 2 * accumulation

    def run(data, *decisions):
        model = tiny_llama()
        return train(
            model=model,
            data=data,
            repeat_scheduler=Scripted(*decisions),
            gradient_accumulation_steps=accumulation,
            lr_scheduler_type="constant",
            trainer_options={"optimizers": (OPTIMIZERS[name](model.parameters()), None)},
        )

    skipping = run(rows, 1, 2, 0, 1)
    without = run(rows[: 2 * batch] + rows[3 * batch :], 1, 2, 1)
    for one, other in zip(snapshot(skipping), snapshot(without), strict=True):
        assert torch.equal(one, other)
    assert (skipping.state.global_step, without.state.global_step) == (4, 3)


def test_a_skip_is_exact_for_a_schedule_free_optimizer(train):
    pytest.importorskip("schedulefree")
    options = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"}
    rows = token_rows(8)
    skipping = train(data=rows, repeat_scheduler=Scripted(1, 2, 0, 1), **options)
    without = train(data=rows[:4] + rows[6:], repeat_scheduler=Scripted(1, 2, 1), **options)
    for one, other in zip(snapshot(skipping), snapshot(without), strict=True):
        assert torch.equal(one, other)


class ScaledTrainer(ScaledMixin, ABRTrainer):
    pass


@ACCUMULATION
def test_a_skip_is_exact_under_a_gradient_scaler(train, accumulation):
    rows, batch = token_rows(2 * accumulation * 4), 2 * accumulation
    options = {
        "trainer_cls": ScaledTrainer,
        "gradient_accumulation_steps": accumulation,
        "lr_scheduler_type": "constant",
    }
    skipping = train(data=rows, repeat_scheduler=Scripted(1, 2, 0, 1), **options)
    scale = skipping.accelerator.scaler.state_dict()
    without = train(data=rows[: 2 * batch] + rows[3 * batch :], repeat_scheduler=Scripted(1, 2, 1), **options)
    for one, other in zip(snapshot(skipping), snapshot(without), strict=True):
        assert torch.equal(one, other)
    assert scale == without.accelerator.scaler.state_dict()
    assert scale["_growth_tracker"] == 4  # updates under the scaler, so it was at work


def test_the_learning_rate_ticks_once_a_batch_skipped_or_not(train):
    trainer = train(repeat_scheduler=Scripted(2, 0, 3), logging_steps=1)
    # Linear from 1e-2 over 6 batches.
    rates = [logs["learning_rate"] for logs in trainer.state.log_history if "loss" in logs]
    assert rates == pytest.approx([1e-2 * (6 - batch) / 6 for batch in range(6)])
    assert trainer.lr_scheduler.get_last_lr() == [0.0, 0.0]


def test_a_broken_batch_costs_one_skip(train):
    rows = token_rows(12)
    rows[4], rows[5] = broken_row(rows[4]), broken_row(rows[5])
    scheduler = RobustOutlierSkip(ThresholdScheduler())
    trainer = train(data=rows, repeat_scheduler=scheduler, logging_steps=1)
    trace = list(read_lines(Path(trainer.args.output_dir, "abr_trace.jsonl")))
    assert [batch["reason"] for batch in trace] == ["threshold"] * 2 + ["no targets"] + ["threshold"] * 3
    assert trace[2]["loss"] is None
    assert trace[2]["repeats"] == 0
    assert torch.isfinite(weights(trainer.model)).all()
    assert len(scheduler.history) == 5
    assert all(math.isfinite(loss) for loss in scheduler.history)
    assert trainer.ledger.skips == 1
    without = train(data=rows[:4] + rows[6:], repeat_scheduler=ThresholdScheduler())
    assert trainer.ledger.updates == without.ledger.updates


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_broken_batch_is_left_out_of_the_logged_loss(train, accumulation, caplog):
    rows = token_rows(4 * 2 * accumulation)
    at = 2 * accumulation  # the second batch; with accumulation, its first micro-batch has a loss
    rows[at + 2 * accumulation - 1] = rows[0]
    model = tiny_llama()

    def poison(module, args, output):
        if torch.equal(args[0][-1], rows[0]["input_ids"]) and args[0].shape[0] == 2:
            return torch.full_like(output, math.nan)
        return output

    model.model.embed_tokens.register_forward_hook(poison)
    trainer = train(
        model=model, data=rows, repeat_scheduler=Scripted(1), gradient_accumulation_steps=accumulation, logging_steps=4
    )
    losses = [outcome.losses[0] for outcome in trainer.repeat_scheduler.outcomes]
    assert [math.isfinite(loss) for loss in losses] == [True, False, True, True]
    finite = [loss for loss in losses if math.isfinite(loss)]
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(sum(finite) / 3, rel=1e-6)
    assert logged["skipped"] == 0.25
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(sum(finite) / 3, rel=1e-6)
    assert "Batch 2 is skipped: its loss is nan" in caplog.text
    trace = list(read_lines(Path(trainer.args.output_dir, "abr_trace.jsonl")))
    assert [batch["step"] for batch in trace if batch["reason"] == "non-finite"] == [2]


def test_a_later_pass_that_is_not_finite_ends_the_batch_without_its_update(train):
    model, passes = tiny_llama(), []

    def break_third_pass(module, args, output):
        passes.append(1)
        return torch.full_like(output, math.nan) if len(passes) == 3 else output

    model.model.embed_tokens.register_forward_hook(break_third_pass)
    trainer = train(model=model, repeat_scheduler=Scripted(5, 1))
    first = trainer.repeat_scheduler.outcomes[0]
    assert (first.repeats, len(first.losses), first.reason) == (2, 3, "non-finite")
    assert torch.isfinite(weights(trainer.model)).all()
    assert (trainer.ledger.updates, trainer.ledger.passes) == (2 + 5, 3 + 5)


def test_too_many_skips_in_a_row_save_and_stop(build):
    trainer = build(repeat_scheduler=Scripted(1, 0), data=token_rows(20), max_consecutive_skips=4)
    with pytest.raises(TooManySkips) as caught:
        trainer.train()
    message = str(caught.value)
    assert "4 batches in a row were skipped, --max_consecutive_skips is 4." in message
    losses = [outcome.losses[0] for outcome in trainer.repeat_scheduler.outcomes]
    assert all(f"{batch + 1} (loss {losses[batch]:.4g})" in message for batch in (1, 2, 3, 4))
    trace = read_lines(Path(trainer.args.output_dir, "abr_trace.jsonl"))
    assert [batch["step"] for batch in trace if batch["repeats"] == 0] == [2, 3, 4, 5], "as the message counts"
    checkpoint = Path(trainer.args.output_dir, "checkpoint-5")
    assert str(checkpoint) in message
    assert json.loads((checkpoint / "abr_state.json").read_text())["ledger"]["batches"] == 5


# ---- Batches without targets ----


class Guarded(ABRTrainer):
    """Its loss is 0 where there are no targets, as TRL's is."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**{**inputs, "num_items_in_batch": num_items_in_batch})
        loss = outputs.loss if (inputs["labels"][:, 1:] != -100).any() else outputs.logits.sum() * 0.0
        return (loss, outputs) if return_outputs else loss


def only_first_label(row):
    labels = torch.full_like(row["labels"], -100)
    labels[0] = row["labels"][0]
    return {"input_ids": row["input_ids"], "labels": labels}


@ACCUMULATION
@pytest.mark.parametrize("empty", [broken_row, only_first_label])
@pytest.mark.parametrize("trainer_cls", [Guarded, ABRTrainer])
def test_a_batch_without_targets_never_happened(train, trainer_cls, empty, accumulation, caplog):
    rows, size = token_rows(2 * accumulation * 4), 2 * accumulation
    data = [*rows[:size], *map(empty, rows[size : 2 * size]), *rows[2 * size :]]

    def run(data):
        rule = RobustOutlierSkip(ConstantScheduler(2))
        options = {"gradient_accumulation_steps": accumulation, "lr_scheduler_type": "constant", "logging_steps": 4}
        return train(trainer_cls=trainer_cls, data=data, repeat_scheduler=rule, **options)

    ours = run(data)
    log = caplog.text
    without = run(rows[:size] + rows[2 * size :])
    assert torch.equal(weights(ours.model), weights(without.model))
    assert ours.repeat_scheduler.state_dict() == without.repeat_scheduler.state_dict()
    assert ours.ledger.passes == without.ledger.passes + 1 - (1 - ours.ledger.share) / accumulation
    assert (ours.ledger.skips, without.ledger.skips) == (1, 0)
    trace = list(read_lines(Path(ours.args.output_dir, "abr_trace.jsonl")))
    logged, expected = ours.state.log_history, without.state.log_history
    assert logged[0]["loss"] == pytest.approx(expected[-1]["train_loss"], rel=1e-6)
    if trainer_cls is ABRTrainer:  # a loss of one's own may be anything
        assert logged[0]["perplexity"] == pytest.approx(math.exp(expected[-1]["train_loss"]), rel=1e-6)
    assert logged[-1]["train_loss"] == pytest.approx(expected[-1]["train_loss"], rel=1e-6)
    assert "Batch 2 is skipped: it has no targets (labels other than -100)" in log
    assert len(trace) == 3, "of the run without it"


def test_a_micro_batch_without_targets_among_others_changes_nothing(train):
    rows = token_rows(16)
    data = [*rows[:2], *map(broken_row, rows[2:4]), *rows[4:]]
    scheduler = Scripted(1)
    ours = train(data=data, repeat_scheduler=scheduler, gradient_accumulation_steps=4)
    options = {"trainer_cls": Trainer, "config_cls": TrainingArguments}
    theirs = train(**options, data=data, gradient_accumulation_steps=4)
    assert torch.equal(weights(ours.model), weights(theirs.model))
    assert [outcome.reason for outcome in scheduler.outcomes] == ["scheduler"] * 2


@pytest.mark.parametrize("length", [1, 2])
def test_a_row_of_one_token_has_no_target(train, length):
    scheduler = Scripted(1)
    train(data=token_rows(4, length=length), repeat_scheduler=scheduler)
    assert {outcome.reason for outcome in scheduler.outcomes} == {"no targets" if length == 1 else "scheduler"}


class OfTwoTerms(ABRTrainer):
    """Learns from more than labels."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"])
        loss = outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


class WithSecondHeadForCausalLM(LlamaForCausalLM):
    """Learns from `other`, too, and its loss has no part of labels where there are no targets."""

    def forward(self, input_ids=None, labels=None, other=None, **kwargs):
        outputs = super().forward(input_ids=input_ids)
        outputs.loss = (outputs.logits.mean(-1) - other).square().mean()
        if (labels[:, 1:] != -100).any():
            outputs.loss += self.loss_function(outputs.logits, labels, self.config.vocab_size, **kwargs)
        return outputs


@pytest.mark.parametrize("kind", ["own compute_loss", "own labels"])
def test_a_loss_that_is_not_of_labels_alone_is_trained_on(train, kind):
    scheduler = Scripted(1)
    rows = [{**broken_row(row), "other": row["labels"].float()} for row in token_rows(4)]
    options = {"trainer_cls": OfTwoTerms}
    if kind == "own labels":
        options = {"model": WithSecondHeadForCausalLM(tiny_llama().config), "label_names": ["labels", "other"]}
    train(**options, data=rows, repeat_scheduler=scheduler)
    assert [outcome.repeats for outcome in scheduler.outcomes] == [1, 1]


def test_too_many_batches_without_targets_stop_with_that_reason(build):
    trainer = build(data=[broken_row(row) for row in token_rows(8)], max_consecutive_skips=3)
    with pytest.raises(TooManySkips, match=r"The last were 1 \(no targets\), 2 \(no targets\), 3 \(no targets\)\."):
        trainer.train()


def test_a_checkpoint_of_an_earlier_version_counts_its_skips_alike(build, tmp_path):
    rows = token_rows(20)
    first = build(data=rows, repeat_scheduler=Scripted(1, 0), save_strategy="steps", save_steps=2, max_steps=2)
    first.train()
    state = Path(first.args.output_dir, "checkpoint-2", "abr_state.json")
    content = json.loads(state.read_text())
    assert content["skips_in_a_row"] == [[1, content["skips_in_a_row"][0][1]]], "by index, as ever"
    del content["log"]["window"]["measured"], content["log"]["window"]["losses"]
    state.write_text(json.dumps(content))
    (state.parent / CHECKSUMS_NAME).unlink()
    again = build(data=rows, repeat_scheduler=Scripted(1, 0), max_consecutive_skips=2)
    with pytest.raises(TooManySkips, match=r"The last were 2 \(loss [0-9.]+\), 3 \(loss [0-9.]+\)\."):
        again.train(resume_from_checkpoint=str(state.parent))


def test_rows_without_targets_are_named_at_the_start(build, caplog):
    rows = token_rows(8)
    rows[1], rows[6] = broken_row(rows[1]), only_first_label(rows[6])
    trainer = build(data=rows, repeat_scheduler=Scripted(1))
    trainer.train()
    trainer.train()
    told = "2 of the 8 rows of the training set (25.0 %) have no target (a label other than -100): index 1, index 6."
    assert caplog.text.count(told) == 1
    assert "that went by" not in caplog.text


def test_rows_without_targets_of_a_stream_are_counted_as_they_pass(train, caplog):
    rows = token_rows(8)
    rows[1], rows[6] = broken_row(rows[1]), only_first_label(rows[6])
    train(data=Stream(rows), repeat_scheduler=Scripted(3), max_steps=4)
    assert "2 of the 8 rows that went by had no target (a label other than -100)." in caplog.text


def test_plain_arguments_say_nothing_of_rows_without_targets(train, caplog):
    train(config_cls=TrainingArguments, data=[broken_row(row) for row in token_rows(4)])
    assert "target" not in caplog.text


def test_why_tells_of_a_batch_without_targets(train):
    rows = token_rows(6)
    trainer = train(data=[*rows[:2], *map(broken_row, rows[2:4]), *rows[4:]], repeat_scheduler=Scripted(1))
    told = "\n".join(explain_batch(Path(trainer.args.output_dir), 2))
    assert "Batch 2 was skipped: it has no label other than -100 to train on" in told
    assert re.search(r"first-pass loss +none", told)
    assert re.search(r"decided by +no targets$", told, re.MULTILINE)


def test_too_many_skips_save_whatever_the_save_strategy(build):
    trainer = build(
        repeat_scheduler=Scripted(0),
        max_consecutive_skips=2,
        save_strategy="best",
        metric_for_best_model="loss",
        eval_strategy="steps",
        eval_steps=1,
        trainer_options={"eval_dataset": token_rows(2)},
    )
    with pytest.raises(TooManySkips):
        trainer.train()
    assert Path(trainer.args.output_dir, "checkpoint-2", "abr_state.json").exists()


def test_a_trained_batch_ends_a_row_of_skips(train):
    trainer = train(repeat_scheduler=Scripted(0, 0, 1, 0, 0, 1), max_consecutive_skips=3)
    assert trainer.ledger.skips == 4


# ---- Budget ----


@pytest.mark.parametrize("scheduler_type", ["linear", "cosine"])
@pytest.mark.parametrize("repeats", [(1,), (3, 1, 2), (4,)])
def test_a_budget_is_spent_exactly_and_ends_at_the_last_learning_rate(train, repeats, scheduler_type):
    trainer = train(repeat_scheduler=Scripted(*repeats), max_passes=17, lr_scheduler_type=scheduler_type)
    assert trainer.ledger.passes == trainer.ledger.updates == 17
    assert trainer.lr_scheduler.get_last_lr() == [0.0, 0.0]
    assert trainer.state.max_steps == trainer.state.global_step


def test_the_last_batch_is_cut_to_what_is_left(train):
    trainer = train(repeat_scheduler=Scripted(5), max_passes=7)
    trace = list(read_lines(Path(trainer.args.output_dir, "abr_trace.jsonl")))
    assert [(batch["repeats"], batch["reason"]) for batch in trace] == [(5, "scheduler"), (2, "budget")]


def test_every_update_of_a_budget_has_the_rate_of_the_passes_before_it(train):
    rates = []

    class Rates(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            rates.append(optimizer.param_groups[0]["lr"])

    train(repeat_scheduler=Scripted(2, 1, 3), max_passes=6, trainer_options={"callbacks": [Rates()]})
    assert rates == pytest.approx([1e-2 * (6 - passes) / 6 for passes in range(6)])


def test_a_baseline_under_a_budget_is_stock_training_of_as_many_steps(train):
    ours = train(repeat_scheduler=ConstantScheduler(), max_passes=9, lr_scheduler_type="cosine", warmup_steps=2)
    theirs = train(
        trainer_cls=Trainer, config_cls=TrainingArguments, max_steps=9, lr_scheduler_type="cosine", warmup_steps=2
    )
    assert torch.equal(weights(ours.model), weights(theirs.model))
    assert ours.state.global_step == 9


def test_a_skip_spends_its_forward_share(train):
    # All weights trainable: a skip is 1/3. Skip, skip, train, ... : each round of three batches costs 5/3.
    trainer = train(repeat_scheduler=Scripted(0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1), max_passes=5)
    # Three rounds cost exactly 5.
    assert trainer.ledger.passes == 5
    assert (trainer.ledger.batches, trainer.ledger.skips) == (9, 6)


def test_what_is_left_of_a_budget_is_less_than_a_pass(train):
    trainer = train(repeat_scheduler=Scripted(0, 4), max_passes=8)  # 1/3 + 4 + 3, and 2/3 are left
    assert float(trainer.ledger.passes) == pytest.approx(7 + 1 / 3)
    assert trainer.lr_scheduler.get_last_lr() == [0.0, 0.0]


def test_a_budget_evaluates_and_saves_at_its_end(train):
    trainer = train(
        repeat_scheduler=Scripted(4),
        max_passes=10,
        eval_strategy="steps",
        eval_steps=0.5,
        save_strategy="steps",
        save_steps=500,
        trainer_options={"eval_dataset": token_rows(4)},
    )
    assert Path(trainer.args.output_dir, "checkpoint-3", "abr_state.json").exists()
    # Half of the budget is 5 steps; the run has 3, so the evaluation at its end is the only one.
    assert [logs["step"] for logs in trainer.state.log_history if "eval_loss" in logs] == [3]


def test_progress_is_the_share_of_the_run_that_is_spent(train):
    spent = train(repeat_scheduler=Scripted(2), max_passes=8).repeat_scheduler.outcomes
    assert [outcome.observation.progress for outcome in spent] == [0.0, 0.25, 0.5, 0.75]
    seen = train(repeat_scheduler=Scripted(2), max_steps=4).repeat_scheduler.outcomes
    assert [outcome.observation.progress for outcome in seen] == [0.0, 0.25, 0.5, 0.75]


# ---- Primer ----


def test_primer_batches_are_trained_on_once_and_fill_the_history(train):
    scheduler = RobustOutlierSkip(ConstantScheduler(repeats=3))
    trainer = train(repeat_scheduler=scheduler, primer_batches=2)
    trace = list(read_lines(Path(trainer.args.output_dir, "abr_trace.jsonl")))
    assert [(batch["repeats"], batch["reason"]) for batch in trace] == [(1, "primer")] * 2 + [(3, "constant")] * 4
    assert len(scheduler.history) == 6


def test_a_primer_comes_from_its_own_data(train):
    primer, rows = token_rows(4, seed=9), token_rows(8)
    ours = train(
        data=rows, repeat_scheduler=ConstantScheduler(), primer_batches=2, trainer_options={"primer_dataset": primer}
    )
    trace = list(read_lines(Path(ours.args.output_dir, "abr_trace.jsonl")))
    assert [batch["epoch"] for batch in trace] == [-0.5, 0.0, 0.25, 0.5, 0.75, 1.0]
    assert [batch["reason"] for batch in trace] == ["primer"] * 2 + ["constant"] * 4
    same = train(data=primer + rows, repeat_scheduler=ConstantScheduler())
    assert torch.equal(weights(ours.model), weights(same.model))


def test_a_primer_that_is_too_short_is_told_before_training(build):
    with pytest.raises(ValueError, match="The primer has 4 blocks; --primer_batches 3 needs 6"):
        build(
            repeat_scheduler=ConstantScheduler(), primer_batches=3, trainer_options={"primer_dataset": token_rows(4)}
        )


# ---- Logs and state ----


def test_logs_hold_first_pass_loss_perplexity_repeats_skips_and_cost(train):
    trainer = train(repeat_scheduler=Scripted(3, 0, 1, 1, 2, 0), logging_steps=2)
    outcomes = trainer.repeat_scheduler.outcomes
    logged = [logs for logs in trainer.state.log_history if "loss" in logs]
    for window, logs in enumerate(logged):
        pair = outcomes[2 * window : 2 * window + 2]
        assert logs["loss"] == pytest.approx(sum(outcome.losses[0] for outcome in pair) / 2, rel=1e-6)
        assert logs["perplexity"] == pytest.approx(math.exp(logs["loss"]))
    assert [logs["repeats"] for logs in logged] == [1.5, 1.0, 1.0]
    assert [logs["skipped"] for logs in logged] == [0.5, 0.0, 0.5]
    assert [logs["updates"] for logs in logged] == [3, 5, 7]
    assert [logs["passes"] for logs in logged] == pytest.approx([3 + 1 / 3, 5 + 1 / 3, 7 + 2 / 3])
    assert [("grad_norm" in logs) for logs in logged] == [False, True, False]  # a skipped batch has no gradient
    assert trainer.state.log_history[-1]["train_updates"] == 7


def test_the_trace_has_a_line_a_batch(train):
    trainer = train(repeat_scheduler=Scripted(2, 1), num_train_epochs=2, data=token_rows(6))
    trace = list(read_lines(Path(trainer.args.output_dir, "abr_trace.jsonl")))
    assert [batch["step"] for batch in trace] == [1, 2, 3, 4, 5, 6]
    assert [batch["epoch"] for batch in trace] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    assert [len(batch["losses"]) for batch in trace] == [2, 1, 1, 1, 1, 1]
    assert [batch["learning_rate"] for batch in trace] == pytest.approx([1e-2 * (6 - i) / 6 for i in range(6)])
    assert all(batch["loss"] == batch["losses"][0] and batch["seconds"] > 0 for batch in trace)
    assert [batch["passes"] for batch in trace] == [2, 3, 4, 5, 6, 7]
    assert [batch["progress"] for batch in trace] == pytest.approx([i / 6 for i in range(6)])
    assert all(batch["memory"] > 2**20 for batch in trace), "bytes"


@pytest.mark.parametrize("accumulation", [1, 3])
def test_what_a_skipped_batch_was_about_is_kept(train, accumulation):
    data = [{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in token_rows(12)]
    data[5]["attention_mask"][:4] = 0  # padding on the left
    trainer = train(repeat_scheduler=Scripted(1, 0, 1), data=data, gradient_accumulation_steps=accumulation)
    (skipped,) = read_lines(Path(trainer.args.output_dir, "_skipped_batches.jsonl"))
    rows = range(2, 4) if accumulation == 1 else range(6, 12)
    assert skipped["step"] == 2
    assert skipped["input_ids"] == [data[row]["input_ids"].tolist() for row in rows]
    trainer = train(repeat_scheduler=Scripted(1, 1, 0, 1), data=data)
    (skipped,) = read_lines(Path(trainer.args.output_dir, "_skipped_batches.jsonl"))
    assert skipped["input_ids"][1] == data[5]["input_ids"][4:].tolist()


def test_evaluations_come_at_equal_compute_however_often_batches_repeat(train):
    def evaluated(scheduler, **options):
        trainer = train(
            repeat_scheduler=scheduler, trainer_options={"eval_dataset": token_rows(2)}, max_passes=6, **options
        )
        spent = {
            batch["step"]: batch["passes"] for batch in read_lines(Path(trainer.args.output_dir, "abr_trace.jsonl"))
        }
        return [spent[logs["step"]] for logs in trainer.state.log_history if "eval_loss" in logs]

    assert evaluated(ConstantScheduler(), eval_passes=2) == [2, 4, 6]
    assert evaluated(ConstantScheduler(2), eval_passes=2) == [2, 4, 6]
    assert evaluated(ConstantScheduler(3), eval_passes=2) == [3, 6], "as soon as a batch has crossed the mark"
    assert evaluated(ConstantScheduler(), eval_passes=0.5) == [3, 6]


def test_a_resumed_run_is_evaluated_where_an_unbroken_one_is(train, tmp_path):
    options = dict(
        repeat_scheduler=ConstantScheduler(2),
        trainer_options={"eval_dataset": token_rows(2)},
        eval_passes=4,
        max_passes=12,
        save_strategy="steps",
        save_steps=1,
    )
    whole = train(**options)
    expected = [logs["step"] for logs in whole.state.log_history if "eval_loss" in logs]
    resumed = train(**options, resume_from_checkpoint=str(Path(whole.args.output_dir, "checkpoint-3")))
    assert [logs["step"] for logs in resumed.state.log_history if "eval_loss" in logs] == expected == [2, 4, 6]


def test_checkpoints_come_at_equal_compute_however_often_batches_repeat(train, tmp_path):
    def saved(scheduler):
        directory = tmp_path / repr(scheduler)
        train(repeat_scheduler=scheduler, max_passes=6, save_strategy="no", save_passes=0.5, output_dir=str(directory))
        return sorted(path.name for path in directory.glob("checkpoint-*"))

    assert saved(ConstantScheduler()) == ["checkpoint-3", "checkpoint-6"]
    assert saved(ConstantScheduler(3)) == ["checkpoint-1", "checkpoint-2"]


def test_evaluations_that_cannot_be_are_refused(build):
    with pytest.raises(ValueError, match="--eval_passes needs something to evaluate on"):
        build(eval_passes=2)
    with pytest.raises(ValueError, match="--eval_passes must be positive, got 0"):
        build(eval_passes=0)
    with pytest.raises(ValueError, match="--save_passes must be positive, got -1"):
        build(save_passes=-1)
    with pytest.raises(ValueError, match=r"--eval_passes 0.1 is a share of the budget, and there is none"):
        build(eval_passes=0.1)


@pytest.mark.parametrize(
    ("given", "fields", "message"),
    [
        (
            "scheduler",
            {"repeat_scheduler": "abr"},
            "--repeat_scheduler abr means nothing beside `repeat_scheduler=Scri",
        ),
        ("scheduler", {"skip_outliers": "classic"}, "--skip_outliers classic means nothing beside `repeat_scheduler="),
        (
            "scheduler",
            {"skip_grad_norm": 6.0},
            "--skip_grad_norm 6.0 means nothing beside `repeat_scheduler=Scripted(",
        ),
        ("rows", {"skip_rows": "robust"}, "--skip_rows robust means nothing beside `row_rule=RobustRows(sigmas=4.25"),
    ],
)
def test_fields_beside_a_rule_that_decides_instead_are_refused(build, given, fields, message):
    options = {"trainer_options": {"row_rule": RobustRows()}} if given == "rows" else {"repeat_scheduler": Scripted(1)}
    with pytest.raises(ValueError, match=re.escape(message)):
        build(config_cls=lambda **config: ABRConfig(**config, **fields), **options)


def test_training_again_starts_clean(train):
    trainer = train(repeat_scheduler=None, skip_outliers="robust", config_cls=lambda **c: ABRConfig(**c))
    first = (trainer.ledger.updates, len(trainer.repeat_scheduler.history))
    trainer.train()
    assert (trainer.ledger.batches, len(trainer.repeat_scheduler.history)) == (6, 6)
    assert first[1] == 6
    assert len(list(read_lines(Path(trainer.args.output_dir, "abr_trace.jsonl")))) == 6


def test_an_unsized_stream_that_ends_in_the_middle_of_a_batch_leaks_nothing(train):
    # Three micro-batches in groups of two: each round gives one whole batch and half of one, which is dropped.
    options = {"repeat_scheduler": Scripted(1), "gradient_accumulation_steps": 2, "logging_steps": 1}
    ours = train(data=Stream(token_rows(6)), max_steps=3, **options)
    same = train(data=token_rows(6)[:4] * 3, **options)
    assert torch.equal(weights(ours.model), weights(same.model))
    losses = [[logs["loss"] for logs in trainer.state.log_history if "loss" in logs] for trainer in (ours, same)]
    assert losses[0] == losses[1]
    assert ours.ledger.forwards == same.ledger.forwards == 6


def test_a_stream_shorter_than_a_batch_is_told(build):
    trainer = build(
        data=Stream(token_rows(6)), repeat_scheduler=Scripted(1), gradient_accumulation_steps=4, max_passes=3
    )
    with pytest.raises(ValueError, match="ended after 3 micro-batches, before the first batch of"):
        trainer.train()


def test_the_mean_loss_of_a_run_leaves_out_what_is_not_finite(train):
    rows = token_rows(12)
    rows[10], rows[11] = broken_row(rows[10]), broken_row(rows[11])  # the last batch, after the last log
    trainer = train(data=rows, repeat_scheduler=Scripted(1), logging_steps=4)
    losses = [outcome.losses[0] for outcome in trainer.repeat_scheduler.outcomes]
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(sum(losses[:5]) / 5, rel=1e-6)


def test_a_budget_does_not_inflate_the_throughput(train):
    metrics = train(repeat_scheduler=Scripted(2), max_passes=8).state.log_history[-1]
    ratio = metrics["train_samples_per_second"] / metrics["train_steps_per_second"]
    assert ratio == pytest.approx(2, rel=0.02)  # rows a batch


def test_a_skip_at_the_end_leaves_other_loops_alone(train):
    trainer = train(repeat_scheduler=Scripted(1, 1, 1, 1, 1, 0))
    assert trainer.accelerator.sync_gradients


def test_a_lower_perplexity_is_better_unless_told_otherwise():
    assert ABRConfig(metric_for_best_model="perplexity", report_to="none").greater_is_better is False
    assert ABRConfig(metric_for_best_model="eval_loss", report_to="none").greater_is_better is False
    assert ABRConfig(metric_for_best_model="accuracy", report_to="none").greater_is_better is True


@pytest.mark.parametrize(
    ("decision", "must"),
    [(0.87, "an integer"), (None, "an integer"), ("2", "an integer"), (-1, r"0 \(skip\) or more")],
)
@pytest.mark.parametrize("wrapped", [lambda rule: rule, RobustOutlierSkip, RepeatUntil])
def test_a_decision_that_is_no_count_is_refused_and_the_rule_is_named(build, decision, must, wrapped):
    message = rf"^decide of {Scripted.__module__}.Scripted returned {decision!r}. It must return {must}.$"
    with pytest.raises(TypeError, match=message):
        build(repeat_scheduler=wrapped(Scripted(decision))).train()


def test_a_retry_after_running_out_of_memory_starts_clean(train):
    """`auto_find_batch_size` starts the loop again in the middle of a batch: nothing of it may be left."""
    model, forwards = tiny_llama(), []

    def run_out_once(module, args, output):
        forwards.append(1)
        if len(forwards) == 6:  # the first micro-batch of the third batch is in, the second fails
            raise RuntimeError("CUDA out of memory. Tried to allocate more than there is.")

    model.model.register_forward_hook(run_out_once)
    trainer = train(
        model=model,
        data=token_rows(24),
        repeat_scheduler=Scripted(1),
        auto_find_batch_size=True,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
    )
    first_try = 2
    outcomes = trainer.repeat_scheduler.outcomes[first_try:]
    assert [outcome.observation.batch for outcome in outcomes] == [
        0,
        1,
        2,
        3,
        4,
        5,
    ]  # 24 rows, now in twos, two a batch
    assert all(outcome.losses[0] < 4.5 for outcome in outcomes), (
        "a stale micro-batch would add its loss: log(64) is 4.16"
    )
    assert (trainer.ledger.batches, trainer.ledger.passes) == (6, 6)
    trace = list(read_lines(Path(trainer.args.output_dir, "abr_trace.jsonl")))
    assert [batch["step"] for batch in trace] == [1, 2, 3, 4, 5, 6]
