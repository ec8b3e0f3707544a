"""Skip batches whose loss is an outlier among the recent ones; another scheduler decides about the rest."""

from __future__ import annotations

import itertools
import math
import statistics
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .base import Observation, Outcome, WrappedScheduler
from .recent import MAD_TO_SIGMA, bounded

MIN_WINDOW = 10
"""Least window, and the number of losses that the classic rule needs before it skips a batch."""

ROUNDING = 1e-12
"""Least spread of the classic rule, as a share of the level: the mean of equal losses may be a little below them."""

STEP_TO_SIGMA = MAD_TO_SIGMA / math.sqrt(2)
"""Scales the median step from one loss to the next to a standard deviation. A step has the variance of two losses."""

MIN_SPREAD = 0.01
"""Least spread, as a share of the level, so that nearly equal losses do not make the next one an outlier."""

ASSUMED_SPREAD = 0.04
"""Assumed spread, as a share of the level. Measured on good batches of 512 tokens: 0.03 to 0.06."""

LEAST_ASSUMED_SPREAD = 0.1
"""Least assumed spread, in nats: losses with a low level do not scatter less."""

ASSUMED_STEPS = 10
"""Weight of the assumed spread, as a number of steps between losses."""

LEAST_HISTORY = 4
"""Number of losses that the robust rule needs before it skips a batch. With so few, its limit is twice as far from the
level, because level and spread are uncertain.
"""

TRIM = 4.0
"""Losses within this number of spreads from the level count as good when level and spread are estimated."""

ROUNDS = 6
"""Most iterations for separating good losses from others; two or three are usually enough."""


@dataclass
class StandoutSkip(WrappedScheduler):
    """Skip a batch if a number that it has is an outlier among the recent ones; otherwise ask `inner`.

    After `patience` skips in a row we assume that the data have changed: the history is cleared and built anew.

    Attributes:
        inner: The scheduler for all batches that are not outliers.
        sigmas: Distance from the level, in units of the spread.
        window: Number of recent batches to remember.
        patience: Most batches to skip in a row.
    """

    sigmas: float
    window: int
    patience: int
    history: deque[float] = field(init=False, repr=False)
    consecutive: int = field(init=False, repr=False, default=0)

    @abstractmethod
    def measured(self, observation: Observation) -> float | None:
        """Return the number to compare batches by; None if this batch has none."""

    @abstractmethod
    def stands_out(self, value: float) -> bool:
        """Tell whether a number is an outlier among the remembered ones."""

    def skips(self, observation: Observation) -> bool:
        value = self.measured(observation)
        return value is not None and self.stands_out(value)

    def decide(self, observation: Observation) -> int:
        return 0 if self.skips(observation) else super().decide(observation)

    def explain(self, observation: Observation) -> str:
        return self.reason if self.skips(observation) else super().explain(observation)

    def observe(self, outcome: Outcome) -> None:
        value = self.measured(outcome.observation)
        if value is not None:
            left_out = outcome.skipped and self.stands_out(value)
            self.history.append(value)
            self.consecutive = self.consecutive + 1 if left_out else 0
            if self.data_have_changed(left_out):
                self.history.clear()
                self.consecutive = 0
        super().observe(outcome)

    def remark(self, outcomes: Sequence[Outcome]) -> str | None:
        return self.remark_of_inner(outcomes)

    def data_have_changed(self, left_out: bool) -> bool:
        """Tell whether so many batches were skipped that the data must have changed.

        Args:
            left_out: Whether this rule skipped the last batch.
        """
        return self.consecutive >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"history": list(self.history), "consecutive": self.consecutive, **super().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = deque(state["history"], maxlen=self.window)
        self.consecutive = state["consecutive"]
        super().load_state_dict(state)


