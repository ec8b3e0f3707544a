"""Drop rows whose loss is an outlier among recent rows of about the same length."""

from __future__ import annotations

import copy
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .recent import bounded
from .rows import Row, RowRule

LEAST_ROWS = 16
"""Number of rows to remember before any is dropped, and least number of rows for the level at a time."""

MANY_ROWS = 256
"""Remembered rows from which on a row is judged by these alone, not also by the rows beside it."""

REFITS = 8
"""Fit again once the number of new rows is this fraction (1/8) of the remembered ones."""

ANCHOR_ROWS, ANCHOR_BATCHES = 64, 15
"""The newest rows, which give the current level. If two thirds of them are high, the data have changed."""

PATIENCE = 10
"""If most rows of this many batches in a row are dropped, the data have changed."""

ASSUMED_SPREAD, ASSUMED_ROWS = 0.08, 16
"""Assumed spread of long rows, as a share of the level, and its weight, as a number of rows."""

LEAST_ASSUMED_SPREAD = 0.1
"""Least assumed spread, in nats: losses with a low level do not scatter less."""

LEAST_SPREAD = 0.02
"""Least spread of long rows, as a share of the level, so that nearly equal rows do not make others outliers."""

SHORTNESS, ASSUMED_SHORTNESS = (0.0, 2.0, 8.0, 32.0, 128.0, 512.0), 32.0
"""Values to try for `Fit.shortness`, and the value to use if all rows have about the same length."""

SHORTNESS_WEIGHT = 2.0
"""Evidence in nats needed for each step away from the assumed shortness."""

TARGETS_SKEW = 2.0
"""Skewness of the loss of a single target: that of an exponential distribution."""

LEVEL_STEP = 0.15
"""Standard deviation of the step in level from one length to twice that length, as a share of the level."""

SMALLEST_RATIO = 0.75
"""Least factor for scaling down the spread of older rows with the level."""

MEDIAN_VARIANCE = math.pi / 2
"""Variance of the median of n normal values, times n."""

QUARTILE_TO_SIGMA = 1 / 0.6745
"""Scales the distance of a quartile from the median to the standard deviation of a normal distribution."""

ROUNDS = 5
"""Most iterations for separating good rows from others; three are usually enough."""

FEW, CAUTION = 1 / 128, 1.5
"""If a smaller share of the remembered rows stands out, the limit is this many times as far from the level."""


class Remembered(NamedTuple):
    """What the rule remembers about a row."""

    loss: float
    targets: int
    batch: int


class Estimate(NamedTuple):
    """An estimate of a level in nats, and its variance."""

    value: float
    variance: float


@dataclass(frozen=True)
class Fit:
    """Level and spread of good rows by length, fitted to the remembered rows.

    Attributes:
        levels: Median loss of good rows by length class: the bit length of their number of targets.
        spread: Standard deviation of very long rows, in nats.
        shortness: The loss of a row with n targets has `1 + shortness / n` times the variance of a very long row.
        caution: Factor on the distance from the level: `CAUTION` if few rows stand out, else 1.
    """

    levels: dict[int, Estimate]
    spread: float
    shortness: float
    caution: float

    def level(self, targets: int) -> Estimate:
        """Return the level at a length; for lengths outside the known range, that of the nearest one."""
        length = targets.bit_length()
        nearest = min(max(length, min(self.levels)), max(self.levels))
        level, variance = self.levels[nearest]
        return Estimate(level, variance + abs(length - nearest) * (LEVEL_STEP * level) ** 2)

    def deviation(self, targets: int) -> float:
        """Return the standard deviation of a new row's loss from the level at its length."""
        return math.sqrt(self.spread**2 * (1 + self.shortness / targets) + self.level(targets).variance)

    def limit(self, targets: int, sigmas: float) -> float:
        """Return the loss above which a row is dropped."""
        far = self.caution * sigmas
        return self.level(targets).value + distance(self.deviation(targets), far, self.shortness, targets)


