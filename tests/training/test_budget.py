"""What a run may spend: on a ledger that is written by hand, and in seconds, in runs whose data are slow."""

from __future__ import annotations

import itertools
import json
import math
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from abr_trainer.records.files import read_lines
from abr_trainer.training.budget import Budget, Limit, put_on_budget_clock
from abr_trainer.training.ledger import ComputeLedger
from tests.conftest import Scripted, token_rows
from tests.jobs import StopAfter
from tests.training.test_clock import Slow

pytestmark = pytest.mark.slow


def budget_with(spent: str, **arguments: float) -> Budget:
    return Budget(SimpleNamespace(**arguments), ComputeLedger(passes=Fraction(spent)))


@pytest.mark.parametrize(("spent", "left"), [("0", 10), ("22/3", 2), ("9", 1), ("28/3", 0), ("10", 0)])
def test_whole_passes_are_left(spent, left):
    budget = budget_with(spent, max_passes=10)
    assert budget.left == left
    assert budget.is_spent == (left == 0)


def test_passes_are_left_at_what_a_pass_costs():
    budget = budget_with("0", max_passes=4)
    budget.ledger.extra_forwards = Fraction(1)  # 4/3 a pass
    assert budget.left == 3
    budget.ledger.passes = Fraction(8, 3)
    assert (budget.left, budget.is_spent) == (1, False)
    budget.ledger.passes = Fraction(3)
    assert (budget.left, budget.is_spent) == (0, True)


def test_without_a_budget_the_run_ends_by_its_steps():
    budget = budget_with("1000")
    assert (budget.limit, budget.left, budget.is_spent) == (None, math.inf, False)
    assert budget.progress(step=3, max_steps=12) == 0.25
    assert budget.progress(step=3, max_steps=-1) == 0.0


def test_progress_is_the_share_of_the_budget_whatever_the_step():
    assert budget_with("5/2", max_passes=10).progress(step=1, max_steps=2) == 0.25


@pytest.mark.parametrize(
    ("eval_passes", "before", "now", "crosses"),
    [
        (2, "1", "2", True),
        (2, "2", "3", False),
        (2, "1", "9", True),  # once, however many marks lie between
        (0.1, "8/3", "3", True),  # a tenth of 30 passes is 3
        (0.1, "3", "17/3", False),
        (0.1, "17/3", "6", True),
        (None, "0", "30", False),
    ],
)
def test_an_evaluation_is_due_when_a_batch_crosses_a_mark(eval_passes, before, now, crosses):
    marks = [
        budget_with(spent, max_passes=30, eval_passes=eval_passes).marks_passed("eval_passes")
        for spent in (before, now)
    ]
    assert (marks[1] > marks[0]) is crosses


def seconds_spent(seconds: float, **arguments: float) -> Budget:
    budget = Budget(SimpleNamespace(**arguments), ComputeLedger(passes=Fraction(7)))
    budget.agree([seconds])
    return budget


def test_as_long_as_seconds_are_left_nothing_else_bounds_a_batch():
    budget = seconds_spent(9.9, max_seconds=10)
    assert budget.limit == Limit("seconds", 10)
    assert (budget.left, budget.most_repeats, budget.is_spent) == (math.inf, math.inf, False)
    budget.agree([10.0])
    assert (budget.left, budget.is_spent) == (0, True)
    assert budget.most_repeats == 1, "the first pass of a batch is made, and pays"


def test_the_rank_that_is_slowest_counts_and_time_does_not_run_backwards():
    budget = seconds_spent(3.0, max_seconds=10)
    budget.ledger.seconds = 2.0
    assert budget.measured(SimpleNamespace(seconds=0.5)) == (2.5,)
    budget.agree([2.5])
    assert budget.spent == 3.0
    assert budget.progress(step=1, max_steps=99) == 0.3
    budget.agree([99.0])
    assert 0.99 < budget.progress(step=1, max_steps=99) < 1
    assert budget_with("3", max_passes=10).measured(None) == (), "nothing travels that nobody needs"


@pytest.mark.parametrize(
    ("distance", "seconds", "marks"), [(0.25, 4.9, 0), (0.25, 5, 1), (0.25, 19.9, 3), (0.25, 20.5, 4), (2, 19.9, 3)]
)
def test_a_share_is_one_of_the_seconds_and_a_number_one_of_passes(distance, seconds, marks):
    budget = seconds_spent(seconds, max_seconds=20, save_passes=distance)  # it has spent 7 passes
    assert (budget.marks_passed("save_passes"), budget.marks_passed("eval_passes")) == (marks, 0)


