"""The figures of the report on a comparison."""

from __future__ import annotations

from typing import Any

from ..comparison.arms import quoted
from ..comparison.curves import clock_of
from ..comparison.scores import score_of, sentence_case, words_for
from .figure import Figure, Series
from .verdicts import validation, what_varies

CLOCKS = {
    "passes": ("compute", "passes spent", "At the same number of passes, all schedulers have spent the same compute."),
    "seconds": ("time", "seconds of training", "Seconds of batches and of the wait for their data."),
}
"""What curves of schedulers run over, in words: for a title, for an axis, and in a sentence."""


def better_side(metric: str) -> str:
    return "Left" if score_of(metric).lower_is_better else "Right"


def final_figure(arms: list[dict[str, Any]], metric: str, varied: str) -> Figure:
    series = tuple(
        Series(
            arm["name"],
            x=tuple(value for value in arm[metric]["values"].values() if value is not None),
            low=(arm[metric]["interval"][0],) if arm[metric]["interval"] else (),
            high=(arm[metric]["interval"][1],) if arm[metric]["interval"] else (),
            center=arm[metric]["mean"],
        )
        for arm in arms
        if metric in arm
    )
    return Figure(
        "final",
        f"{sentence_case(words_for(metric))} at the end",
        f"Mean over seeds with its 95 % t interval, and each seed. {better_side(metric)} is better. All "
        f"{varied}s have the same seeds, and part of the variation is due to these. The next figure leaves it out.",
        "intervals",
        words_for(metric),
        varied,
        series,
        range_label="95 % t interval",
    )


def difference_figure(arms: list[dict[str, Any]], metric: str, reference: str, varied: str) -> Figure:
    before: dict[str, Any] = {}
    for arm in arms:
        if arm["name"] == reference:
            before = arm.get(metric, {}).get("values", {})
    series = []
    for arm in arms:
        found = arm[metric]["difference"] if metric in arm else {}
        if arm["name"] == reference or not found.get("seeds"):
            continue
        values = arm[metric]["values"]
        has_ends = "t_low" in found
        series.append(
            Series(
                arm["name"],
                x=tuple(
                    value - before[seed]
                    for seed, value in values.items()
                    if value is not None and before.get(seed) is not None
                ),
                low=(found["t_low"],) if has_ends else (),
                high=(found["t_high"],) if has_ends else (),
                inner=(found["bootstrap_low"], found["bootstrap_high"]) if has_ends else None,
                center=found["mean"],
            )
        )
    return Figure(
        "difference",
        f"Difference in {words_for(metric)} to {quoted(reference)}",
        "Mean over paired seeds, each seed, the 95 % t interval (thin) and that of the bootstrap (thick). "
        f"{better_side(metric)} of 0 is better than {quoted(reference)}. If the interval includes 0, the "
        "difference may be chance.",
        "intervals",
        f"{words_for(metric)} minus that of {quoted(reference)}",
        varied,
        tuple(series),
        reference=0.0,
        range_label="95 % t interval",
        inner_label="95 % bootstrap interval",
    )


def lines(arms: list[dict[str, Any]], key: str, x: str, y: str, band: bool = False) -> tuple[Series, ...]:
    """Return a line for each arm out of the points that it has under `key`."""

    def column(arm: dict[str, Any], name: str) -> tuple[float, ...]:
        return tuple(point[name] for point in arm[key])

    return tuple(
        Series(
            arm["name"],
            column(arm, x),
            column(arm, y),
            column(arm, "low") if band else (),
            column(arm, "high") if band else (),
        )
        for arm in arms
        if arm[key]
    )


def on_the_way(data: dict[str, Any], arms: list[dict[str, Any]]) -> tuple[Any, ...]:
    if what_varies(data) == "scheduler":
        clock = clock_of("scheduler", data["match"])
        return curves(arms, clock), relative_curves(arms, data["reference"], clock)
    return score_curves(data, arms), difference_curves(data, arms), loss_curves(arms)


def score_curves(data: dict[str, Any], arms: list[dict[str, Any]]) -> Figure:
    return Figure(
        "curves",
        f"{sentence_case(validation(data))} over epochs",
        "Mean over seeds and one standard deviation around it.",
        "lines",
        "epochs",
        validation(data),
        lines(arms, "curve", "epoch", "mean", band=True),
        range_label="one standard deviation",
    )


