"""What a run counts, by hand; and that it keeps no model in memory."""

from __future__ import annotations

import gc
import json
import math
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from abr_trainer import ABRConfig
from abr_trainer.schedulers import BatchTimes, ConstantScheduler, Observation, Outcome
from abr_trainer.schedulers.base import NO_TARGETS
from abr_trainer.training.callbacks import LogWindow
from abr_trainer.training.run import Run
from tests.conftest import Scripted, token_rows


@pytest.fixture
def run():
    return Run(SimpleNamespace(), Accelerator(cpu=True))


def outcome(batch, loss, repeats, reason=""):
    return Outcome(Observation(batch, loss, progress=0.0), repeats, (loss,) * max(repeats, 1), reason)


def test_skips_in_a_row_are_counted_until_a_batch_is_trained_on(run):
    run.count(outcome(0, 2.0, repeats=0), seconds=1.0)
    run.count(outcome(1, 3.0, repeats=2), seconds=1.0)
    run.count(outcome(2, 12.3456, repeats=0), seconds=1.0)
    run.count(outcome(3, math.nan, repeats=0, reason=NO_TARGETS), seconds=1.0)
    assert run.skips_in_a_row == [(2, "12.35"), (3, NO_TARGETS)]
    assert (run.batches_in_epoch, run.ledger.batches, run.ledger.skips, run.ledger.seconds) == (4, 4, 3, 4.0)
    told = run.explain_skips(2, Path("run/checkpoint-4"))
    assert told.startswith(
        "2 batches in a row were skipped, --max_consecutive_skips is 2. The last were 3 (loss 12.35)"
    )
    assert "4 (no targets). The run is saved in run/checkpoint-4: look at" in told, "batches are numbered from 1"


def test_a_log_tells_of_the_batches_since_the_last_one(run):
    run.times = BatchTimes(waiting=0.25, generating=0.0, working=0.0, one_pass=None)
    run.count(outcome(0, 2.0, repeats=3), seconds=1.0)
    run.count(outcome(1, math.nan, repeats=0), seconds=1.0)
    logs = {"loss": 1.0}  # Trainer's mean, to which the second batch gave 0
    run.complete_log(logs, loss_is_of_tokens=True)
    expected = {"loss": 2.0, "perplexity": math.exp(2.0), "repeats": 1.5, "skipped": 0.5, "passes": 0.0, "updates": 3}
    assert logs == pytest.approx({**expected, "waiting_seconds": 0.5})
    assert run.window.batches == 0
    assert run.window.waiting_seconds == 0.0


def test_what_was_generated_is_logged_where_something_was(run):
    run.times = BatchTimes(waiting=0.25, generating=0.5, working=0.0, one_pass=None)
    run.count(outcome(0, 2.0, repeats=1), seconds=1.0)
    restored = LogWindow(**json.loads(json.dumps(run.window.state_dict())))
    logs = restored.logs(run.ledger)
    assert (logs["waiting_seconds"], logs["generating_seconds"]) == (0.25, 0.5), "after a resume too"


def test_the_time_of_a_run_is_counted_whole(run):
    start = time.perf_counter()
    for batch in range(2):
        time.sleep(0.01)
        run.count(outcome(batch, 2.0, repeats=1), seconds=0.001)
    time.sleep(0.01)
    run.count_time()
    assert 0.03 <= run.ledger.total_seconds <= time.perf_counter() - start + 1.0
    assert run.ledger.seconds == 0.002


def test_the_mean_loss_of_a_run_leaves_out_what_is_not_finite(run):
    trainer = SimpleNamespace(state=SimpleNamespace(global_step=4), _tr_loss=torch.tensor(3.0), _total_loss_scalar=6.0)
    run.non_finite_batches = 1
    run.leave_out_non_finite(trainer)
    # Trainer adds what it has not logged yet, and divides by all four batches: (9 + 3) / 4 is 9 / 3.
    assert trainer._total_loss_scalar == 9.0


def test_deleting_a_trainer_frees_its_model(build):
    trainer = build(repeat_scheduler=Scripted(2, 0, 1))
    trainer.train()
    model = weakref.ref(trainer.model)
    gc.disable()  # a reference cycle would wait for it
    try:
        del trainer
        assert model() is None
    finally:
        gc.enable()


def test_a_rule_that_was_always_the_same_says_so_once_at_the_end(train, caplog):
    """The rows are noise, and their loss stays near log(64) = 4.2 nats: 2 x 1.5 to 3 x 1.5."""
    trainer = train(
        config_cls=lambda **config: ABRConfig(**config, repeat_scheduler="abr", loss_threshold=1.5),
        data=token_rows(24),
    )
    (said,) = [record.getMessage() for record in caplog.records if "updates on each of" in record.getMessage()]
    assert said == trainer.remark
    assert said.startswith(
        "abr made 2 updates on each of 12 batches: nearly every loss is 2 to 3 times --loss_threshold"
    )


def test_a_resumed_run_is_judged_whole_and_one_with_nothing_to_say_is_silent(train, caplog):
    options = {"data": token_rows(24), "save_strategy": "steps", "save_steps": 8, "learning_rate": 0.0}
    options["config_cls"] = lambda **config: ABRConfig(**config, repeat_scheduler="abr", loss_threshold=1.5)
    whole = train(**options)
    caplog.clear()
    resumed = train(**options, resume_from_checkpoint=str(Path(whole.args.output_dir, "checkpoint-8")))
    assert "12 batches" in whole.remark
    assert resumed.remark == whole.remark
    caplog.clear()
    assert train(repeat_scheduler=Scripted(1, 2, 1), data=token_rows(24)).remark is None
    assert train(config_cls=ABRConfig, data=token_rows(24)).remark is None  # the baseline
    assert not caplog.records


class Silent(ConstantScheduler):
    def remark(self, outcomes):
        raise KeyError("nothing to say")


def test_a_rule_whose_remark_fails_does_not_end_a_run_that_has_ended_well(train, caplog):
    trainer = train(repeat_scheduler=Silent(2), data=token_rows(8))
    assert trainer.remark is None
    assert "train_passes" in trainer.state.log_history[-1]
    (said,) = [record.getMessage() for record in caplog.records if "Silent" in record.getMessage()]
    assert said == "Silent has no remark on the run: KeyError: 'nothing to say'"
