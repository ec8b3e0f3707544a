"""What rules remember of the losses they have seen."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

MAD_TO_SIGMA = 1.4826
"""Scales the median absolute deviation to the standard deviation of a normal distribution."""


def median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the median and the scaled median absolute deviation: mean and standard deviation that outliers spare.

    >>> median_and_spread([1.0, 2.0, 3.0, 4.0, 90.0])
    (3.0, 1.4826)
    """
    level = statistics.median(values)
    return level, MAD_TO_SIGMA * statistics.median(abs(value - level) for value in values)


def share_below(value: float, values: Sequence[float]) -> float:
    """Return the share of `values` that lie below `value`.

    >>> share_below(3.0, [1.0, 2.0, 3.0, 4.0])
    0.5
    """
    return sum(other < value for other in values) / len(values)