@dataclass
class OutlierSkip(StandoutSkip):
    """Skip a batch whose first-pass loss exceeds `level + sigmas * spread` of the recent losses; otherwise ask
    `inner`.
    """

    reason: ClassVar[str] = "outlier"
    min_history: ClassVar[int]

    sigmas: float = 4.0
    window: int = 100
    patience: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sigmas > 0:
            raise ValueError(f"`outlier_sigmas` must be positive, got {self.sigmas}.")
        if self.window < MIN_WINDOW:
            raise ValueError(f"`outlier_window` must be at least {MIN_WINDOW}, got {self.window}.")
        self.history = deque(maxlen=self.window)

    @abstractmethod
    def level_and_spread(self) -> tuple[float, float]:
        """Return the centre of the recent losses and their spread, both in nats."""

    def limits(self) -> dict[str, float]:
        """Return the limit `outlier above`, in nats, and the numbers that it is computed from."""
        level, spread = self.level_and_spread()
        return {
            "their level": level,
            "their spread": spread,
            "outlier_sigmas": self.sigmas,
            "outlier above": level + self.sigmas * spread,
        }

    def measured(self, observation: Observation) -> float | None:
        return bounded(observation.loss) if math.isfinite(observation.loss) else None

    def stands_out(self, value: float) -> bool:
        if len(self.history) < self.min_history:
            return False
        limits = self.limits()
        return value > limits["outlier above"] or value < limits.get("outlier below", -math.inf)

    def evidence(self, observation: Observation) -> dict[str, float]:
        numbers: dict[str, float] = {"losses remembered": len(self.history)}
        if len(self.history) >= self.min_history:
            numbers |= self.limits()
        return numbers | super().evidence(observation)


@dataclass
class ClassicOutlierSkip(OutlierSkip):
    """The published rule: mean and standard deviation of the recent losses, including outliers.

    Kept for comparison. A few outliers increase the standard deviation so much that the rule misses the next ones: on
    WikiText with one batch in ten replaced by random tokens it caught 5 of 23.
    """

    min_history: ClassVar[int] = MIN_WINDOW

    sigmas: float = 2.5

    def level_and_spread(self) -> tuple[float, float]:
        level = statistics.fmean(self.history)
        return level, max(statistics.stdev(self.history), ROUNDING * abs(level))


