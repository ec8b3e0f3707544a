"""A run that is killed and resumed is the run that was not killed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from abr_trainer import ABRConfig
from abr_trainer.records import last_complete_checkpoint, read_lines
from abr_trainer.run_directory import find_checkpoint, set_aside_later_checkpoints
from abr_trainer.schedulers import (
    SCHEDULERS,
    ConstantScheduler,
    GradNormSkip,
    RobustOutlierSkip,
    ThresholdScheduler,
    get_repeat_scheduler,
)
from tests.conftest import Scripted, Stream, log_without_times, token_rows, weights
from tests.jobs import resumable

ROOT = Path(__file__).resolve().parents[1]


def trace_of(directory):
    return [{**batch, "seconds": None, "memory": None} for batch in read_lines(Path(directory, "abr_trace.jsonl"))]


def state_of(checkpoint):
    state = json.loads(Path(checkpoint, "abr_state.json").read_text())
    del state["ledger"]["seconds"]
    return state


@pytest.mark.slow
def test_kill_and_resume_is_bit_identical(tmp_path):
    whole = resumable(str(tmp_path / "whole"))
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "tests.jobs", "resumable", str(killed), "22"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=480, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert [batch["step"] for batch in trace_of(killed)] == list(range(1, 23)), "each batch is on disk before the next"
    # What a kill in the middle of saving leaves behind: a newer checkpoint without its end.
    shutil.copytree(killed / "checkpoint-15", killed / "checkpoint-20")
    (killed / "checkpoint-20" / "trainer_state.json").unlink()
    with open(killed / "abr_trace.jsonl", "a") as trace:
        trace.write('{"step": 23, "lo')

    resumed = resumable(str(killed), resume=True)

    assert torch.equal(weights(resumed.model), weights(whole.model))
    one, other = whole.optimizer.state_dict(), resumed.optimizer.state_dict()
    assert one["param_groups"] == other["param_groups"]
    for index, moments in one["state"].items():
        assert all(torch.equal(moments[name], other["state"][index][name]) for name in moments)
    assert trace_of(killed) == trace_of(tmp_path / "whole")
    last = Path(last_complete_checkpoint(killed)).name
    assert state_of(killed / last) == state_of(tmp_path / "whole" / last)
    assert log_without_times(resumed)[:-1] == log_without_times(whole)[:-1]
    # The run did what it is here to survive.
    reasons = {batch["reason"] for batch in trace_of(killed)}
    assert reasons >= {"threshold", "outlier"}
    assert max(batch["repeats"] for batch in trace_of(killed)) > 1


@pytest.mark.parametrize("save_steps", [2, 3])
def test_a_checkpoint_between_two_logs_changes_no_log(train, tmp_path, save_steps):
    options = {"logging_steps": 4, "save_strategy": "steps", "save_steps": save_steps}
    whole = train(repeat_scheduler=Scripted(2, 0, 1, 3), output_dir=str(tmp_path / "whole"), **options)
    resumed = train(
        repeat_scheduler=Scripted(2, 0, 1, 3),
        output_dir=str(tmp_path / "resumed"),
        resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{save_steps}"),
        **options,
    )
    assert log_without_times(resumed)[:-1] == log_without_times(whole)[:-1]
    assert torch.equal(weights(resumed.model), weights(whole.model))
    if not hasattr(resumed, "_initial_global_step"):
        return  # before 5.20 or so, Trainer divides the loss of its own batches by those of the whole run
    # As in Trainer, the mean loss of a call of `train` is that of its own batches.
    own = [outcome.losses[0] for outcome in resumed.repeat_scheduler.outcomes]
    assert resumed.state.log_history[-1]["train_loss"] == pytest.approx(sum(own) / len(own), rel=1e-5)


def test_a_finished_run_resumed_trains_no_more(train, tmp_path):
    options = {"repeat_scheduler": ConstantScheduler(repeats=2), "max_passes": 8, "save_strategy": "steps"}
    finished = train(output_dir=str(tmp_path / "run"), **options)
    again = train(output_dir=str(tmp_path / "run"), resume_from_checkpoint=True, **options)
    assert torch.equal(weights(again.model), weights(finished.model))
    assert again.ledger.passes == 8


@pytest.mark.parametrize("save_steps", [2, 3, 4, 10])
@pytest.mark.parametrize("has_length", [True, False])
def test_a_primer_goes_on_where_it_stopped(train, tmp_path, save_steps, has_length):
    # Three batches of the primer, then six a round of the training set.
    rows = token_rows(12)
    options = {
        "data": rows if has_length else Stream(rows),
        "repeat_scheduler": ConstantScheduler(repeats=2),
        "primer_batches": 3,
        "max_steps": 12,
        "save_strategy": "steps",
        "save_steps": save_steps,
        "trainer_options": {"primer_dataset": token_rows(6, seed=4)},
    }
    whole = train(output_dir=str(tmp_path / "whole"), **options)
    checkpoint = str(tmp_path / "whole" / f"checkpoint-{save_steps}")
    resumed = train(output_dir=str(tmp_path / "resumed"), resume_from_checkpoint=checkpoint, **options)
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert log_without_times(resumed)[:-1] == log_without_times(whole)[:-1]


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_every_rule_goes_on_as_if_nothing_had_happened(train, tmp_path, name):
    options = {"data": token_rows(80), "save_strategy": "steps", "save_steps": 50, "max_steps": 70}

    options_of_rule = {"warmup": 20} if name == "learnable" else {}  # by its default it would not decide by itself yet

    def rule():
        return RobustOutlierSkip(GradNormSkip(get_repeat_scheduler(name, **options_of_rule), sigmas=2.0), sigmas=2.0)

    whole = train(repeat_scheduler=rule(), output_dir=str(tmp_path / "whole"), **options)
    checkpoint = str(tmp_path / "whole" / "checkpoint-50")
    resumed = train(
        repeat_scheduler=rule(), output_dir=str(tmp_path / "resumed"), resume_from_checkpoint=checkpoint, **options
    )
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert resumed.repeat_scheduler.state_dict() == whole.repeat_scheduler.state_dict()
    assert resumed.ledger.state_dict() | {"seconds": 0} == whole.ledger.state_dict() | {"seconds": 0}


def test_another_scheduler_starts_with_an_empty_history(train, tmp_path, caplog):
    options = {"save_strategy": "steps", "save_steps": 3}
    train(repeat_scheduler=ThresholdScheduler(), output_dir=str(tmp_path / "run"), **options)
    checkpoint = str(tmp_path / "run" / "checkpoint-3")
    resumed = train(repeat_scheduler=ConstantScheduler(), resume_from_checkpoint=checkpoint, **options)
    assert "was written under ThresholdScheduler(loss_threshold=1.0, max_repeats=5" in caplog.text
    assert resumed.ledger.batches == 6


def test_a_rule_of_ones_own_keeps_its_state_inside_an_outlier_rule(train, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4}
    path = "tests.conftest:Counting"
    whole = train(config_cls=config_with(path), output_dir=str(tmp_path / "whole"), **options)
    resumed = train(
        config_cls=config_with(path),
        output_dir=str(tmp_path / "resumed"),
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"),
        **options,
    )
    assert resumed.repeat_scheduler.state_dict() == whole.repeat_scheduler.state_dict()
    assert torch.equal(weights(resumed.model), weights(whole.model))


def config_with(scheduler):
    return lambda **config: ABRConfig(repeat_scheduler=scheduler, **config)


@pytest.mark.parametrize("save_steps", [4, 5, 7])
def test_a_stream_in_its_second_round_goes_on_where_it_stopped(train, tmp_path, save_steps):
    # 10 rows are 5 batches: step 7 is the second batch of the second round, step 5 the last of the first.
    options = {"data": Stream(token_rows(10)), "max_steps": 9, "save_strategy": "steps", "save_steps": save_steps}
    whole = train(repeat_scheduler=Scripted(1), output_dir=str(tmp_path / "whole"), **options)
    resumed = train(
        repeat_scheduler=Scripted(1),
        output_dir=str(tmp_path / "resumed"),
        resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{save_steps}"),
        **options,
    )
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert resumed.state.epoch == whole.state.epoch


def test_a_budget_is_not_guessed(train, tmp_path):
    options = {"repeat_scheduler": Scripted(2), "max_passes": 8, "save_strategy": "steps", "save_steps": 2}
    train(output_dir=str(tmp_path / "run"), save_only_model=True, **options)
    with pytest.raises(ValueError, match="has no abr_state.json: what it spent of --max_passes is unknown"):
        train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"), **options)


def test_a_state_that_is_not_json_is_told(build):
    class Odd(Scripted):
        def state_dict(self):
            return {"mean": float("nan")}

    with pytest.raises(TypeError, match="The state_dict of .*Odd.* is not JSON"):
        build(repeat_scheduler=Odd(1), save_strategy="steps", save_steps=1).train()


def test_going_back_sets_later_checkpoints_aside(train, tmp_path):
    options = {"repeat_scheduler": Scripted(1), "save_strategy": "steps", "save_steps": 2}
    trainer = train(output_dir=str(tmp_path / "run"), **options)
    earlier = str(tmp_path / "run" / "checkpoint-2")
    set_aside_later_checkpoints(trainer.args, earlier)
    assert last_complete_checkpoint(tmp_path / "run") == earlier
    assert (tmp_path / "run" / "abandoned-checkpoint-6" / "abr_state.json").exists()


def test_a_checkpoint_of_stock_trainer_is_a_pass_a_batch(train, tmp_path, caplog):
    from transformers import Trainer, TrainingArguments

    options = {"save_strategy": "steps", "save_steps": 3}
    train(trainer_cls=Trainer, config_cls=TrainingArguments, output_dir=str(tmp_path / "stock"), **options)
    checkpoint = str(tmp_path / "stock" / "checkpoint-3")
    resumed = train(repeat_scheduler=Scripted(2), resume_from_checkpoint=checkpoint, **options)
    assert "taking each of its 3 batches for one ordinary pass" in caplog.text
    assert resumed.ledger.passes == 3 + 3 * 2


def test_checkpoints_hold_json_and_no_pickle_of_ours(train, tmp_path):
    def files(scheduler, config_cls=None):
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        options = {} if config_cls is None else {"config_cls": config_cls}
        train(repeat_scheduler=scheduler, output_dir=str(directory), save_strategy="steps", save_steps=3, **options)
        return {path.name for path in (directory / "checkpoint-3").iterdir()}

    from transformers import TrainingArguments

    assert files(Scripted(1)) - files(None, TrainingArguments) == {"abr_state.json"}


@pytest.mark.parametrize(("given", "expected"), [(None, None), ("False", None), ("true", "checkpoint-3")])
def test_the_script_finds_its_checkpoint(build, tmp_path, given, expected):
    trainer = build(
        repeat_scheduler=Scripted(1), save_strategy="steps", save_steps=3, max_steps=3, resume_from_checkpoint=given
    )
    trainer.train()
    found = find_checkpoint(trainer.args)
    assert (found and Path(found).name) == expected


def test_a_checkpoint_that_is_not_there_is_told(build, tmp_path):
    with pytest.raises(ValueError, match="--resume_from_checkpoint true: there is no complete checkpoint in"):
        find_checkpoint(build(resume_from_checkpoint="true").args)
    with pytest.raises(ValueError, match="is not a complete checkpoint"):
        find_checkpoint(build(resume_from_checkpoint=str(tmp_path)).args)