def test_a_bar_is_full_when_a_run_has_spent_more_than_its_seconds():
    limit, ledger = Limit("seconds", 6), ComputeLedger(passes=Fraction(9, 2), seconds=6.2)
    assert (limit.done(ledger), limit.flag) == (6, "--max_seconds")
    assert Limit("passes", 6).done(ledger) == 4.5


def test_the_learning_rate_follows_the_seconds():
    budget = seconds_spent(0, max_seconds=6)
    scheduler = put_on_budget_clock(linear_over_six_steps(), lambda: budget)
    rates = []
    for seconds in (1.5, 3.0, 6.01):
        budget.agree([seconds])
        scheduler.optimizer.step()
        scheduler.step()
        rates += scheduler.get_last_lr()
    assert rates == [0.75, 0.5, 0.0]


def test_what_was_spent_before_a_checkpoint_is_in_its_state():
    saved = seconds_spent(7.5, max_seconds=10)
    state = {"ledger": ComputeLedger(seconds=7.25).state_dict(), **saved.state_dict()}
    resumed = seconds_spent(0, max_seconds=10)
    resumed.load_state_dict(state)
    assert resumed.spent == 7.5
    del state["agreed_seconds"]  # of a run that had no budget
    assert resumed.is_spent_in(state) is False
    assert seconds_spent(0, max_seconds=7).is_spent_in(state) is True
    assert seconds_spent(0, max_seconds=7).is_spent_in({}) is False
    assert budget_with("0", max_passes=10).state_dict() == {}


def linear_over_six_steps():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 6)


def test_the_learning_rate_follows_the_passes_and_ends_with_the_last_whole_one():
    budget = budget_with("0", max_passes=6)
    scheduler = put_on_budget_clock(linear_over_six_steps(), lambda: budget)
    rates = []
    for passes in ("3/2", "3", "16/3"):  # then two thirds of a pass are left, which buy nothing
        budget.ledger.passes = Fraction(passes)
        scheduler.optimizer.step()
        scheduler.step()
        rates += scheduler.get_last_lr()
    assert rates == [0.75, 0.5, 0.0]


def test_a_schedule_that_outlives_a_run_follows_the_next_one():
    budgets = [budget_with("6", max_passes=6), budget_with("3", max_passes=6)]
    scheduler = put_on_budget_clock(linear_over_six_steps(), lambda: budgets[0])
    scheduler.optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [0.0]
    del budgets[0]
    scheduler.step()
    assert scheduler.get_last_lr() == [0.5]


def test_a_schedule_that_is_no_function_of_the_step_is_refused():
    budget = budget_with("0", max_passes=6)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(linear_over_six_steps().optimizer)
    with pytest.raises(ValueError, match="which ReduceLROnPlateau is not"):
        put_on_budget_clock(plateau, lambda: budget)


# ---- Runs ----

WAIT = 0.1


class Watch(TrainerCallback):
    """Remember the learning rate, and what is spent, after each batch."""

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        self.seen = []

    def on_outcome(self, args, state, control, outcome, ledger, **kwargs):
        rate = self.trainer.lr_scheduler.get_last_lr()[0]
        self.seen.append((self.trainer._run.budget.spent, ledger.waiting_seconds, ledger.seconds, rate))


def trained(build, resume=None, **options):
    watch = Watch()
    trainer = watch.trainer = build(**options)
    trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, watch.seen


def trace_of(trainer):
    return list(read_lines(Path(trainer.args.output_dir, "abr_trace.jsonl")))


def test_a_run_ends_with_its_seconds_and_its_rate_falls_with_them(build):
    options = {"data": Slow(token_rows(12), WAIT), "max_seconds": 2, "repeat_scheduler": Scripted(2)}
    trainer, seen = trained(build, **options)
    for spent, waited, seconds, rate in seen:
        assert waited <= spent <= seconds
        assert rate == pytest.approx(1e-2 * max(0.0, 1 - spent / 2))
    before, last = seen[-2:]
    assert before[0] < 2 <= last[0]
    assert last[3] == 0
    assert len(seen) <= 2 / (2 * WAIT) + 1, "each batch waits for two rows"
    assert trainer.state.epoch > 1 or len(seen) <= 6, "one epoch is no end"
    lines = trace_of(trainer)
    assert lines[0]["learning_rate"] == 1e-2
    assert [line["learning_rate"] for line in lines[1:]] == [rate for *_, rate in seen[:-1]]
    shares = [line["progress"] for line in lines]
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] < 1


