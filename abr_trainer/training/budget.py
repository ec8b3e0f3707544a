"""What a run may spend, in passes or in seconds: what is left of it, and what follows from how much is spent."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from torch.optim.lr_scheduler import LambdaLR

from .config import setting
from .ledger import ComputeLedger
from .support import check_schedule

AGREED = "agreed_seconds"
"""Where a checkpoint has the seconds that all ranks count as spent."""


class Limit(NamedTuple):
    """What bounds a run: so many of something that the ledger counts.

    Attributes:
        unit: "passes" or "seconds", its name in the ledger.
        most: How many.
    """

    unit: str
    most: int

    @property
    def flag(self) -> str:
        return f"--max_{self.unit}"

    @property
    def counts_seconds(self) -> bool:
        return self.unit == "seconds"

    def done(self, ledger: ComputeLedger) -> float:
        """Return how many are on a ledger, at most all, for a bar: other ranks may have other seconds."""
        return min(float(getattr(ledger, self.unit)), float(self.most))


def limit_of(args: Any) -> Limit | None:
    """Return what bounds a run with these arguments of a trainer; None if it ends by its steps."""
    for unit in ("passes", "seconds"):
        if (most := setting(args, f"max_{unit}")) is not None:
            return Limit(unit, most)
    return None


class Budget:
    """`max_passes` or `max_seconds`, and what is spent of it.

    Seconds differ from rank to rank. So each pass carries those of each rank to the others, and the greatest count.
    Everything here follows from that number, never from the clock of a rank.

    Args:
        args: The arguments of the trainer. Without a budget in them the run ends by its steps.
        ledger: What is spent.

    Attributes:
        agreed_seconds: Seconds that are spent, the same on all ranks; 0 unless `max_seconds` is given.
    """

    def __init__(self, args: Any, ledger: ComputeLedger) -> None:
        self._args = args
        self.ledger = ledger
        self.agreed_seconds = 0.0

    @property
    def limit(self) -> Limit | None:
        return limit_of(self._args)

    @property
    def counts_seconds(self) -> bool:
        limit = self.limit
        return limit is not None and limit.counts_seconds

    @property
    def spent(self) -> Fraction | float:
        """Passes that are spent, or seconds under a budget of seconds."""
        return self.agreed_seconds if self.counts_seconds else self.ledger.passes

    @property
    def left(self) -> float:
        """The whole passes that may still be begun, at what the last one cost; infinite without a budget, and as long
        as seconds are left.
        """
        limit = self.limit
        if limit is None:
            return math.inf
        if limit.counts_seconds:
            return math.inf if self.spent < limit.most else 0.0
        return math.floor((limit.most - self.ledger.passes) / self.ledger.pass_cost)

    @property
    def most_repeats(self) -> float:
        """The most updates on a batch whose first pass is under way: its seconds are spent, so it gets one."""
        return max(1.0, self.left) if self.counts_seconds else self.left

    @property
    def is_spent(self) -> bool:
        """Whether no further pass may begin: no whole one fits into the budget, or its seconds are over."""
        return self.left < 1

    def measured(self, batch: Any) -> tuple[float, ...]:
        """Return what this rank tells the others at a pass over a batch: its seconds so far, if these are bounded."""
        return (self.ledger.seconds + batch.seconds,) if self.counts_seconds else ()

    def agree(self, greatest: Sequence[float]) -> None:
        """Take the greatest of what `measured` returned on all ranks for what is spent."""
        self.agreed_seconds = max(self.agreed_seconds, *greatest, 0.0)

    def progress(self, step: int, max_steps: int) -> float:
        """Return the share of the run that is spent, below 1: of the budget, or of the steps without one."""
        limit = self.limit
        if limit is None:
            return step / max_steps if max_steps > 0 else 0.0
        share = float(self.spent / limit.most)
        return min(share, math.nextafter(1.0, 0.0)) if limit.counts_seconds else share

    def marks_passed(self, flag: str) -> int:
        """Return how many of the marks are passed that `eval_passes` or `save_passes` sets, each at equal distances.

        Args:
            flag: Which of the two. Below 1 it is a share of the budget, whatever that counts; else it counts passes.
        """
        distance, limit = setting(self._args, flag), self.limit
        if distance is None:
            return 0
        every = Fraction(str(distance))  # 0.1 is a tenth
        if every >= 1 or limit is None:
            return int(self.ledger.passes // every)
        return int(Fraction(self.spent) // (every * Fraction(limit.most)))

    # ---- Checkpoints ----

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint must hold beside the ledger."""
        return {AGREED: self.agreed_seconds} if self.counts_seconds else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the state in a checkpoint, that of the ledger included."""
        self.agreed_seconds = _seconds_in(state) if self.counts_seconds else 0.0

    def is_spent_in(self, state: Mapping[str, Any]) -> bool:
        """Tell whether the state in a checkpoint leaves nothing of this budget; False if it does not tell."""
        limit = self.limit
        if limit is None or "ledger" not in state:
            return False
        if limit.counts_seconds:
            return _seconds_in(state) >= limit.most
        return limit.most - Fraction(state["ledger"]["passes"]) < 1


def _seconds_in(state: Mapping[str, Any]) -> float:
    """Return the seconds that were spent before a checkpoint, by the main process if the run was not bounded by
    them.
    """
    return float(state.get(AGREED, state["ledger"]["seconds"]))


def put_on_budget_clock(scheduler: Any, budget_now: Callable[[], Budget]) -> LambdaLR:
    """Let a learning-rate schedule read the passes or seconds that are spent, instead of counting its own steps.

    Args:
        scheduler: A schedule over as many steps as the budget has passes or seconds.
        budget_now: Returns the budget of the current run: a schedule may live longer than a run.

    Raises:
        ValueError: The schedule is no function of the step.
    """
    limit = budget_now().limit
    assert limit is not None
    check_schedule(scheduler, limit.flag)

    def on_clock(factor: Callable[[Any], float]) -> Callable[[int], float]:
        def at_what_is_spent(_step: int) -> float:
            budget = budget_now()
            return factor(limit.most if budget.is_spent else float(budget.spent))

        return at_what_is_spent

    scheduler.lr_lambdas = [on_clock(factor) for factor in scheduler.lr_lambdas]
    driven: LambdaLR = scheduler
    return driven
