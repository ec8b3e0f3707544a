"""The compute that a run may spend: what is left of it, and what follows from how much is spent."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from .config import setting
from .ledger import ComputeLedger
from .support import check_schedule


class Budget:
    """`max_passes`, beside what the ledger says is spent.

    Args:
        args: The arguments of the trainer. Without `max_passes` there is no budget, and the run ends by its steps.
        ledger: What is spent.
    """

    def __init__(self, args: Any, ledger: ComputeLedger) -> None:
        self._args = args
        self.ledger = ledger

    @property
    def passes(self) -> int | None:
        """The whole budget; None without one."""
        passes: int | None = setting(self._args, "max_passes")
        return passes

    @property
    def left(self) -> float:
        """The whole passes that are left, at what the last one cost; infinite without a budget."""
        if self.passes is None:
            return math.inf
        return math.floor((self.passes - self.ledger.passes) / self.ledger.pass_cost)

    @property
    def is_spent(self) -> bool:
        """Whether no whole pass fits into the budget any more."""
        return self.left < 1

    def progress(self, step: int, max_steps: int) -> float:
        """Return the share of the run that is spent: of the budget, or of the steps without one."""
        if self.passes is not None:
            return float(self.ledger.passes / self.passes)
        return step / max_steps if max_steps > 0 else 0.0

    def crosses_mark(self, flag: str, spent_before: Fraction) -> bool:
        """Tell whether the ledger has passed one of the marks that `eval_passes` or `save_passes` sets.

        Args:
            flag: Which of the two.
            spent_before: Passes on the ledger before this batch.
        """
        distance = setting(self._args, flag)
        if distance is None:
            return False
        every = Fraction(str(distance))  # 0.1 is a tenth
        if every < 1 and self.passes is not None:
            every *= self.passes
        return self.ledger.passes // every > spent_before // every


def put_on_budget_clock(scheduler: Any, budget_now: Callable[[], Budget]) -> LambdaLR:
    """Let a learning-rate schedule read the passes that are spent, instead of counting its own steps.

    Args:
        scheduler: A schedule over as many steps as the budget has passes.
        budget_now: Returns the budget of the current run: a schedule may live longer than a run.

    Raises:
        ValueError: The schedule is no function of the step.
    """
    check_schedule(scheduler)
    end = budget_now().passes

    def on_clock(factor: Callable[[Any], float]) -> Callable[[int], float]:
        def at_passes_spent(_step: int) -> float:
            budget = budget_now()
            return factor(end if budget.is_spent else float(budget.ledger.passes))

        return at_passes_spent

    scheduler.lr_lambdas = [on_clock(factor) for factor in scheduler.lr_lambdas]
    driven: LambdaLR = scheduler
    return driven