def test_no_pass_begins_when_the_seconds_are_over(build):
    began = []

    def look(module, args):
        began.append(trainer._run.budget.is_spent)
        time.sleep(WAIT)

    trainer = build(repeat_scheduler=Scripted(1000), max_seconds=1)
    trainer.model.get_input_embeddings().register_forward_pre_hook(look)
    trainer.train()
    (line,) = trace_of(trainer)
    assert began == [False] * line["repeats"]
    assert line["repeats"] <= 1 / WAIT + 1
    assert line["reason"] == "budget"
    assert (trainer.ledger.batches, trainer.ledger.updates) == (1, line["repeats"])
    assert trainer.ledger.seconds >= 1


def test_a_batch_that_came_too_late_is_trained_on_once(build):
    trainer, _ = trained(build, data=Slow(token_rows(12), 0.3), repeat_scheduler=Scripted(3), max_seconds=1)
    (line,) = trace_of(trainer)  # accelerate looks one batch ahead: it comes after 1.2 seconds
    assert (line["repeats"], line["reason"], trainer.ledger.passes) == (1, "budget", 1)
    skips, _ = trained(build, data=Slow(token_rows(12), 0.3), repeat_scheduler=Scripted(0), max_seconds=1)
    assert (skips.ledger.skips, skips.ledger.batches) == (1, 1)


def test_evaluation_and_logs_are_not_counted(build):
    class Sleeps(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            time.sleep(0.2)

    start = time.perf_counter()
    data = {"eval_dataset": Slow(token_rows(4), 0.1), "callbacks": [Sleeps()]}
    trainer, seen = trained(
        build, data=Slow(token_rows(12), 0.05), trainer_options=data, max_seconds=2, eval_passes=0.25, logging_steps=2
    )
    evaluations = [logs for logs in trainer.state.log_history if "eval_loss" in logs]
    assert 1 < len(evaluations) <= 4, "one for each quarter of the seconds"
    assert evaluations[-1]["step"] == trainer.state.global_step, "the last quarter ends with the run"
    assert time.perf_counter() - start > 2 + 0.4 * len(evaluations) + 0.2 * len(seen) / 2
    assert seen[-2][0] < 2


def test_a_resumed_run_goes_on_where_its_seconds_and_its_rate_were(build, tmp_path, caplog):
    options = {"data": Slow(token_rows(12), WAIT), "max_seconds": 2, "repeat_scheduler": Scripted(1)}
    whole = {"trainer_options": {"callbacks": [StopAfter(4)]}, **options}
    _, before = trained(build, **whole)
    state = json.loads((tmp_path / "run/checkpoint-4/abr_state.json").read_text())
    assert state["agreed_seconds"] == before[-1][0] >= 4 * 2 * WAIT
    options |= {"save_strategy": "epoch"}
    resumed, after = trained(build, resume=True, **options)
    assert trace_of(resumed)[4]["learning_rate"] == before[-1][3] < 1e-2
    spent = [at for at, *_ in [*before, *after]]
    assert spent == sorted(spent)
    assert len(spent) <= 2 / (2 * WAIT) + 1 + 1, "not two seconds once more"
    assert all(rate == pytest.approx(1e-2 * max(0.0, 1 - at / 2)) for at, *_, rate in after)
    again, none = trained(build, resume=True, **options)
    assert (none, again.state.global_step) == ([], resumed.state.global_step)
    assert "--max_seconds 2 are spent. Nothing is trained; to go on, raise that." in caplog.text
    longer, more = trained(build, resume=True, **{**options, "max_seconds": 3})
    assert more[0][3] < 1e-2 * (1 - spent[-1] / 3)
    assert longer.ledger.seconds >= 3


def test_a_number_of_batches_caps_a_budget_of_seconds(train):
    trainer = train(max_seconds=600, max_steps=3)
    assert (trainer.state.global_step, trainer.state.max_steps) == (3, 3)
    assert trainer.ledger.seconds < 600


def test_rates_never_rise_after_the_warm_up_whose_unit_is_seconds(build):
    _, seen = trained(build, data=Slow(token_rows(12), WAIT), max_seconds=2, warmup_steps=1)
    rising = [each for each in seen if each[0] < 1]
    falling = [each for each in seen if each[0] >= 1]
    assert rising
    assert falling
    assert all(rate == pytest.approx(1e-2 * spent) for spent, *_, rate in rising)
    assert all(now[3] < before[3] for before, now in itertools.pairwise(falling))
