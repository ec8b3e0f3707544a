"""Where the time of a run goes."""

from __future__ import annotations

import time

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from abr_trainer import RepeatScheduler
from abr_trainer.records.files import read_lines
from abr_trainer.report.why import explain_batch
from abr_trainer.schedulers import WaitScheduler
from tests.conftest import Scripted, Stream, token_rows

pytestmark = pytest.mark.slow

WAIT = 0.03


class Slow(torch.utils.data.Dataset):
    """Rows that take their time."""

    def __init__(self, rows, seconds=WAIT):
        self.rows, self.seconds = rows, seconds

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return self.rows[index]


class Timed(RepeatScheduler):
    """So many updates a batch; it remembers the times."""

    wants = frozenset({"times"})

    def __init__(self, repeats=1):
        self.repeats, self.times = repeats, []

    def decide(self, observation):
        return self.repeats

    def observe(self, outcome):
        self.times.append(outcome.observation.times)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_wait_for_data_is_counted_whole(train, accumulation):
    start = time.perf_counter()
    ledger = train(data=Slow(token_rows(12)), gradient_accumulation_steps=accumulation).ledger
    assert 12 * WAIT <= ledger.waiting_seconds <= ledger.seconds <= time.perf_counter() - start


def test_the_wait_for_a_stream_is_counted(train):
    class SlowStream(Stream):
        def __iter__(self):
            for row in self.rows:
                time.sleep(WAIT)
                yield row

    ledger = train(data=SlowStream(token_rows(12)), max_steps=6).ledger
    assert ledger.waiting_seconds >= 12 * WAIT


def test_a_fast_loader_is_not_waited_for(train):
    ledger = train(data=token_rows(40)).ledger
    assert ledger.waiting_seconds < 0.5 * ledger.seconds


def test_a_pass_is_timed_without_the_wait(train):
    rule = Timed()
    train(data=Slow(token_rows(12), seconds=0.2), repeat_scheduler=rule)
    assert rule.times[0].one_pass is None
    assert min(times.one_pass for times in rule.times[1:]) < 0.2
    assert all(times.waiting >= 0.4 for times in rule.times[:-1])
    assert rule.times[-1].waiting < 0.4  # accelerate looks one batch ahead
    assert all(times.working == 0 for times in rule.times)  # nothing is loaded beside the training


def test_a_pass_is_a_part_of_the_repeats_of_a_batch(train):
    once, often = Timed(repeats=1), Timed(repeats=8)
    for rule in (once, often):
        train(data=token_rows(12), repeat_scheduler=rule)
    fastest, repeated = (min(times.one_pass for times in rule.times[1:]) for rule in (once, often))
    assert repeated < 4 * fastest


def test_what_happens_between_two_batches_is_no_part_of_a_pass(train):
    class Sleeps(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            time.sleep(0.3)

    rule = Timed()
    train(repeat_scheduler=rule, logging_steps=1, trainer_options={"callbacks": [Sleeps()]})
    assert min(times.one_pass for times in rule.times[1:]) < 0.3


def test_the_forward_of_a_skipped_batch_is_timed_as_a_pass(train):
    class SkipsFirst(Timed):
        def decide(self, observation):
            return 0 if observation.batch == 0 else 1

    rule = SkipsFirst()
    train(repeat_scheduler=rule)
    assert rule.times[1].one_pass is not None


def test_workers_load_while_the_model_trains(train):
    rule = Timed(repeats=4)
    train(data=token_rows(12), repeat_scheduler=rule, dataloader_num_workers=1)
    assert rule.times[0].working == 0
    assert all(times.working > 0 for times in rule.times[1:])


def test_evaluation_and_saving_have_their_own_time(train):
    trainer = train(
        trainer_options={"eval_dataset": Slow(token_rows(4))}, eval_strategy="epoch", save_strategy="epoch"
    )
    assert trainer.ledger.evaluation_seconds >= 4 * WAIT
    assert trainer.ledger.saving_seconds > 0
    assert trainer.ledger.seconds < trainer.ledger.evaluation_seconds + 60


def test_a_resumed_run_goes_on_counting(train, tmp_path):
    data = Slow(token_rows(12))
    train(data=data, save_strategy="steps", save_steps=4, max_steps=4, repeat_scheduler=Scripted(1))
    before = 8 * WAIT
    ledger = train(
        data=data, resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"), repeat_scheduler=Scripted(1)
    ).ledger
    assert ledger.waiting_seconds >= before + 4 * WAIT


def test_plain_arguments_leave_the_ledger_empty(train, build):
    trainer = train(
        config_cls=TrainingArguments,
        trainer_options={"eval_dataset": token_rows(4)},
        eval_strategy="epoch",
        save_strategy="epoch",
    )
    assert trainer.ledger == build(config_cls=TrainingArguments).ledger


def test_the_parts_of_a_resumed_run_are_those_of_both_its_parts(train, tmp_path):
    options = {
        "data": Slow(token_rows(12)),
        "save_strategy": "steps",
        "save_steps": 4,
        "repeat_scheduler": Scripted(1),
    }
    before = train(max_steps=4, **options).ledger
    time.sleep(0.5)
    start = time.perf_counter()
    ledger = train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"), **options).ledger
    took = time.perf_counter() - start
    assert before.seconds < ledger.total_seconds <= before.total_seconds + took, "not what lies between them"
    assert ledger.seconds + ledger.evaluation_seconds + ledger.saving_seconds <= ledger.total_seconds


# ---- Repeats while the next batch is not there ----


@pytest.fixture
def waited(train, tmp_path):
    """Train by `wait`, and return the trace."""

    def waited(seconds, count=40, **options):
        train(data=Slow(token_rows(count), seconds), repeat_scheduler=WaitScheduler(max_repeats=3), **options)
        return list(read_lines(tmp_path / "run" / "abr_trace.jsonl"))

    return waited


@pytest.mark.parametrize(("workers", "accumulation"), [(0, 1), (1, 2)])
def test_a_batch_is_repeated_while_the_next_one_is_waited_for(waited, workers, accumulation):
    trace = waited(
        0.1 / accumulation,
        count=28 * accumulation,
        dataloader_num_workers=workers,
        gradient_accumulation_steps=accumulation,
    )
    assert {batch["repeats"] for batch in trace[:6]} == {1}
    assert {batch["reason"] for batch in trace[:6]} == {"unmeasured"}
    assert {batch["reason"] for batch in trace if batch["repeats"] > 1} == {"waiting"}
    assert sum(batch["repeats"] > 1 for batch in trace[6:]) >= 4


def test_a_batch_that_is_there_is_trained_on_once(waited, train):
    trace = waited(0.0, count=120)
    assert {batch["repeats"] for batch in trace} == {1}
    assert {batch["reason"] for batch in trace[8:]} == {"ready"}


def test_a_resumed_run_remembers_how_long_it_waited(train, tmp_path):
    options = {"data": Slow(token_rows(24), 0.1), "output_dir": str(tmp_path / "run")}
    rule = WaitScheduler(max_repeats=3)
    train(repeat_scheduler=rule, save_strategy="steps", save_steps=8, max_steps=8, **options)
    again = WaitScheduler(max_repeats=3)
    train(repeat_scheduler=again, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-8"), **options)
    assert list(again.history)[:7] == list(rule.history)
    trace = list(read_lines(tmp_path / "run" / "abr_trace.jsonl"))
    assert trace[8]["reason"] == "waiting"
    said = explain_batch(tmp_path / "run", 9)
    assert "times: after one pass, training would wait 0." in said[0]
    assert not any("the code of the rule has changed since" in line for line in said)