def difference_curves(data: dict[str, Any], arms: list[dict[str, Any]]) -> Figure:
    reference = quoted(data["reference"])
    return Figure(
        "relative_curves",
        f"Difference in {validation(data)} to {reference} over epochs",
        f"Mean over paired seeds with its 95 % t interval. Above 0 is better than {reference} at that time.",
        "lines",
        "epochs",
        f"{validation(data)} minus that of {reference}",
        lines([arm for arm in arms if arm["name"] != data["reference"]], "relative_curve", "epoch", "mean", band=True),
        reference=0.0,
        range_label="95 % t interval",
    )


def loss_curves(arms: list[dict[str, Any]]) -> Figure:
    return Figure(
        "loss",
        "Training loss over epochs",
        "First-pass loss of the batches in equal parts of the run: mean over seeds and one standard deviation around "
        "it.",
        "lines",
        "epochs",
        "first-pass loss",
        lines(arms, "loss_curve", "epoch", "mean", band=True),
        range_label="one standard deviation",
    )


def curves(arms: list[dict[str, Any]], clock: str) -> Figure:
    what, axis, told = CLOCKS[clock]
    return Figure(
        "curves",
        f"Validation perplexity against {what}",
        f"Mean over seeds and one standard deviation around it. {told}",
        "lines",
        axis,
        words_for("eval_perplexity"),
        lines(arms, "curve", clock, "mean", band=True),
        y_log=True,
        range_label="one standard deviation",
    )


def relative_curves(arms: list[dict[str, Any]], reference: str, clock: str) -> Figure:
    what, axis, _ = CLOCKS[clock]
    return Figure(
        "relative_curves",
        f"Validation perplexity relative to {reference}, at equal {what}",
        f"Mean over paired seeds with its 95 % t interval. Below 0 is better than {reference} at that {what}. "
        f"Between two evaluations of {reference} its negative log-likelihood is interpolated.",
        "lines",
        axis,
        f"% above {reference}",
        lines([arm for arm in arms if arm["name"] != reference], "relative_curve", clock, "mean", band=True),
        reference=0.0,
        range_label="95 % t interval",
    )


def behaviour(data: dict[str, Any], arms: list[dict[str, Any]]) -> tuple[Any, ...]:
    clock = clock_of("scheduler", data["match"])
    _, axis, _ = CLOCKS[clock]
    figures: list[Any] = [
        Figure(
            "repeats_over_loss",
            "Updates against first-pass loss",
            "Mean updates on batches of about this loss. A skip counts as 0.",
            "lines",
            "first-pass loss, nats per token",
            "updates/batch",
            lines(arms, "over_loss", "loss", "mean"),
        ),
        Figure(
            "repeats_over_time",
            "Updates in the course of training",
            f"Mean updates on a batch, by the {axis} until then.",
            "lines",
            axis,
            "updates/batch",
            lines(arms, "over_time", clock, "repeats"),
        ),
    ]
    if any(point["skipped"] for arm in arms for point in arm["over_time"]):
        figures.append(skips_over_time(arms, clock))
    else:
        figures.append("No batch was skipped.")
    repeating = lines(arms, "over_passes", "pass", "mean", band=True)
    if not repeating:
        return (*figures, "No batch was repeated.")
    figures.append(
        Figure(
            "loss_over_passes",
            "Loss after each pass of repeated batches",
            "Change of the loss of a batch from its first pass to each further one: mean and quartiles, over the "
            "batches that had so many passes. It shows what was learnt of this batch, not of others.",
            "lines",
            "pass over the batch",
            "loss minus first-pass loss, nats",
            repeating,
            whole_x=True,
            range_label="quartiles",
        )
    )
    return tuple(figures)


def skips_over_time(arms: list[dict[str, Any]], clock: str) -> Figure:
    _, axis, _ = CLOCKS[clock]
    return Figure(
        "skips_over_time",
        "Skips in the course of training",
        f"Share of the batches that were skipped, by the {axis} until then.",
        "lines",
        axis,
        "share of batches skipped",
        lines(arms, "over_time", clock, "skipped"),
    )