@dataclass
class RobustRows(RowRule):
    """Drop a row whose mean loss is far above the level of the recent rows of its length.

    The last `window` rows are remembered, including dropped ones. Every few rows they are separated again into good
    ones and others. So a broken row that was trained on stops counting once it is recognised, and a good row that was
    dropped counts again.

    - Level: the median of the good rows of the last batches, by length. The spread is measured around the level at
      each time, so that a falling loss does not increase it.
    - Spread: the mean loss of few targets scatters more than that of many. The variance is `a + b / targets`, and the
      limit allows for the skewness of such means. Both are estimated from the remembered rows; while there are few,
      assumed values are mixed in.
    - For any spread, the targets of a dropped row must together be less likely than those of a typical row by
      `sigmas ** 2 / 2` nats, as for a normal value at `sigmas` deviations. This protects rows with one target: of the
      rows of a calibrated classifier with two classes, at most 0.012 % lose 9 nats.

    If fewer than one in 128 of the remembered rows stands out, the data look clean, and the limit is half as far again
    from the level. This keeps most of the odd rows of clean data.

    While fewer than 256 rows are remembered, the rows of a micro-batch count among them when it is judged. So
    broken rows are found from the first batch on, although losses fall fast there.

    No row is dropped before 16 rows are known, or while fewer than two thirds of the remembered rows look good,
    because then there are several kinds of data. We assume that the data have changed, and use the new level, if two
    thirds of the last 64 rows (or of the last 15 batches, if these have fewer rows) are above the limit, or most rows
    of ten batches in a row.

    The rule does not see the text. It drops good rows of another kind, such as another language, if they are a small
    share. It does not find broken rows that are as likely as good ones.

    Attributes:
        sigmas: Distance from the level, in standard deviations of rows of that length, beyond which a row is dropped.
        window: Number of recent rows to remember.
        low: Also drop rows whose loss is below this share of the level and as many deviations below it: duplicated
            text that the model has memorised. In [0, 1); 0 ignores low losses.
    """

    sigmas: float = 4.25
    window: int = 256
    low: float = 0.0
    history: deque[Remembered] = field(init=False, repr=False)
    fit: Fit | None = field(init=False, repr=False, default=None)
    rows_since_fit: int = field(init=False, repr=False, default=0)
    batches_in_a_row: int = field(init=False, repr=False, default=0)

    def __post_init__(self) -> None:
        if not self.sigmas > 0:
            raise ValueError(f"`row_sigmas` must be positive, got {self.sigmas}.")
        if self.window < ANCHOR_ROWS:
            raise ValueError(f"`row_window` must be at least {ANCHOR_ROWS}, got {self.window}.")
        if not 0 <= self.low < 1:
            raise ValueError(f"`low` must be at least 0 and below 1, got {self.low}.")
        self.history = deque(maxlen=self.window)

    def beside(self, rows: Sequence[Row]) -> RobustRows:
        if len(self.history) >= min(self.window, MANY_ROWS) or not rows:
            return self
        known = [*self.history, *map(remembered, rows)]
        if len(known) < LEAST_ROWS:
            return self
        judge = copy.copy(self)
        judge.fit = fitted(known, self.sigmas)
        return judge

    def decide(self, row: Row) -> bool:
        if self.fit is None:
            return True
        return self.lowest(self.fit, row.targets) <= bounded(row.loss) <= self.fit.limit(row.targets, self.sigmas)

    def lowest(self, fit: Fit, targets: int) -> float:
        """Return the loss below which a row of this length is dropped."""
        if not self.low:
            return -math.inf
        level = fit.level(targets).value
        return level - max((1 - self.low) * level, self.sigmas * fit.deviation(targets))

    def evidence(self, row: Row) -> dict[str, float]:
        numbers: dict[str, float] = {"rows remembered": len(self.history)}
        if self.fit is not None:
            numbers |= {
                "level at this length": self.fit.level(row.targets).value,
                "spread at this length": self.fit.deviation(row.targets),
                "row_sigmas": self.sigmas,
                "caution": self.fit.caution,
                "limit": self.fit.limit(row.targets, self.sigmas),
            }
            if self.low:
                numbers["lowest"] = self.lowest(self.fit, row.targets)
        return numbers

    def observe(self, rows: Sequence[Row], kept: Sequence[bool]) -> None:
        self.batches_in_a_row = self.batches_in_a_row + 1 if 2 * sum(kept) < len(kept) else 0
        if self.batches_in_a_row >= PATIENCE:
            self.history.clear()
            self.fit, self.rows_since_fit, self.batches_in_a_row = None, 0, 0
        self.history.extend(map(remembered, rows))
        self.rows_since_fit += len(rows)
        if len(self.history) >= LEAST_ROWS and REFITS * self.rows_since_fit >= len(self.history):
            self.fit = fitted(list(self.history), self.sigmas)
            self.rows_since_fit = 0

    def state_dict(self) -> dict[str, Any]:
        fit = self.fit
        return {
            "history": [list(row) for row in self.history],
            "rows_since_fit": self.rows_since_fit,
            "batches_in_a_row": self.batches_in_a_row,
            "levels": None if fit is None else [[length, *level] for length, level in fit.levels.items()],
            "spread": None if fit is None else fit.spread,
            "shortness": None if fit is None else fit.shortness,
            "caution": None if fit is None else fit.caution,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = deque((Remembered(*row) for row in state["history"]), maxlen=self.window)
        self.rows_since_fit = state["rows_since_fit"]
        self.batches_in_a_row = state["batches_in_a_row"]
        levels = state["levels"]
        self.fit = (
            None
            if levels is None
            else Fit(
                {length: Estimate(*level) for length, *level in levels},
                state["spread"],
                state["shortness"],
                state.get("caution", 1.0),
            )
        )


def remembered(row: Row) -> Remembered:
    return Remembered(bounded(row.loss), row.targets, row.batch)


def distance(deviation: float, sigmas: float, shortness: float, targets: float) -> float:
    """Return the distance above the level at which a row is as rare as a normal value `sigmas` above the mean.

    The mean of few targets is skewed. The second term corrects its quantiles (Cornish-Fisher expansion).
    """
    skew = TARGETS_SKEW / math.sqrt(targets) * math.pow(shortness / (shortness + targets), 1.5)
    return max((sigmas + (sigmas**2 - 1) / 6 * skew) * deviation, sigmas**2 / 2 / targets)


def fitted(rows: Sequence[Remembered], sigmas: float) -> Fit | None:
    """Separate good rows from others, and fit the good ones; None if they are fewer than two thirds."""
    chunks = chunks_of(rows)
    classes, inverse = by_length(chunks)
    times = [lower_third(row.loss for row in chunk) for chunk in chunks]
    times[-1] = min(times[-1], lower_third(row.loss for row in newest(rows)))
    scale = abs(times[-1])
    step = (LEVEL_STEP * scale) ** 2
    ratios = [1.0] * len(times)
    spread, shortness, middle, good = assumed_spread(scale), ASSUMED_SHORTNESS, lower_third, classes
    found, outside = 0, 0
    for turn in range(ROUNDS):
        values = {
            length: sorted([(loss - times[chunk]) * ratios[chunk] for loss, chunk in part])
            for length, part in good.items()
            if part
        }
        variances = {length: spread**2 * (1 + shortness * inverse[length]) for length in classes}
        own = middles(values, variances, middle)
        if not turn:
            own = believable(own, classes, sigmas, step)
        offsets = smoothed(own, step, classes)
        if turn:
            centred = {length: [each - offsets[length].value for each in part] for length, part in values.items()}
            shortness = shortness_of(centred, inverse)
            spread = spread_of(centred, inverse, shortness, scale)
            variances = {length: spread**2 * (1 + shortness * inverse[length]) for length in classes}
        reach = {
            length: distance(math.sqrt(variance + offsets[length].variance), sigmas, shortness, 1 / inverse[length])
            for length, variance in variances.items()
        }
        levels: list[list[float]] = [[] for _ in chunks]
        good, outside = {}, 0
        for length, part in classes.items():
            level, far = offsets[length].value, reach[length]
            beyond = [(loss - times[chunk]) * ratios[chunk] - level for loss, chunk in part]
            good[length] = inside = [row for row, by in zip(part, beyond, strict=True) if -far <= by <= far]
            outside += sum(by > far for by in beyond)
            for loss, chunk in inside:
                levels[chunk].append(loss - level / ratios[chunk])
        found, before = sum(map(len, good.values())), found
        if not found or (turn > 1 and found == before):
            break
        middle = median
        times = [
            median(part) if 3 * len(part) >= LEAST_ROWS else time for part, time in zip(levels, times, strict=True)
        ]
        ratios = [min(1.0, max(SMALLEST_RATIO, times[-1] / time)) if time > 0 else 1.0 for time in times]
    if 3 * found < 2 * len(rows):
        return None
    typical = sum(variances[length] * len(part) for length, part in classes.items()) / len(rows)
    unknown = MEDIAN_VARIANCE * typical / max(1, len(levels[-1]))
    return Fit(
        {length: Estimate(times[-1] + value, variance + unknown) for length, (value, variance) in offsets.items()},
        spread,
        shortness,
        CAUTION if outside < FEW * len(rows) else 1.0,
    )


def chunks_of(rows: Sequence[Remembered]) -> list[Sequence[Remembered]]:
    """Return the rows in chunks of successive batches, the oldest first.

    Each chunk has at least `LEAST_ROWS` rows, or an eighth of all rows if that is more, for a more certain level.
    """
    size = max(LEAST_ROWS, len(rows) // 8)
    cuts = [len(rows)]
    for i in range(len(rows) - size, size - 1, -1):
        if cuts[-1] - i >= size and rows[i].batch != rows[i - 1].batch:
            cuts.append(i)
    cuts = [0, *reversed(cuts)]
    return [rows[start:stop] for start, stop in itertools.pairwise(cuts)]


def by_length(
    chunks: Sequence[Sequence[Remembered]],
) -> tuple[dict[int, list[tuple[float, int]]], dict[int, float]]:
    """Return losses with the index of their chunk, and the mean of 1 / targets, by length class."""
    classes: dict[int, list[tuple[float, int]]] = {}
    inverse: dict[int, float] = {}
    for index, chunk in enumerate(chunks):
        for loss, targets, _ in chunk:
            length = targets.bit_length()
            classes.setdefault(length, []).append((loss, index))
            inverse[length] = inverse.get(length, 0.0) + 1 / targets
    return classes, {length: total / len(classes[length]) for length, total in inverse.items()}


def newest(rows: Sequence[Remembered]) -> Sequence[Remembered]:
    """Return the rows of the last batches, from which the current level is estimated."""
    first = rows[-1].batch - ANCHOR_BATCHES
    return [row for row in rows[-ANCHOR_ROWS:] if row.batch > first]


def middles(
    values: Mapping[int, list[float]], variances: Mapping[int, float], middle: Callable[[list[float]], float]
) -> dict[int, Estimate]:
    """Return the middle of the values of each length class, with its variance."""
    return {
        length: Estimate(middle(part), MEDIAN_VARIANCE * variances[length] / len(part))
        for length, part in values.items()
    }


def believable(
    levels: Mapping[int, Estimate], classes: Mapping[int, Sequence[object]], sigmas: float, step: float
) -> dict[int, Estimate]:
    """Leave out levels of length classes with few rows, and levels too far from that of the largest class."""
    largest = max(classes, key=lambda length: len(classes[length]))
    return {
        length: level
        for length, level in levels.items()
        if length == largest
        or (
            2 * len(classes[length]) >= LEAST_ROWS
            and abs(level.value - levels[largest].value) <= sigmas * math.sqrt(abs(length - largest) * step)
        )
    }


def smoothed(own: Mapping[int, Estimate], step: float, lengths: Iterable[int]) -> dict[int, Estimate]:
    """Return levels for these length classes and all between, smoothed over neighbouring classes.

    Args:
        own: Estimates from the rows of each class; classes without rows are missing.
        step: Variance of the difference between two neighbouring classes.
    """
    between = sorted(lengths)
    between = list(range(between[0], between[-1] + 1))
    sweeps: list[dict[int, Estimate | None]] = []
    for order in (between, between[::-1]):
        known: Estimate | None = None
        sweeps.append({})
        for length in order:
            known = None if known is None else Estimate(known.value, known.variance + step)
            sweeps[-1][length] = known
            known = pooled(known, own.get(length))
    up, down = sweeps
    levels = {length: pooled(pooled(up[length], own.get(length)), down[length]) for length in between}
    return {length: level for length, level in levels.items() if level is not None}


def pooled(one: Estimate | None, other: Estimate | None) -> Estimate | None:
    """Combine two independent estimates of a number.

    >>> pooled(Estimate(1.0, 0.5), Estimate(3.0, 0.5))
    Estimate(value=2.0, variance=0.25)
    """
    if one is None or other is None:
        return one or other
    total = one.variance + other.variance
    value = (one.value * other.variance + other.value * one.variance) / total
    return Estimate(value, one.variance * other.variance / total)


def shortness_of(centred: Mapping[int, list[float]], inverse: Mapping[int, float]) -> float:
    """Return the value of `Fit.shortness` with the highest likelihood, for Laplace-distributed distances.

    Args:
        centred: Distances from the level, by length class.
        inverse: Mean of 1 / targets, by length class.
    """
    if len(centred) == 1:
        return ASSUMED_SHORTNESS
    sums = [(sum(map(abs, part)), len(part), inverse[length]) for length, part in centred.items()]
    total = sum(count for _, count, _ in sums)
    assumed = SHORTNESS.index(ASSUMED_SHORTNESS)

    def cost(index: int) -> float:
        scales = [math.sqrt(1 + SHORTNESS[index] * each) for _, _, each in sums]
        mean = sum(deviations / scale for (deviations, _, _), scale in zip(sums, scales, strict=True)) / total
        logarithms = sum(count * math.log(scale) for (_, count, _), scale in zip(sums, scales, strict=True))
        return total * math.log(mean or 1e-9) + logarithms + SHORTNESS_WEIGHT * abs(index - assumed)

    return SHORTNESS[min(range(len(SHORTNESS)), key=cost)]


def spread_of(
    centred: Mapping[int, list[float]], inverse: Mapping[int, float], shortness: float, level: float
) -> float:
    """Return the spread of very long rows: that of the wider side, averaged with `ASSUMED_ROWS` rows as assumed."""
    values: list[float] = []
    for length, part in centred.items():
        scale = math.sqrt(1 + shortness * inverse[length])
        values += [each / scale for each in part]
    values.sort()
    quarter = len(values) // 4
    seen = QUARTILE_TO_SIGMA * max(-values[quarter], values[-1 - quarter])
    squares = ASSUMED_ROWS * assumed_spread(level) ** 2 + len(values) * seen**2
    return max(math.sqrt(squares / (ASSUMED_ROWS + len(values))), LEAST_SPREAD * level)


def assumed_spread(level: float) -> float:
    """Return the assumed spread of very long rows, in nats."""
    return max(ASSUMED_SPREAD * level, LEAST_ASSUMED_SPREAD)


def lower_third(values: Iterable[float]) -> float:
    """Return the lower tercile. If broken rows are a minority, it is the value of a good one."""
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 3]


def median(values: Iterable[float]) -> float:
    """Return the median; for an even number of values the upper of the two in the middle."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2]
