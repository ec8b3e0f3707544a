"""What rules remember of the losses they have seen."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

MIN_HISTORY = 10
"""Losses to have seen before one is compared with them."""

MAD_TO_SIGMA = 1.4826
"""Scales the median absolute deviation to the standard deviation of a normal distribution."""


def median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the median and the scaled median absolute deviation: mean and standard deviation that outliers spare.

    >>> median_and_spread([1.0, 2.0, 3.0, 4.0, 90.0])
    (3.0, 1.4826)
    """
    level = statistics.median(values)
    return level, MAD_TO_SIGMA * statistics.median(abs(value - level) for value in values)


def share_below(loss: float, recent: Sequence[float]) -> float:
    """Return the share of the recent losses that a loss exceeds, once the trend of all of them is taken off.

    While losses fall, each is lower than those before it, and none would ever be high.

    >>> share_below(3.5, [3.0, 2.0, 4.0, 3.0])
    0.5
    >>> share_below(2.6, [6.0, 5.0, 4.0, 3.0])
    1.0
    """
    *others, own = without_trend([*recent, loss])
    return sum(other < own for other in others) / len(others)


def without_trend(losses: Sequence[float]) -> list[float]:
    """Return the distances of successive losses from the regression line through them.

    >>> without_trend([3.0, 2.0, 1.0])
    [0.0, 0.0, 0.0]
    """
    line = statistics.linear_regression(range(len(losses)), losses)
    return [loss - (line.intercept + line.slope * i) for i, loss in enumerate(losses)]