@dataclass
class RobustOutlierSkip(OutlierSkip):
    """Skip outliers by the level and spread of the recent losses that currently look good.

    All recent losses are remembered, including those of outliers, and each decision separates good ones from others
    again. It starts at the lower third of the losses, assuming that most losses there are good. Losses close to the
    level count as good, and level and spread are computed from these, until nothing changes. So a broken batch that
    was trained on stops counting once it is recognised, and a good batch that was skipped counts again. The spread
    comes from the steps between successive good losses, so that the fall of the loss at the start of a run does not
    increase it. While there are few steps, an assumed spread is mixed in: 4 % of the level, or 0.1 nats. If losses
    scatter more downwards, where there are no broken batches, that spread is used. The limit is wider while there are
    few losses: twice as far from the level with 4, 4 % farther with 100.

    With `low`, a loss is also an outlier if it is below `low * level` and more than `sigmas * spread` below the level.
    This finds duplicated text that the model has memorised. Do not use it if a run is meant to memorise its data.

    After `patience` skips in a row, or if more than half of the last `3 * patience` batches were skipped, we assume
    that the data have changed. New data that come in gradually count as good once they are two thirds of the batches.
    Good data that stand out and stay below half are skipped, because losses cannot distinguish them from broken data.
    The first four batches of a run are always trained on.

    Costs no pass, and about 0.2 ms per decision.

    Measured on batches of 512 tokens (see docs/measure/effectiveness.md): loss streams of WikiText-2 and DailyDialog,
    LoRA on two small models, with 5 to 25 % of the batches random, shuffled, noise or in another language. 95 to 100 %
    of these were caught, also with batches of one row. If good losses scatter by 20 % of their level, 1 % of good
    batches are skipped; by 50 %, 3 %. Broken or foreign text is missed if its loss is close to that of good text. If
    the loss jumps because the learning rate is too high, good batches are skipped until this counts as a change of the
    data.

    Attributes:
        low: Share of the level below which a loss is too low, in [0, 1). 0 ignores low losses.
    """

    min_history: ClassVar[int] = LEAST_HISTORY

    low: float = 0.0
    verdicts: deque[bool] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.low < 1:
            raise ValueError(f"`low` must be at least 0 and below 1, got {self.low}.")
        self.verdicts = deque(maxlen=3 * self.patience)

    def level_and_spread(self) -> tuple[float, float]:
        losses = list(self.history)
        level = sorted(losses)[(len(losses) - 1) // 3]
        spread = assumed_spread(level)
        if len(losses) > ASSUMED_STEPS:
            spread = max(spread, STEP_TO_SIGMA * steps(losses)[len(losses) // 4 - 1])
        good = [level]
        for _ in range(ROUNDS):
            reach = TRIM * spread * uncertainty(len(good))
            found = [loss for loss in losses if abs(loss - level) <= reach]
            if not found or found == good:
                break
            good = found
            level = statistics.median(good)
            spread = spread_of(good, level)
        highest = level + TRIM * spread * uncertainty(len(good))
        below = dips([loss for loss in losses if loss <= highest])
        if len(below) > 3:  # these are good losses, so they show how far good losses scatter
            spread = max(spread, MAD_TO_SIGMA * statistics.median(below))
        return level, spread * uncertainty(len(good)) * (1 + LEAST_HISTORY / len(losses))

    def limits(self) -> dict[str, float]:
        numbers = super().limits()
        if self.low:
            level = numbers["their level"]
            distance = max((1 - self.low) * abs(level), self.sigmas * numbers["their spread"])
            numbers["outlier below"] = level - distance
        return numbers

    def data_have_changed(self, left_out: bool) -> bool:
        self.verdicts.append(left_out)
        changed = super().data_have_changed(left_out) or 2 * sum(self.verdicts) > 3 * self.patience
        if changed:
            self.verdicts.clear()
        return changed

    def state_dict(self) -> dict[str, Any]:
        return {"verdicts": list(self.verdicts), **super().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.verdicts = deque(state.get("verdicts", ()), maxlen=3 * self.patience)
        super().load_state_dict(state)


def steps(losses: Sequence[float]) -> list[float]:
    """Return the absolute differences between successive losses, the smallest first.

    >>> steps([4.0, 3.0, 3.5])
    [0.5, 1.0]
    """
    return sorted(abs(after - before) for before, after in itertools.pairwise(losses))


def dips(losses: Sequence[float]) -> list[float]:
    """Return by how much losses are below the median of the five around them, for those that are. A trend has none.

    >>> dips([4.0, 3.0, 4.0, 9.0, 4.0, 2.0, 4.0])
    [1.0, 2.0]
    """
    middles = (statistics.median(losses[max(0, i - 2) : i + 3]) for i in range(len(losses)))
    return [middle - loss for middle, loss in zip(middles, losses, strict=True) if loss < middle]


def spread_of(losses: Sequence[float], level: float) -> float:
    """Return the spread of the steps, averaged with `ASSUMED_STEPS` steps of the assumed spread, in nats."""
    taken = len(losses) - 1
    seen = STEP_TO_SIGMA * statistics.median(steps(losses)) if taken else 0.0
    blend = (ASSUMED_STEPS * assumed_spread(level) + taken * seen) / (ASSUMED_STEPS + taken)
    return max(blend, MIN_SPREAD * abs(level))


def assumed_spread(level: float) -> float:
    """Return the assumed spread of good losses, in nats."""
    return max(ASSUMED_SPREAD * abs(level), LEAST_ASSUMED_SPREAD)


def uncertainty(count: int) -> float:
    """Return the factor by which the limit is wider for few losses, whose level and spread are uncertain.

    >>> [round(uncertainty(count), 3) for count in (1, 10, 100)]
    [1.732, 1.095, 1.01]
    """
    return math.sqrt(1 + 2 / count)
