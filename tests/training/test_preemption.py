"""SIGTERM under `--enable_jit_checkpoint`: the run is saved after the batch under way, and goes on bit for bit."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch
from transformers import TrainerCallback

import run_clm_abr
from abr_trainer.records.files import last_complete_checkpoint, read_lines
from tests.conftest import RUN, Scripted, log_without_times, token_rows, weights
from tests.training.test_resume import trace_of


class SendOnce(TrainerCallback):
    """Send SIGTERM to this process at an event of a step, once."""

    def __init__(self, event, step):
        self.step = step
        setattr(self, event, self.send)

    def send(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = None
            send_sigterm()


def send_sigterm():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)  # transformers notes it in a thread


AT_STEPS = {"eval_strategy": "steps", "eval_steps": 3}
AT_EPOCHS = {"eval_strategy": "epoch", "save_strategy": "epoch"}
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_steps": 3, "save_total_limit": 1}


@pytest.mark.parametrize(
    ("event", "step", "saved_at", "options"),
    [
        ("on_step_begin", 2, 3, {}),
        ("on_pre_optimizer_step", 2, 3, {}),  # before the first of three updates on batch 3
        ("on_optimizer_step", 2, 3, {"max_passes": 25}),
        ("on_substep_end", 4, 5, {"gradient_accumulation_steps": 2}),
        ("on_evaluate", 3, 3, AT_STEPS),
        ("on_step_end", 8, 8, AT_EPOCHS),  # before what is due at the end of an epoch
        ("on_step_end", 11, 11, AT_STEPS | BEST),  # the best model is that of an earlier step
    ],
)
def test_a_run_that_is_preempted_goes_on_bit_for_bit(train, tmp_path, event, step, saved_at, options):
    accumulation = options.get("gradient_accumulation_steps", 1)
    shared = {"data": token_rows(16 * accumulation), "num_train_epochs": 2, "learning_rate": 3e-2, "logging_steps": 4}
    shared |= {"enable_jit_checkpoint": True, "save_strategy": "steps", "save_steps": 100, **options}
    handler = signal.getsignal(signal.SIGTERM)

    def run(name, callbacks=(), **more):
        told = {"eval_dataset": token_rows(4, seed=5), "callbacks": list(callbacks)}
        own = {"output_dir": str(tmp_path / name), "trainer_options": told}
        return train(repeat_scheduler=Scripted(1, 0, 3, 2), **own, **shared, **more)

    whole, stopped = run("whole"), run("stopped", [SendOnce(event, step)])
    assert stopped.is_preempted
    assert stopped.state.global_step == saved_at
    assert last_complete_checkpoint(tmp_path / "stopped") == str(tmp_path / "stopped" / f"checkpoint-{saved_at}")
    assert signal.getsignal(signal.SIGTERM) == handler

    resumed = run("stopped", resume_from_checkpoint=True)
    assert not any(trainer.is_preempted for trainer in (whole, resumed))
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert log_without_times(resumed)[:-1] == log_without_times(whole)[:-1]
    assert trace_of(tmp_path / "stopped") == trace_of(tmp_path / "whole")


def test_a_signal_in_the_last_batch_lets_the_run_end(train):
    trainer = train(enable_jit_checkpoint=True, trainer_options={"callbacks": [SendOnce("on_step_begin", 5)]})
    assert trainer.state.global_step == 6
    assert not trainer.is_preempted


def test_a_trainer_that_trains_again_is_preempted_again(build):
    callback = SendOnce("on_step_begin", 1)
    trainer = build(enable_jit_checkpoint=True, save_strategy="steps", trainer_options={"callbacks": [callback]})
    for step in (1, 3):
        callback.step = step
        trainer.train()
        assert trainer.is_preempted
        assert trainer.state.global_step == step + 1
    trainer.train()
    assert not trainer.is_preempted


def test_the_workers_of_a_loader_survive_a_signal_to_all_processes(build, tmp_path):
    class SendToAll(SendOnce):
        def send(self, args, state, control, **kwargs):
            if state.global_step == self.step:
                workers = multiprocessing.active_children()
                assert len(workers) == 2
                for worker in workers:
                    os.kill(worker.pid, signal.SIGTERM)
                super().send(args, state, control)
                assert all(worker.is_alive() for worker in workers)

    options = {"enable_jit_checkpoint": True, "save_strategy": "steps", "dataloader_num_workers": 2}
    trainer = build(**options, data=token_rows(40), trainer_options={"callbacks": [SendToAll("on_step_begin", 4)]})
    trainer.train()
    assert trainer.is_preempted
    assert (tmp_path / "run" / "checkpoint-5" / "abr_state.json").exists()


def test_a_preempted_command_ends_with_the_status_of_the_signal_and_goes_on(tmp_path, capfd):
    out = tmp_path / "run"
    more = ["--enable_jit_checkpoint", "--resume_from_checkpoint", "auto", "--output_dir", str(out)]
    more += ["--max_passes", "12", "--per_device_train_batch_size", "2", "--skip_outliers", "none"]

    def send_after_three_batches():
        while not (out / "abr_trace.jsonl").exists() or len(list(read_lines(out / "abr_trace.jsonl"))) < 3:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send_after_three_batches, daemon=True).start()
    with pytest.raises(SystemExit) as ended:
        run_clm_abr.run([*RUN, *more])
    assert ended.value.code == 128 + signal.SIGTERM
    saved = last_complete_checkpoint(out)
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith(f"preempted: SIGTERM has ended the run. It is saved in {saved}: --resume_from_checkpoint")
    assert not (out / "all_results.json").exists()
    assert run_clm_abr.run([*RUN, *more])["train_updates"] == 12
    steps = [batch["step"] for batch in read_lines(out / "abr_trace.jsonl")]
    assert steps == list(range(1, len(steps) + 1))


def test_auto_begins_anew_where_no_checkpoint_is_complete(tmp_path):
    out = tmp_path / "run"
    (out / "checkpoint-2").mkdir(parents=True)
    (out / "run.json").write_text("{}")
    flags = [*RUN, "--resume_from_checkpoint", "auto", "--output_dir", str(out), "--max_passes", "2"]
    with pytest.raises(SystemExit):
        run_clm_abr.run(flags)
    assert run_clm_abr.run([*flags, "--overwrite_output_dir"])["train_passes"] == 2


def test_a_run_that_fails_leaves_the_signal_to_whoever_had_it(build):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyError("loss")

    before = signal.getsignal(signal.SIGTERM)
    trainer = build(enable_jit_checkpoint=True, trainer_options={"callbacks": [Fails()]})
    assert signal.getsignal(signal.SIGTERM) != before
    with pytest.raises(KeyError):
        trainer.train()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_hyperparameter_search_does_not_count_trials_that_are_cut_short(build):
    trainer = build(enable_jit_checkpoint=True)
    trainer.hp_search_backend = "optuna"
    with pytest.raises(ValueError, match="a trial that --enable_jit_checkpoint ends early would be compared"):
        trainer._refuse_unsupported()
