"""A run that is killed and resumed is the run that was not killed."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import EarlyStoppingCallback, MixtralConfig, MixtralForCausalLM, TrainerCallback, set_seed

from abr_trainer import ABRConfig, ABRTrainer
from abr_trainer.cli.run_directory import find_checkpoint, set_aside_later_checkpoints
from abr_trainer.records.files import CHECKSUMS_NAME, flaw_of, last_complete_checkpoint, last_state, read_lines
from abr_trainer.schedulers import (
    SCHEDULERS,
    ConstantScheduler,
    GradNormSkip,
    RobustOutlierSkip,
    ThresholdScheduler,
)
from abr_trainer.training.checkpoints import UnfitCheckpoint, newest_checkpoint, refuse_damaged, sound_checkpoint
from abr_trainer.training.tracking import PerplexityCallback
from tests.conftest import (
    QUIET,
    Scripted,
    Stream,
    log_without_times,
    tiny_llama,
    token_rows,
    weights,
    without_seconds,
)
from tests.jobs import resumable
from tests.schedulers.streams import rule_named

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def trace_of(directory):
    return [{**without_seconds(batch), "memory": None} for batch in read_lines(Path(directory, "abr_trace.jsonl"))]


def state_of(checkpoint):
    state = json.loads(Path(checkpoint, "abr_state.json").read_text())
    state["ledger"] = without_seconds(state["ledger"])
    state["log"]["window"] = without_seconds(state["log"]["window"])
    del state["waiting"]  # of the clock, and without the first batch of each start
    return state


@pytest.mark.long  # tests/benchmarks/test_kills.py kills in more places
@pytest.mark.launches
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


STOPS_EARLY = {
    "metric_for_best_model": "perplexity",
    "load_best_model_at_end": True,
    "do_eval": True,
    "num_train_epochs": 6,  # of three batches
    "learning_rate": 5e-2,
    "data": token_rows(6),
    "save_strategy": "epoch",
}
"""A run that overfits at once, in which no evaluation is better than the first."""


def stopping_early(train, patience=2, callback=None, **options):
    if callback is None:
        options["early_stopping_patience"] = patience
    own = {"eval_dataset": token_rows(8, seed=5), "callbacks": [callback] if callback else []}
    return train(**{**STOPS_EARLY, "trainer_options": own, **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"save_strategy": "steps", "save_steps": 100, "eval_strategy": "steps", "eval_steps": 2},
        {"save_strategy": "best", "eval_passes": 2},
        {"callback": True},
    ],
    ids=["epochs", "no save is due", "by passes", "stock callback"],
)
def test_a_run_that_stopped_early_stays_so_when_it_is_resumed(train, caplog, options):
    def callback():
        return {"callback": EarlyStoppingCallback(2)} if "callback" in options else {}

    stopped = stopping_early(train, **{**options, **callback()})
    assert stopped.state.global_step < 18
    for _ in range(2):
        again = stopping_early(train, resume_from_checkpoint=True, **{**options, **callback()})
        assert again.state.global_step == stopped.state.global_step
        assert torch.equal(weights(again.model), weights(stopped.model))
        assert log_without_times(again)[:-1] == log_without_times(stopped)[:-1]
        assert "2 evaluations in a row were not better, as many as --early_stopping_patience. Nothing" in caplog.text
        assert "train_loss" not in again.state.log_history[-1], "there is none"


def test_with_more_patience_a_run_that_stopped_early_goes_on(train, tmp_path):
    stopping_early(train, output_dir=str(tmp_path / "stopped"))
    whole = stopping_early(train, patience=4, output_dir=str(tmp_path / "whole"))
    resumed = stopping_early(train, patience=4, output_dir=str(tmp_path / "stopped"), resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 15
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert log_without_times(resumed)[:-1] == log_without_times(whole)[:-1]


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_the_end_of_max_steps_in_the_middle_of_an_epoch_stays_the_end(train, tmp_path, caplog, strategy):
    options = {"output_dir": str(tmp_path / "run"), "save_strategy": strategy, "lr_scheduler_type": "constant"}
    options |= {"eval_strategy": strategy, "eval_steps": 2, "trainer_options": {"eval_dataset": token_rows(2)}}
    finished = train(max_steps=4, **options)
    for _ in range(2):
        again = train(max_steps=4, resume_from_checkpoint=True, **options)
        assert again.state.global_step == 4
        assert torch.equal(weights(again.model), weights(finished.model))
        assert log_without_times(again)[:-1] == log_without_times(finished)[:-1]
    assert "--max_steps 4 is reached. Nothing is trained" in caplog.text
    longer = train(max_steps=9, resume_from_checkpoint=True, **options)
    whole = train(max_steps=9, **{**options, "output_dir": str(tmp_path / "whole")})
    assert torch.equal(weights(longer.model), weights(whole.model))


def test_the_end_of_all_epochs_and_of_a_budget_stay_the_end(train, tmp_path, caplog):
    epochs = {"output_dir": str(tmp_path / "epochs"), "save_strategy": "epoch"}
    train(**epochs)
    again = train(**epochs, resume_from_checkpoint=True)
    assert (again.state.global_step, "all epochs are done" in caplog.text) == (6, True)
    assert train(**epochs, num_train_epochs=2, resume_from_checkpoint=True).state.global_step == 12
    # After each epoch an evaluation, and so after the budget, too, but not once more for each time it is resumed.
    budget = {"output_dir": str(tmp_path / "budget"), "save_strategy": "epoch", "eval_strategy": "epoch"}
    budget |= {"repeat_scheduler": ConstantScheduler(2), "trainer_options": {"eval_dataset": token_rows(2)}}
    finished = train(**budget, max_passes=8)
    again = train(**budget, max_passes=8, resume_from_checkpoint=True)
    assert log_without_times(again)[:-1] == log_without_times(finished)[:-1]
    assert "--max_passes 8 are spent" in caplog.text
    assert train(**budget, max_passes=10, resume_from_checkpoint=True).ledger.passes == 10


def test_what_a_callback_has_stopped_goes_on_and_says_so(train, tmp_path, caplog):
    class StopsAtThree(TrainerCallback):
        """As one that watches the clock, or a signal."""

        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = control.should_training_stop = state.global_step == 3

    own = {"trainer_options": {"callbacks": [StopsAtThree()]}, "save_strategy": "steps"}
    assert train(**own).state.global_step == 3
    assert train(**own, resume_from_checkpoint=True).state.global_step == 6
    assert "checkpoint-3. It goes on." in caplog.text


def test_a_run_that_had_come_to_its_end_and_gets_more_epochs_was_not_stopped(train, caplog):
    train(save_strategy="epoch")
    assert train(save_strategy="epoch", num_train_epochs=2, resume_from_checkpoint=True).state.global_step == 12
    assert "was stopped" not in caplog.text


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


@pytest.mark.parametrize("saves", [{"save_strategy": "steps", "save_steps": 1}, {"save_strategy": "epoch"}])
@pytest.mark.parametrize("logs", [{"logging_steps": 4}, {"logging_strategy": "epoch"}])
@pytest.mark.parametrize("has_length", [True, False])
def test_what_the_end_of_an_epoch_calls_for_is_done_once(train, tmp_path, saves, logs, has_length):
    # A primer of three batches and two rounds of six. With save_steps, a checkpoint lies before each end of them.
    rows = token_rows(12)
    options = {
        "data": rows if has_length else Stream(rows),
        "repeat_scheduler": ConstantScheduler(repeats=2),
        "primer_batches": 3,
        "max_steps": 15,
        "eval_strategy": "epoch",
        "trainer_options": {"primer_dataset": token_rows(6, seed=4), "eval_dataset": token_rows(4, seed=5)},
        **saves,
        **logs,
    }
    whole = train(output_dir=str(tmp_path / "whole"), **options)
    assert sum("eval_loss" in logs for logs in whole.state.log_history) == 3
    for step in (3, 9, 15):
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        resumed = train(output_dir=str(tmp_path / "resumed"), resume_from_checkpoint=str(checkpoint), **options)
        assert log_without_times(resumed)[:-1] == log_without_times(whole)[:-1]
        assert torch.equal(weights(resumed.model), weights(whole.model))


def test_a_run_that_was_ended_by_its_budget_is_evaluated_once(train, tmp_path):
    options = {"repeat_scheduler": ConstantScheduler(2), "max_passes": 8, "save_strategy": "steps", "save_steps": 1}
    options |= {"eval_strategy": "epoch", "trainer_options": {"eval_dataset": token_rows(4, seed=5)}}
    whole = train(output_dir=str(tmp_path / "whole"), **options)
    checkpoint = str(tmp_path / "whole" / "checkpoint-4")
    resumed = train(output_dir=str(tmp_path / "resumed"), resume_from_checkpoint=checkpoint, **options)
    assert not resumed.has_trained
    assert log_without_times(resumed)[:-1] == log_without_times(whole)[:-1]
    assert torch.equal(weights(resumed.model), weights(whole.model))


ELSEWHERE = {"wait", "kl"}
"""Rules that depend on clocks, or are for trainers that generate; they have such a test of their own."""


@pytest.mark.parametrize("name", sorted(SCHEDULERS.keys() - ELSEWHERE))
def test_every_rule_goes_on_as_if_nothing_had_happened(train, tmp_path, name):
    options = {"data": token_rows(80), "save_strategy": "steps", "save_steps": 50, "max_steps": 70}

    options_of_rule = {"warmup": 20} if name == "learnable" else {}  # by its default it would not decide by itself yet

    def rule():
        named = rule_named(name, tmp_path, **options_of_rule)
        return RobustOutlierSkip(GradNormSkip(named, sigmas=2.0), sigmas=2.0)

    whole = train(repeat_scheduler=rule(), output_dir=str(tmp_path / "whole"), **options)
    checkpoint = str(tmp_path / "whole" / "checkpoint-50")
    resumed = train(
        repeat_scheduler=rule(), output_dir=str(tmp_path / "resumed"), resume_from_checkpoint=checkpoint, **options
    )
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert resumed.repeat_scheduler.state_dict() == whole.repeat_scheduler.state_dict()
    assert without_seconds(resumed.ledger.state_dict()) == without_seconds(whole.ledger.state_dict())


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


@pytest.mark.parametrize("budget", ["max_passes", "max_seconds"])
def test_a_budget_is_not_guessed(train, tmp_path, budget):
    options = {"repeat_scheduler": Scripted(2), "save_strategy": "steps", "save_steps": 2}
    train(output_dir=str(tmp_path / "run"), max_steps=2, **options)
    for name in ("abr_state.json", CHECKSUMS_NAME):  # stock Trainer writes neither
        (tmp_path / "run" / "checkpoint-2" / name).unlink()
    with pytest.raises(ValueError, match=f"has no abr_state.json: what it spent of --{budget} is unknown"):
        train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"), **options, **{budget: 8})


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


def test_checkpoints_that_were_cut_twice_at_the_same_step_are_both_set_aside(train, tmp_path):
    trainer = train(
        repeat_scheduler=Scripted(1), output_dir=str(tmp_path / "run"), save_strategy="steps", save_steps=2
    )
    for number in (1, 2):
        cut = tmp_path / "run" / "checkpoint-4"
        cut.mkdir(exist_ok=True)
        (cut / "killed").write_text(str(number))
        set_aside_later_checkpoints(trainer.args, str(tmp_path / "run" / "checkpoint-2"))
    aside = sorted(path.parent.name for path in (tmp_path / "run").glob("*/killed"))
    assert aside == ["abandoned-checkpoint-4", "abandoned-checkpoint-4.2"]


class Killed(BaseException):
    """What no one catches."""


def test_a_checkpoint_that_is_saved_anew_is_there_at_any_time(train, tmp_path, monkeypatch):
    # The evaluation at the end of an epoch is the best, which is saved over the checkpoint of the last batch.
    options = {**STOPS_EARLY, "num_train_epochs": 1, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 1}
    options |= {"eval_strategy": "epoch", "trainer_options": {"eval_dataset": token_rows(8, seed=5)}}
    whole = train(output_dir=str(tmp_path / "whole"), **options)
    assert whole.state.best_global_step == 3
    save, saved = torch.save, []

    def killed_in_the_second(what, path, *args, **kwargs):
        if str(path).endswith("optimizer.pt"):
            saved.append(path)
            if len(saved) == 2:
                raise Killed
        save(what, path, *args, **kwargs)

    run = tmp_path / "run"
    monkeypatch.setattr(torch, "save", killed_in_the_second)
    with pytest.raises(Killed):
        train(output_dir=str(run), **options)
    monkeypatch.setattr(torch, "save", save)
    assert {path.name for path in run.glob("*checkpoint-*")} == {"checkpoint-3", "_replaced-checkpoint-3"}
    assert last_complete_checkpoint(run) == str(run / "_replaced-checkpoint-3"), "a report may read it"
    resumed = train(output_dir=str(run), resume_from_checkpoint=True, **options)
    assert {path.name for path in run.glob("*checkpoint-*")} == {"checkpoint-3"}
    assert log_without_times(resumed)[:-1] == log_without_times(whole)[:-1]
    assert resumed.state.best_global_step == 3
    assert torch.equal(weights(resumed.model), weights(whole.model))


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

    assert files(Scripted(1)) - files(None, TrainingArguments) == {"abr_state.json", CHECKSUMS_NAME}


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


# ---- Damaged checkpoints, and those of another run ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of six batches with a checkpoint after each second one."""
    directory = tmp_path_factory.mktemp("saved")
    args = ABRConfig(
        str(directory),
        per_device_train_batch_size=2,
        num_train_epochs=1,
        save_strategy="steps",
        save_steps=2,
        repeat_scheduler="fixed",
        **QUIET,
    )
    ABRTrainer(model=tiny_llama(), args=args, train_dataset=token_rows(12)).train()
    return directory


