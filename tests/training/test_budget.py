"""A budget on a ledger that is written by hand: no trainer is needed."""

from __future__ import annotations

import math
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

from abr_trainer.training.budget import Budget, put_on_budget_clock
from abr_trainer.training.ledger import ComputeLedger


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
    assert (budget.passes, budget.left, budget.is_spent) == (None, math.inf, False)
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
    budget = budget_with(now, max_passes=30, eval_passes=eval_passes)
    assert budget.crosses_mark("eval_passes", spent_before=Fraction(before)) is crosses


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
