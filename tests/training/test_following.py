"""A run that follows the trace of another one is that run, to the last bit."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import set_seed

from abr_trainer import ABRConfig
from abr_trainer.records.files import read_lines
from abr_trainer.report.why import explain_batch
from abr_trainer.schedulers import ConstantScheduler, FollowScheduler, RobustOutlierSkip
from tests.conftest import broken_row, tiny_llama, token_rows, weights, without_seconds
from tests.jobs import StopAfter
from tests.schedulers.streams import batch_of_trace, trace_in
from tests.training.test_clock import Slow

pytestmark = pytest.mark.slow

DONE = ("step", "progress", "passes", "loss", "losses", "repeats", "learning_rate", "replayed", "rows", "rows_dropped")


def trace_of(directory):
    return list(read_lines(Path(directory, "abr_trace.jsonl")))


def by(rule, **fields):
    """A config of a run by this rule."""
    return functools.partial(ABRConfig, repeat_scheduler=rule, **fields)


def assert_same_run(first, second):
    """They have the same weights, spent the same, and did the same with each batch."""
    assert torch.equal(weights(first.model), weights(second.model))
    assert without_seconds(first.ledger.state_dict()) == without_seconds(second.ledger.state_dict())
    done, followed = (
        [{name: line.get(name) for name in DONE} for line in trace_of(trainer.args.output_dir)]
        for trainer in (first, second)
    )
    assert followed == done


def some_rows(count):
    """Rows of which one batch has no targets."""
    rows = token_rows(count)
    third = count // 3 // 4 * 4
    return rows[:third] + [broken_row(row) for row in rows[third : third + 4]] + rows[third + 4 :]


def reasons(trace):
    return {line["reason"] for line in trace}


def repeats(trace):
    return {line["repeats"] for line in trace}


RULES = {
    "wait": ({}, {}, lambda trace: max(repeats(trace)) > 1),
    "abr": (
        {"loss_threshold": 1.3},
        {"max_passes": 71},
        lambda trace: reasons(trace) >= {"threshold", "budget", "no targets"},
    ),
    "gain": (  # which is asked for five passes, and ends some of them early
        {"repeat_scheduler_kwargs": {"transfer": 0.5, "probe_every": 2}},
        {},
        lambda trace: len(repeats(trace)) > 3,
    ),
    "replay": (
        {"repeat_scheduler_kwargs": {"quantile": 0.4, "spacing": 3, "buffer_size": 4}},
        {"max_passes": 45},
        lambda trace: sum("replayed" in line for line in trace) > 3,
    ),
    "learnable": ({"repeat_scheduler_kwargs": {"warmup": 10}}, {}, lambda trace: len(repeats(trace)) > 2),
    "random": ({"repeat_until": 0.6}, {}, lambda trace: reasons(trace) >= {"random", "tail"}),
    "window": (
        {"outlier_sigmas": 0.2},
        {"max_passes": 40},
        lambda trace: reasons(trace) >= {"window", "outlier", "no targets"},
    ),
    "fixed": (
        {"skip_grad_norm": 0.5, "skip_outliers": "none"},
        {"skip_rows": "robust", "row_sigmas": 0.5},
        lambda trace: "gradient" in reasons(trace) and any(line.get("rows_dropped") for line in trace),
    ),
}
"""By rule: its own flags, flags of both runs, and what must be in the trace."""


@pytest.mark.parametrize(("rule", "accumulation"), list(zip(RULES, [1, 2] * len(RULES), strict=False)))
def test_a_run_that_is_followed_is_made_again_to_the_last_bit(train, tmp_path, rule, accumulation):
    own, shared, shows = RULES[rule]
    rows = some_rows((24 if rule == "wait" else 80) * accumulation)
    shared = {"gradient_accumulation_steps": accumulation, **shared}
    data = Slow(rows, seconds=0.1 / accumulation) if rule == "wait" else rows
    first = train(config_cls=by(rule, **own), data=data, output_dir=str(tmp_path / "first"), **shared)
    trace = trace_of(tmp_path / "first")
    assert shows(trace), [(line["reason"], line["repeats"]) for line in trace]
    follow = by("follow", trace=str(tmp_path / "first"))
    second = train(config_cls=follow, data=rows, output_dir=str(tmp_path / "second"), **shared)
    assert_same_run(first, second)
    assert reasons(trace_of(tmp_path / "second")) <= {"followed", "no targets", "rows"}
    assert second.remark is None


def adapted():
    """A model with LoRA and dropout."""
    set_seed(1)
    options = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.3, task_type="CAUSAL_LM")
    return get_peft_model(tiny_llama(), options)


def test_an_adapter_with_dropout_is_trained_the_same(train, tmp_path):
    options = {"data": token_rows(40), "skip_outliers": "none"}
    first = train(model=adapted(), config_cls=by("random"), output_dir=str(tmp_path / "first"), **options)
    follow = by("follow", trace=str(tmp_path / "first" / "abr_trace.jsonl"))
    second = train(model=adapted(), config_cls=follow, output_dir=str(tmp_path / "second"), **options)
    assert_same_run(first, second)


@pytest.fixture
def stopped(train, tmp_path):
    """A run by `replay`, and one that follows it and ended after 15 of its 40 batches, with a checkpoint."""
    rule = by("replay", repeat_scheduler_kwargs={"quantile": 0.4, "spacing": 5})
    first = train(config_cls=rule, data=token_rows(80), output_dir=str(tmp_path / "first"))
    options = {"config_cls": by("follow", trace=str(tmp_path / "first")), "data": token_rows(80)}
    options |= {"output_dir": str(tmp_path / "second"), "save_strategy": "steps", "save_steps": 100}
    half = train(trainer_options={"callbacks": [StopAfter(15)]}, **options)
    assert half.ledger.batches == 15
    assert half.repeat_scheduler.held(), "something is to be replayed after the checkpoint"
    return first, options


def test_a_run_that_follows_goes_on_from_a_checkpoint(train, stopped):
    first, options = stopped
    assert_same_run(first, train(resume_from_checkpoint=True, **options))


def test_it_does_not_go_on_if_the_trace_has_changed(train, tmp_path, stopped):
    _, options = stopped
    lines = trace_of(tmp_path / "first")
    lines[7]["losses"] *= 2
    lines[7]["repeats"] = 2
    trace_in(tmp_path / "first", lines)
    with pytest.raises(ValueError, match="has changed: its first 15 batches are not those that this run has followed"):
        train(resume_from_checkpoint=True, **options)


def test_a_checkpoint_holds_nothing_of_the_trace(tmp_path, stopped):
    state = json.loads((tmp_path / "second" / "checkpoint-15" / "abr_state.json").read_text())["repeat_scheduler"]
    assert state["state"].keys() == {"batches", "differs", "followed"}


def test_a_run_ends_with_one_line_where_its_trace_ends(train, tmp_path):
    trace_in(tmp_path / "short", [batch_of_trace(step) for step in range(1, 5)])
    with pytest.raises(ValueError, match=r"short has 4 batches, and this run has a batch 5\.") as caught:
        train(config_cls=by("follow", trace=str(tmp_path / "short")))
    assert "\n" not in str(caught.value)


def test_a_run_says_that_it_is_another_one(train, tmp_path):
    train(config_cls=by("random"), output_dir=str(tmp_path / "first"))
    follow = by("follow", trace=str(tmp_path / "first"))
    other = train(config_cls=follow, data=token_rows(12, seed=5), output_dir=str(tmp_path / "second"))
    assert "the losses differ from batch 1 on" in other.remark
    assert [line["repeats"] for line in trace_of(tmp_path / "second")] == [
        line["repeats"] for line in trace_of(tmp_path / "first")
    ]


@pytest.mark.parametrize("wrap", [lambda rule: rule, lambda rule: RobustOutlierSkip(rule)], ids=["bare", "wrapped"])
def test_the_trace_that_a_run_writes_is_not_followed(train, build, tmp_path, wrap):
    train(repeat_scheduler=ConstantScheduler(2))
    written = (tmp_path / "run" / "abr_trace.jsonl").read_text()
    with pytest.raises(ValueError, match="where this run writes its own trace. Use another --output_dir, or move the"):
        build(repeat_scheduler=wrap(FollowScheduler(str(tmp_path / "run"))))
    assert (tmp_path / "run" / "abr_trace.jsonl").read_text() == written


def test_what_a_run_follows_is_recorded_and_explained(train, tmp_path):
    train(repeat_scheduler=ConstantScheduler(2), output_dir=str(tmp_path / "first"))
    train(config_cls=by("follow", trace=str(tmp_path / "first")), output_dir=str(tmp_path / "second"))
    record = json.loads((tmp_path / "second" / "run.json").read_text())
    assert record["arguments"]["repeat_scheduler"] == "follow"
    assert record["arguments"]["trace"] == str(tmp_path / "first")
    said = explain_batch(tmp_path / "second", 3)
    assert said[0] == "Batch 3 was trained on 2 times: the run follows the trace of another one, which says so."
    assert any("FollowScheduler(trace=" in line for line in said)