@pytest.fixture
def run(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def cut(path, keeps):
    path.write_bytes(path.read_bytes()[: int(keeps * path.stat().st_size)])


FILES = ["optimizer.pt", "rng_state.pth", "scheduler.pt", "abr_state.json", "trainer_state.json", "model.safetensors"]


@pytest.mark.parametrize("keeps", [0, 0.5, 0.99])
@pytest.mark.parametrize("name", [*FILES, "config.json"])
def test_a_damaged_file_is_named_and_the_newest_whole_checkpoint_is_taken(run, caplog, name, keeps):
    cut(run / "checkpoint-6" / name, keeps)
    whole = str(run / "checkpoint-4")
    assert newest_checkpoint(str(run)) == whole
    assert f"checkpoint-6 is passed over: {name} is " in caplog.text
    assert f"The run goes on from {whole}." in caplog.text
    offered = rf"checkpoint-6 is not a complete checkpoint: {name} is .*beside it is {whole}\."
    with pytest.raises(UnfitCheckpoint, match=offered):
        refuse_damaged(str(run / "checkpoint-6"))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(run, name):
    (run / "checkpoint-6" / name).unlink()
    assert flaw_of(run / "checkpoint-6") == f"{name} is missing"


def test_a_file_full_of_zeros_is_damaged(run):
    """As a power cut leaves one: of the right length, and never written."""
    for name in ("optimizer.pt", "model.safetensors", "rng_state.pth"):
        shutil.copytree(run / "checkpoint-4", run / "checkpoint-6", dirs_exist_ok=True)
        path = run / "checkpoint-6" / name
        path.write_bytes(bytes(path.stat().st_size))
        assert flaw_of(run / "checkpoint-6") == f"{name} is damaged"


@pytest.mark.parametrize("name", [*FILES, "config.json"])
@pytest.mark.parametrize("share", [0.5, 0.98])
def test_a_bit_that_has_flipped_is_noticed(run, caplog, name, share):
    path = run / "checkpoint-6" / name
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 4
    path.write_bytes(content)
    assert newest_checkpoint(str(run)) == str(run / "checkpoint-4")
    assert re.search(rf"checkpoint-6 is passed over: {name} (is damaged|was changed after it was saved)", caplog.text)
    with pytest.raises(UnfitCheckpoint, match=f"is not a complete checkpoint: {name} "):
        sound_checkpoint(str(run / "checkpoint-6"))


def test_a_checkpoint_without_checksums_is_judged_by_its_files(run):
    """As of an earlier version, or of a run that was killed before it wrote them."""
    for checkpoint in run.glob("checkpoint-*"):
        (checkpoint / CHECKSUMS_NAME).unlink()
    assert newest_checkpoint(str(run)) == str(run / "checkpoint-6")
    path = run / "checkpoint-6" / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    assert newest_checkpoint(str(run)) == str(run / "checkpoint-4"), "archives of torch have checksums of their own"


def test_of_several_files_of_weights_none_may_be_missing(run, tmp_path):
    from safetensors.torch import load_file

    checkpoint = run / "checkpoint-6"
    model = tiny_llama()
    model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
    for name in ("model.safetensors", CHECKSUMS_NAME):
        (checkpoint / name).unlink()
    model.save_pretrained(checkpoint, max_shard_size="5KB")
    assert flaw_of(checkpoint) is None
    shard = sorted(checkpoint.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert flaw_of(checkpoint) == f"{shard.name} is missing"


def test_a_run_goes_on_from_the_newest_whole_checkpoint(train, run, caplog):
    cut(run / "checkpoint-6" / "optimizer.pt", 0)
    options = {"repeat_scheduler": ConstantScheduler(2), "output_dir": str(run), "save_strategy": "steps"}
    resumed = train(**options, resume_from_checkpoint=True)
    assert resumed.repeat_scheduler.repeats == 2
    assert resumed._run.begun_at == 4
    assert "checkpoint-6 is passed over: optimizer.pt is empty" in caplog.text
    for checkpoint in run.glob("checkpoint-*"):
        cut(checkpoint / "rng_state.pth", 0.5)
    with pytest.raises(UnfitCheckpoint, match=r"no complete checkpoint in .*checkpoint-4: rng_state.pth is damaged"):
        train(**options, resume_from_checkpoint=True)


def test_a_damaged_line_of_a_trace_costs_that_line(train, run, caplog):
    trace = run / "abr_trace.jsonl"
    lines = trace.read_bytes().splitlines(keepends=True)
    trace.write_bytes(b"".join([lines[0], b"\0" * 40 + b"\n", lines[2], b'{"st\xff\n', *lines[4:]]))
    callbacks = {"trainer_options": {"callbacks": [PerplexityCallback()], "eval_dataset": token_rows(2)}}
    options = {"repeat_scheduler": ConstantScheduler(2), "output_dir": str(run), **callbacks}
    train(**options, resume_from_checkpoint=str(run / "checkpoint-4"))
    assert [line["step"] for line in read_lines(trace)] == [1, 3, 5, 6]
    assert "abr_trace.jsonl holds 2 of the 4 batches before this checkpoint" in caplog.text


def test_a_checkpoint_of_the_model_alone_is_told(train, tmp_path):
    options = {"repeat_scheduler": Scripted(1), "save_strategy": "steps", "save_steps": 3, "save_only_model": True}
    train(**options)
    with pytest.raises(UnfitCheckpoint, match="optimizer.pt and rng_state.pth are missing, as with --save_only_model"):
        train(**options, resume_from_checkpoint=True)
    assert last_state(tmp_path / "run"), "a report needs no more"


def adapted(**options):
    return get_peft_model(tiny_llama(), LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **options}))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: adapted(r=8), "it was saved with --lora_r 4, and this run has 8"),
        (
            lambda: adapted(target_modules=["q_proj", "v_proj"]),
            "it has no base_model.model.model.layers.0.self_attn.v",
        ),
        (lambda: adapted(target_modules=["v_proj"]), "it has no base_model.model.model.layers.0.self_attn.v"),
        (tiny_llama, "it holds an adapter, and this run trains all weights"),
        (lambda: get_peft_model(tiny_llama(hidden_size=32), adapted().peft_config["default"]), r"is \(4, 16\) there"),
    ],
    ids=["r", "more targets", "other targets", "no adapter", "a wider model"],
)
def test_a_checkpoint_of_another_adapter_is_refused(train, tmp_path, model, message):
    options = {"repeat_scheduler": Scripted(1), "save_strategy": "steps", "save_steps": 3}
    train(**options, model=adapted())
    assert train(**options, model=adapted(), resume_from_checkpoint=True).state.global_step == 6
    with pytest.raises(UnfitCheckpoint, match=message):
        train(**options, model=model(), resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (adapted, "it holds all weights, and this run trains an adapter"),
        (lambda: tiny_llama(hidden_size=32), r"is \(\d+, 16\) there and \(\d+, 32\) here"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(train, run, model, message):
    with pytest.raises(UnfitCheckpoint, match=message):
        train(repeat_scheduler=Scripted(1), output_dir=str(run), model=model(), resume_from_checkpoint=True)


def mixture():
    """A model whose experts are one tensor in memory, and one each in a file."""
    set_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=4, **sizes))


