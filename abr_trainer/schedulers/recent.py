"""Statistics of recent losses, which several rules use."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

MIN_HISTORY = 10
"""Number of losses that are needed before another is compared with them."""

MAD_TO_SIGMA = 1.4826
"""Scales the median absolute deviation to the standard deviation of a normal distribution."""


LARGEST = 1e50
"""Losses are compared up to this one, far above those of fp32: the squares of the variances of larger ones are not
finite.
"""


def bounded(loss: float) -> float:
    """Return a finite loss, or the nearest one that can be compared.

    >>> bounded(3.5), bounded(-1e300)
    (3.5, -1e+50)
    """
    return max(-LARGEST, min(loss, LARGEST))


def median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the median and the scaled median absolute deviation, which estimate mean and standard deviation robustly.

    >>> median_and_spread([1.0, 2.0, 3.0, 4.0, 90.0])
    (3.0, 1.4826)
    """
    level = statistics.median(values)
    return level, MAD_TO_SIGMA * statistics.median(abs(value - level) for value in values)


def share_below(loss: float, recent: Sequence[float]) -> float:
    """Return the share of the recent losses that a loss exceeds, after the trend of all of them is removed.

    With the trend, no loss would be high while losses fall.

    >>> share_below(3.5, [3.0, 2.0, 4.0, 3.0])
    0.5
    >>> share_below(2.6, [6.0, 5.0, 4.0, 3.0])
    1.0
    """
    *others, own = without_trend([*recent, loss])
    return sum(other < own for other in others) / len(others)


def without_trend(losses: Sequence[float]) -> list[float]:
    """Return the residuals of successive losses from their regression line.

    >>> without_trend([3.0, 2.0, 1.0])
    [0.0, 0.0, 0.0]
    """
    losses = [bounded(loss) for loss in losses]
    line = statistics.linear_regression(range(len(losses)), losses)
    return [loss - (line.intercept + line.slope * i) for i, loss in enumerate(losses)]
