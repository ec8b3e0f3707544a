"""The curves of runs and arms: scores and repeats over passes, epochs and losses, aligned and averaged."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..records.files import TRAINER_STATE, Damaged, read_json, updates_of
from ..records.shapes import REAL, STATE, Maybe, misfit
from .scores import PERPLEXITY, Score
from .statistics import mean_interval

TOO_LARGE = 1e100

BINS = 20

CLOCKS = {"scheduler": "passes", "prompt": "epoch"}
"""What learning curves run over, by what is varied. Whoever repeats a batch has seen less at the same compute; what a
prompt costs is no matter of choice, and all have seen the same after as many epochs."""

SAME_TIME = {"passes": 1.0, "epoch": 1e-6}
"""By how much less one run may have spent than another that still counts as having spent the same."""

SAME_SHARE_OF_SECONDS = 0.05
"""The same of seconds, as a share of them: a run ends with the batch under way."""

Curve = list[list[Any]]
"""`[passes or seconds spent or epochs, validation score]` for each evaluation of a run, in order; None for one that is
not finite."""


def finite(value: float) -> float | None:
    """Return None for a score that is not finite, or so large that its square is not."""
    return value if math.isfinite(value) and abs(value) < TOO_LARGE else None


def clock_of(varied: str, match: str) -> str:
    """Return what the curves of a comparison run over: "passes", "seconds" or "epoch"."""
    return "seconds" if varied == "scheduler" and match == "seconds" else CLOCKS[varied]


def on_clock(batches: list[dict[str, Any]], clock: str) -> list[dict[str, Any]]:
    """Return the batches of a run with what was spent until their end under `clock`.

    A trace has the seconds of each batch, but the passes of all batches so far.

    >>> on_clock([{"seconds": 0.5}, {"seconds": 0.25}], "seconds")
    [{'seconds': 0.5}, {'seconds': 0.75}]
    """
    if clock != "seconds":
        return batches
    spent = itertools.accumulate(batch["seconds"] for batch in batches)
    return [{**batch, "seconds": seconds} for batch, seconds in zip(batches, spent, strict=True)]


def learning_curve(
    directory: Path,
    batches: list[dict[str, Any]],
    results: dict[str, float],
    metric: str = "eval_perplexity",
    clock: str = "passes",
    kept: int | None = None,
) -> Curve:
    """Return the evaluations of a run: those in the state of its trainer, and what it has reached in the end.

    Args:
        metric: Of the evaluations.
        batches: Its batches, see `on_clock`.
        clock: What to have them over: "passes", "seconds" or "epoch".
        kept: The step of the model that a finished run has kept: its evaluation is the last point where the results
            hold none.
    """
    spent = {0: 0.0, **{batch["step"]: batch[clock] for batch in batches}}
    log = (read_json(directory / TRAINER_STATE, STATE) or {}).get("log_history", [])
    for logs in log:
        if wrong := misfit(logs, {metric: Maybe((REAL, None))}):
            raise Damaged(f"{directory / TRAINER_STATE} is damaged: {wrong}.")
    if clock == "epoch":
        spent |= {logs["step"]: logs["epoch"] for logs in log if "epoch" in logs}
    curve = {spent[logs["step"]]: finite(logs[metric]) for logs in log if metric in logs and logs["step"] in spent}
    of_kept = [logs[metric] for logs in log if metric in logs and logs["step"] == kept]
    reached = results.get(metric, of_kept[-1] if of_kept else None)
    if reached is not None and "train_passes" in results:
        end = max(spent.values()) if clock == "epoch" else results[f"train_{clock}"]
        curve[end] = finite(reached)
    return [[at, value] for at, value in sorted(curve.items())]


def loss_curve(batches: list[dict[str, Any]]) -> Curve:
    """Return the mean first-pass loss in equal parts of a run, each at the mean epoch of its batches.

    >>> loss_curve([{"epoch": 0.5, "loss": 2.0}, {"epoch": 1.0, "loss": None}])
    [[0.5, 2.0], [1.0, None]]
    """
    parts: list[list[dict[str, Any]]] = [[] for _ in range(BINS)]
    for i, batch in enumerate(batches):
        parts[i * BINS // len(batches)].append(batch)
    curve: Curve = []
    for part in filter(None, parts):
        losses = [batch["loss"] for batch in part if batch["loss"] is not None]
        epoch = statistics.fmean(batch["epoch"] for batch in part)
        curve.append([epoch, statistics.fmean(losses) if losses else None])
    return curve


def mean_curve(curves: list[Curve], score: Score = PERPLEXITY, clock: str = "passes") -> list[dict[str, float]]:
    """Average the learning curves of several seeds over passes or seconds spent, or over epochs.

    Where all have as many evaluations, the i-th of each are taken together; else see `aligned`. Where one is not
    finite there is no mean.

    Returns:
        A list of `passes` (or what `clock` is), `mean`, `low` and `high`: one standard deviation around the mean.
    """
    points = []
    for evaluations in zip(*aligned(curves, score), strict=True):
        values = [value for _, value in evaluations]
        if None in values:
            continue
        mean, deviation = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        points.append(
            {clock: _mean_time(evaluations), "mean": mean, "low": mean - deviation, "high": mean + deviation}
        )
    return points


def _mean_time(evaluations: Iterable[Sequence[Any]]) -> float:
    return statistics.fmean(at for at, _ in evaluations)


def aligned(curves: list[Curve], score: Score = PERPLEXITY) -> list[Curve]:
    """Return curves of equally many points: those given, or interpolated at the evaluations of the shortest run."""
    if not curves or not all(curves):
        return []
    if len({len(curve) for curve in curves}) == 1:
        return curves
    grid = [at for at, _ in min(curves, key=lambda curve: (curve[-1][0], len(curve)))]
    return [interpolate(curve, grid, score) for curve in curves]


def relative_curve(
    curves: dict[int, Curve], reference: dict[int, Curve], score: Score = PERPLEXITY, clock: str = "passes"
) -> list[dict[str, float | None]]:
    """Compare the learning curves of an arm with those of the reference, seed by seed, at equal compute or epochs.

    Args:
        curves: By seed.
        reference: The same, of the reference; interpolated where the arm was evaluated. A run that ended less than a
            pass earlier, or a twentieth of its seconds, counts as having spent the same.

    Returns:
        A list of `passes` (or what `clock` is) and `mean`, in percent of the reference for a score in logs, else the
        plain difference, with the ends `low` and `high` of a 95 % t interval, from two seeds on. Where one of the
        curves is not finite there is no point.
    """

    def change(value: float, was: float) -> float:
        return 100 * (value / was - 1) if score.in_logs else difference(value, was, score)

    changes = []
    seeds = [seed for seed in curves if reference.get(seed)]
    for seed, curve in zip(seeds, aligned([curves[seed] for seed in seeds], score), strict=False):
        end = reference[seed][-1][0]
        margin = SAME_SHARE_OF_SECONDS * end if clock == "seconds" else SAME_TIME[clock]
        shared = [point for point in curve if point[0] < end + margin]
        before = interpolate(reference[seed], [at for at, _ in shared], score)
        changes.append(
            [
                (at, None if value is None or was is None else change(value, was))
                for (at, value), (_, was) in zip(shared, before, strict=True)
            ]
        )
    points: list[dict[str, float | None]] = []
    for evaluations in zip(*changes, strict=False):
        values = [change for _, change in evaluations if change is not None]
        if len(values) < len(evaluations):
            continue
        low, high = mean_interval(values) or (None, None)
        points.append({clock: _mean_time(evaluations), "mean": statistics.fmean(values), "low": low, "high": high})
    return points


def difference(value: float, other: float, score: Score) -> float:
    """Return how far a value is from another. Scores count cases: the same number of cases is the same difference,
    though what is left of it in the last digits of floats may scatter.
    """
    return value - other if score.in_logs else round(value - other, 12)


def interpolate(curve: Curve, grid: list[float], score: Score = PERPLEXITY) -> Curve:
    """Return a learning curve at other numbers of passes, linear in the score, or in its logarithm: in nats.

    >>> [(passes, round(perplexity, 3)) for passes, perplexity in interpolate([[0, 16.0], [10, 4.0]], [0, 5, 10])]
    [(0, 16.0), (5, 8.0), (10, 4.0)]
    """
    times, values = zip(*curve, strict=True)
    numbers = np.array([math.nan if value is None else value for value in values])
    if not score.in_logs:
        return [[at, finite(float(value))] for at, value in zip(grid, np.interp(grid, times, numbers), strict=True)]
    nats = np.interp(grid, times, np.log(numbers))
    return [[at, finite(math.exp(value))] for at, value in zip(grid, nats, strict=True)]


def over_time(batches: list[dict[str, Any]], end: float, clock: str = "passes") -> list[dict[str, float]]:
    """Return mean repeats and the share of skipped batches in equal parts of the passes or seconds up to `end`."""
    return [
        {
            clock: middle,
            "repeats": statistics.fmean(updates_of(batch) for batch in part),
            "skipped": statistics.fmean(batch["repeats"] == 0 for batch in part),
            "batches": len(part),
        }
        for middle, part in equal_parts(batches, end, clock)
    ]


def equal_parts(
    batches: list[dict[str, Any]], end: float, clock: str = "passes"
) -> list[tuple[float, list[dict[str, Any]]]]:
    """Return the batches in equal parts of the passes or seconds up to `end`, each with its middle, and none empty."""
    bins: list[list[dict[str, Any]]] = [[] for _ in range(BINS)]
    for batch in batches:
        bins[min(BINS - 1, int(batch[clock] / end * BINS))].append(batch)
    return [((i + 0.5) * end / BINS, part) for i, part in enumerate(bins) if part]


def over_loss(batches: list[dict[str, Any]], least: float, most: float) -> list[dict[str, float]]:
    """Return the repeats of batches by their first-pass loss, in equal steps of it between `least` and `most`."""
    bins: list[list[int]] = [[] for _ in range(BINS)]
    width = (most - least) / BINS or 1.0
    for batch in batches:
        if batch["loss"] is not None:
            bins[min(BINS - 1, int((batch["loss"] - least) / width))].append(batch["repeats"])
    return [
        {
            "loss": least + (i + 0.5) * width,
            "mean": statistics.fmean(repeats),
            "low": min(repeats),
            "high": max(repeats),
            "batches": len(repeats),
        }
        for i, repeats in enumerate(bins)
        if repeats
    ]


def over_passes(batches: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Return by how much the loss of a batch has changed when it is passed over the i-th time.

    Returns:
        A list of `pass` (from 1), `mean`, `low` and `high` (quartiles), of the loss minus the first-pass loss, in
        nats, and `batches`: how many got that far.
    """
    repeated = [batch["losses"] for batch in batches if len(batch["losses"]) > 1 and None not in batch["losses"]]
    points = []
    for i in range(max(map(len, repeated), default=0)):
        changes = [losses[i] - losses[0] for losses in repeated if len(losses) > i]
        low, high = (float(end) for end in np.percentile(changes, [25, 75]))
        points.append(
            {"pass": i + 1, "mean": statistics.fmean(changes), "low": low, "high": high, "batches": len(changes)}
        )
    return points
