"""Statistics of paired differences over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95
POWER = 0.8
RESAMPLES = 9999


def paired(differences: Sequence[float], lower_is_better: bool = True) -> dict[str, Any]:
    """Return statistics of paired differences over seeds.

    Decide by the t interval. With few seeds the percentile bootstrap is too narrow: for five normally distributed
    differences it covers the mean in 84 % of cases, not in 95 %.

    Returns:
        `seeds`, `mean`, `deviation`, and `wins` (number on the better side of 0). From two seeds on also `t_low`,
        `t_high`, `bootstrap_low` and `bootstrap_high`, the ends of 95 % intervals, and `detectable`: the difference
        that a t test at 5 % finds with 80 % power, given this deviation.

    >>> found = paired([-1.0, -2.0, -3.0])
    >>> found["mean"], found["wins"], round(found["t_low"], 2), round(found["t_high"], 2)
    (-2.0, 3, -4.48, 0.48)
    """
    count = len(differences)
    wins = sum(difference < 0 if lower_is_better else difference > 0 for difference in differences)
    found: dict[str, Any] = {"seeds": count, "wins": wins}
    if count == 0:
        return found
    found["mean"] = statistics.fmean(differences)
    if count == 1:
        return found
    found["deviation"] = statistics.stdev(differences)
    if found["deviation"] == 0:
        ends = dict.fromkeys(("t_low", "t_high", "bootstrap_low", "bootstrap_high"), found["mean"])
        return found | ends | {"detectable": 0.0}
    found["t_low"], found["t_high"] = mean_interval(differences) or (math.nan, math.nan)
    resampled = stats.bootstrap((differences,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=0)
    found["bootstrap_low"], found["bootstrap_high"] = (float(end) for end in resampled.confidence_interval)
    found["detectable"] = detectable_in_errors(count) * found["deviation"] / math.sqrt(count)
    return found


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % t interval of a mean, or None for less than two values."""
    if len(values) < 2:
        return None
    if min(values) == max(values):
        return values[0], values[0]
    interval = stats.t.interval(CONFIDENCE, len(values) - 1, statistics.fmean(values), stats.sem(values))
    return float(interval[0]), float(interval[1])


def detectable_in_errors(count: int) -> float:
    """Return the mean that a two-sided paired t test at 5 % finds with 80 % power, in standard errors of the mean.

    >>> round(detectable_in_errors(5), 2), round(detectable_in_errors(100), 2)
    (3.76, 2.83)
    """
    freedom = count - 1
    limit = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))

    def missing(mean: float) -> float:
        return POWER - float(stats.nct.sf(limit, freedom, mean))  # the other tail is negligible

    return float(optimize.brentq(missing, 0.0, 2 * limit))


def verdict(found: dict[str, Any], planned: int, lower_is_better: bool = True) -> str:
    """Return the verdict on the results of `paired`, in words.

    Args:
        planned: Planned number of pairs. If some have diverged or failed, the others allow no verdict.

    >>> [verdict(paired(differences), 2) for differences in ([-1.0, -1.1], [1.0, 1.1], [1.0, -1.0], [-5.0])]
    ['better', 'worse', 'no evidence', 'no verdict: 1 of 2 pairs']
    """
    if found["seeds"] < planned:
        return f"no verdict: {found['seeds']} of {planned} pairs"
    if found["seeds"] < 2:
        return "no verdict: one seed"
    if found["deviation"] == 0:
        return "no verdict: the seeds do not differ" if found["mean"] else "no difference"
    if found["t_low"] <= 0 <= found["t_high"]:
        return "no evidence"
    return "better" if (found["mean"] < 0) == lower_is_better else "worse"
