"""Any plan of decisions, dropped rows, NaN, batch sizes and budget: the trainer does what the laws say."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerCallback

from abr_trainer import ABRConfig, ABRTrainer
from abr_trainer.records.files import TRACE_NAME, read_lines
from abr_trainer.training.trainer import TooManySkips
from tests.conftest import QUIET, VOCABULARY, Scripted, tiny_llama, weights
from tests.properties import examples
from tests.training.interpreter import LENGTH, Interpreter, Plan, data_of
from tests.training.test_rows import Named

LEARNING_RATE, WEIGHT_DECAY = 1e-2, 0.1


def small_llama() -> Any:
    return tiny_llama(hidden_size=8, intermediate_size=16, num_hidden_layers=1, max_position_embeddings=LENGTH)


@st.composite
def plans(draw: Callable[[Any], Any]) -> Plan:
    """Draw runs of up to three batches of up to nine rows in an epoch, and of one or two epochs."""
    micro_batch, accumulation = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    size = micro_batch * accumulation
    targets = draw(
        st.lists(st.sampled_from([LENGTH - 1, LENGTH - 1, 0, 1, 3]), min_size=1, max_size=min(3 * size + 1, 20))
    )
    batches = 2 * -(-len(targets) // size)
    places = st.tuples(st.integers(0, batches), st.integers(0, size - 1))
    has_row_rule = draw(st.booleans())
    dropped = draw(st.frozensets(places, max_size=5)) if has_row_rule else None
    passes = st.sampled_from([0, 0, 1, 2])
    plan = Plan(
        tuple(targets),
        micro_batch,
        accumulation,
        epochs=draw(st.integers(1, 2)),
        decisions=tuple(draw(st.lists(st.sampled_from([1, 0, 2, 3]), min_size=1, max_size=4))),
        dropped=dropped,
        budget=draw(st.none() | st.integers(1, 12)),
        schedule=draw(st.sampled_from(["linear", "cosine", "constant"])),
        warmup=draw(st.sampled_from([0, 0, 2])),
        max_grad_norm=draw(st.sampled_from([1.0, 0.0, 0.1])),
        logging_steps=draw(st.integers(1, 3)),
        most_skips=draw(st.sampled_from([1000, 1000, 2])),
    )
    broken = draw(st.frozensets(st.tuples(places, passes), max_size=3))
    return Plan(**{**vars(plan), "broken": frozenset(filter(None, (can_break(plan, each) for each in broken)))})


def can_break(plan: Plan, each: tuple[tuple[int, int], int]) -> tuple[int, int, int] | None:
    """Return what breaks, or None if that would be a row without part in the loss: see the page on promises."""
    (batch, position), number = each
    rows = plan.rows_of(batch)
    counts = position < len(rows) and plan.targets[rows[position]] > 0
    return (
        (batch, position, number) if counts and (not number or (batch, position) not in (plan.dropped or ())) else None
    )


class Watch(TrainerCallback):
    """Breaks rows as planned, and notes the learning rate of each update."""

    def __init__(self, plan: Plan, model: Any) -> None:
        self.plan = plan
        self.batch = self.forwards = 0
        self.rates: list[float] = []
        model.model.embed_tokens.register_forward_hook(self._break)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.batch, self.forwards = state.global_step, 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"]):
            self.rates.append(optimizer.param_groups[0]["lr"])

    def _break(self, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        number = self.forwards // len(self.plan.micro_batches_of(self.batch))
        self.forwards += 1
        first = self.plan.rows_of(self.batch).start
        is_broken = [(self.batch, row - first, number) in self.plan.broken for row in args[0][:, 0].tolist()]
        return output.masked_fill(torch.tensor(is_broken)[:, None, None], math.nan)


def carried_out(plan: Plan, directory: str) -> tuple[ABRTrainer, Scripted, Watch, bool]:
    """Train by a plan, and tell whether it ended for too many skips."""
    model, rule = small_llama(), Scripted(*plan.decisions)
    watch = Watch(plan, model)
    trainer = ABRTrainer(
        model=model,
        args=ABRConfig(
            output_dir=directory,
            per_device_train_batch_size=plan.micro_batch,
            gradient_accumulation_steps=plan.accumulation,
            num_train_epochs=plan.epochs,
            max_passes=plan.budget,
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=plan.max_grad_norm,
            lr_scheduler_type=plan.schedule,
            warmup_steps=plan.warmup,
            logging_steps=plan.logging_steps,
            max_consecutive_skips=plan.most_skips,
            optim="adamw_torch",
            save_strategy="no",
            train_sampling_strategy="sequential",
            **QUIET,
        ),
        train_dataset=data_of(plan, VOCABULARY),
        repeat_scheduler=rule,
        row_rule=None if plan.dropped is None else Named(*plan.dropped),
        callbacks=[watch],
    )
    try:
        trainer.train()
    except TooManySkips:
        return trainer, rule, watch, True
    return trainer, rule, watch, False


def close(values: Any) -> Any:
    return pytest.approx(values, rel=1e-5, abs=1e-7, nan_ok=True)


def check(plan: Plan) -> None:
    """Compare a run with what the interpreter makes of its plan."""
    told = Interpreter(plan, small_llama(), LEARNING_RATE, WEIGHT_DECAY).run()
    with tempfile.TemporaryDirectory() as directory:
        trainer, rule, watch, stopped = carried_out(plan, directory)
        trace = list(read_lines(Path(directory, TRACE_NAME)))
    assert stopped == told.stopped
    assert torch.equal(weights(trainer.model), weights(told.model)), "bit by bit"
    ledger = trainer.ledger
    counted = {name: getattr(ledger, name) for name in vars(told.counts)}
    assert counted == vars(told.counts)
    assert watch.rates == close(told.rates)
    assert len(rule.outcomes) == len(told.done) == len(trace)
    for outcome, line, expected in zip(rule.outcomes, trace, told.done, strict=True):
        assert (outcome.repeats, outcome.reason, outcome.rows, outcome.rows_dropped) == (
            expected.repeats,
            expected.reason,
            expected.rows,
            expected.rows_dropped,
        )
        assert outcome.observation.loss == close(expected.loss)
        assert list(outcome.losses) == close(list(expected.losses))
        assert outcome.observation.progress == close(expected.progress)
        assert (line["repeats"], line["reason"]) == (expected.repeats, expected.reason)
        assert line["learning_rate"] == close(expected.learning_rate)
    logged = [logs for logs in trainer.state.log_history if "loss" in logs]
    assert [{name: logs.get(name, 0) for name in told.log[0]} for logs in logged] == [close(logs) for logs in told.log]
    if not stopped:
        assert trainer.state.log_history[-1].get("train_loss", math.nan) == close(told.mean_loss)
        assert trainer.state.global_step == told.counts.batches


@examples(20)
@given(plans())
def test_any_run_does_what_the_laws_say(plan):
    check(plan)