def test_a_mixture_of_experts_goes_on_with_its_experts_and_loads_those_of_the_best(train, tmp_path):
    options = {"repeat_scheduler": ConstantScheduler(2), "save_strategy": "steps", "save_steps": 3}
    whole = train(**options, model=mixture(), output_dir=str(tmp_path / "whole"))
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    resumed = train(**options, model=mixture(), resume_from_checkpoint=checkpoint)
    assert torch.equal(weights(resumed.model), weights(whole.model))
    best = stopping_early(train, model=mixture(), learning_rate=0.1, output_dir=str(tmp_path / "best"))
    values = [logs["eval_perplexity"] for logs in best.state.log_history if "eval_perplexity" in logs]
    assert min(values) < values[-1]
    assert best.evaluate()["eval_perplexity"] == pytest.approx(min(values), rel=1e-6)


def test_weights_that_are_there_by_no_name_are_missed(train, run):
    deeper = tiny_llama(num_hidden_layers=2)
    with pytest.raises(UnfitCheckpoint, match="it has no model.layers.1"):
        train(repeat_scheduler=Scripted(1), output_dir=str(run), model=deeper, resume_from_checkpoint=True)


def test_another_size_of_batches_is_said(train, run, caplog):
    checkpoint = str(run / "checkpoint-2")
    options = {"repeat_scheduler": ConstantScheduler(2), "output_dir": str(run), "resume_from_checkpoint": checkpoint}
    train(**options)
    assert "counted in batches" not in caplog.text
    train(**options, per_device_train_batch_size=1, gradient_accumulation_steps=3)
    assert "per_device_train_batch_size 2, now 1; gradient_accumulation_steps 1, now 3. Position" in caplog.text
    state = json.loads((run / "checkpoint-2" / "abr_state.json").read_text())
    (run / "checkpoint-2" / CHECKSUMS_NAME).unlink()
    del state["batch"]  # as of an older version
    state["log"]["tr_loss"] *= 4
    (run / "checkpoint-2" / "abr_state.json").write_text(json.dumps(state))
    train(**options)
    assert "was saved with processes 4, now 1. Position" in caplog.text
