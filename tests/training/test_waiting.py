"""What is said of a run that waits for its data."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.utils.data import IterableDataset

from abr_trainer.schedulers import ConstantScheduler
from abr_trainer.training import waiting as module
from abr_trainer.training.waiting import Waiting, advice
from tests.conftest import Scripted, Stream, token_rows
from tests.training.test_clock import Slow, Timed

pytestmark = pytest.mark.slow


def counted(batches, seconds, waiting):
    """So many alike batches, after a first one that waits for long."""
    found = Waiting()
    found.observe(seconds=60.0, waiting=59.0)
    for _ in range(batches):
        found.observe(seconds, waiting)
    return found


def test_a_run_waits_if_more_than_a_tenth_of_enough_time_is_waiting():
    assert counted(30, seconds=1.0, waiting=0.125).exceeds(0.1)
    assert not counted(30, seconds=1.0, waiting=0.125).exceeds(0.125), "an eighth is not more than an eighth"
    assert not counted(29, seconds=1.0, waiting=0.875).exceeds(0.1), "too few batches"
    assert not counted(39, seconds=0.125, waiting=0.125).exceeds(0.1), "less than 5 seconds"
    assert counted(40, seconds=0.125, waiting=0.125).exceeds(0.1)


def test_the_first_batch_of_each_call_is_left_out():
    before = counted(30, seconds=1.0, waiting=0.0)
    assert (before.batches, before.seconds, before.waiting_seconds) == (30, 30.0, 0.0)
    resumed = Waiting(**json.loads(json.dumps(before.state_dict())))
    assert resumed == before
    resumed.observe(seconds=60.0, waiting=59.0)
    resumed.observe(seconds=1.0, waiting=0.5)
    assert (resumed.batches, resumed.seconds, resumed.waiting_seconds) == (31, 31.0, 0.5)


def test_a_rank_counts_at_most_its_own_time_as_a_wait():
    found = counted(30, seconds=1.0, waiting=1.5)  # by the clock of the rank that waited longest
    assert found.waiting_seconds == found.seconds == 30.0


# ---- The advice ----


class Sharded(IterableDataset):
    """As those of `datasets`, which a worker reads a share of."""

    num_shards = 4

    def __iter__(self):
        return iter(())


class Unsplit(Sharded):
    """A stream that cannot say how it is split."""

    @property
    def num_shards(self):
        raise NotImplementedError


def advised(share, data=(), rule=None, **arguments):
    arguments = {"dataloader_num_workers": 0, "dataloader_prefetch_factor": None, **arguments}
    return advice(
        SimpleNamespace(
            args=SimpleNamespace(**arguments),
            train_dataset=data,
            repeat_scheduler=rule or ConstantScheduler(),
            _run=SimpleNamespace(waiting=counted(100, 1.0, share)),
        )
    )


@pytest.mark.parametrize(("share", "workers"), [(0.2, 1), (0.5, 1), (0.7, 3), (0.99, 8)])
def test_a_run_without_workers_is_advised_to_take_as_many_as_load_a_batch_a_pass(share, workers):
    assert advised(share) == (
        f"To load while the model trains: --dataloader_num_workers {workers}. "
        "To repeat a batch until the next one is there: --repeat_scheduler wait."
    )


def test_a_stream_is_read_by_no_more_workers_than_can_share_it():
    assert "--dataloader_num_workers 1." in advised(0.7, Stream([])), "two would give each row twice"
    assert "--dataloader_num_workers 3." in advised(0.7, Sharded())
    assert "--dataloader_num_workers 4." in advised(0.9, Sharded())
    assert "--dataloader_num_workers 1." in advised(0.7, Unsplit())
    only_ahead = advised(0.7, Stream([]), dataloader_num_workers=1)
    assert only_ahead.startswith("To load further ahead: --dataloader_prefetch_factor above 2.")


def test_a_run_with_workers_is_advised_to_take_more_or_to_fetch_further_ahead():
    told = advised(0.7, dataloader_num_workers=2, dataloader_prefetch_factor=4)
    assert told.startswith(
        "To load faster: --dataloader_num_workers above 2, or --dataloader_prefetch_factor above 4."
    )


def test_a_rule_that_uses_the_wait_is_not_advised_to_do_so():
    assert advised(0.2, rule=Timed()) == "To load while the model trains: --dataloader_num_workers 1."


# ---- In a run ----


def said(caplog):
    return [each.getMessage() for each in caplog.records if "waiting for data" in each.getMessage()]


SLOW = {"data": Slow(token_rows(66), seconds=0.004), "per_device_train_batch_size": 2}


def test_a_run_that_waits_says_so_once_and_again_in_no_part_of_it(train, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(module, "FEWEST_SECONDS", 0.1)
    options = {**SLOW, "save_strategy": "steps", "save_steps": 16, "num_train_epochs": 2}
    train(repeat_scheduler=Scripted(1), max_steps=32, **options)
    (line,) = said(caplog)
    assert "of the training time was spent waiting for data: " in line
    assert " s, over 30 batches. To load while the model trains: --dataloader_num_workers" in line
    run = Path(tmp_path / "run")
    state = json.loads((run / "checkpoint-32" / "abr_state.json").read_text())["waiting"]
    assert (state["batches"], state["is_told"]) == (31, True)
    for _ in range(2):
        caplog.clear()
        train(repeat_scheduler=Scripted(1), resume_from_checkpoint=str(run / "checkpoint-32"), **options)
        assert said(caplog) == []


def test_a_part_of_a_run_that_is_too_short_counts_for_the_next(train, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(module, "FEWEST_SECONDS", 0.1)
    options = {**SLOW, "save_strategy": "steps", "save_steps": 16}
    train(repeat_scheduler=Scripted(1), max_steps=16, **options)
    assert said(caplog) == [], "15 batches are too few"
    train(repeat_scheduler=Scripted(1), resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-16"), **options)
    (line,) = said(caplog)
    assert "over 30 batches" in line  # 15, and 15 of the 17 others


def test_a_run_of_a_second_says_nothing(train, caplog):
    start = time.perf_counter()
    train(repeat_scheduler=Scripted(1), **SLOW)
    assert time.perf_counter() - start < 5
    assert said(caplog) == []


def test_only_the_main_process_says_it(build, caplog, monkeypatch):
    monkeypatch.setattr(module, "FEWEST_SECONDS", 0.1)
    trainer = build(repeat_scheduler=Scripted(1), **SLOW)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.train()
    assert trainer._run.waiting.is_told, "all ranks count alike"
    assert said(caplog) == []
