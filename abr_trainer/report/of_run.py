"""The report on one run, finished or not, from what lies in its directory."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from ..comparison.curves import learning_curve, over_loss, over_passes, over_time
from ..records.commands import pasted
from ..records.files import PROVENANCE, RESULTS, TRAINER_STATE, last_state, read_json, updates_of
from ..schedulers.recorded import name_of_rule
from .figure import Commands, Excerpts, Figure, Notice, Report, Section, Series, Table
from .of_comparison import COST_COLUMNS, machine_table
from .rows import RunRow, broken_rows, has_row_rule, rows_judged
from .samples import sample_sections
from .text import DASH, number, printable
from .why import describe_repeats, read_provenance, read_skipped, read_trace, without_loss

MOST_POINTS = 1500
"""Points of a figure: a browser has to hold them."""

MOST_SKIPPED = 50
"""Skipped batches that are listed."""

MOST_ROWS = 200
"""Broken rows that are listed."""

GIB = 2**30


def report_on_run(directory: Path) -> Report:
    """Build the report on a run.

    Raises:
        ValueError: The directory holds no run.
    """
    trace = read_trace(directory)
    if not trace:
        raise ValueError(f"{directory} holds no batch yet: there is nothing to report.")
    results = read_json(directory / RESULTS) or {}
    curve = evaluations(directory, trace, results)
    skipped = [batch for batch in trace if batch["repeats"] == 0]
    judged, dropped = rows_judged(trace), broken_rows(directory)
    lead: list[str | Notice] = [summary(trace, curve, results)]
    if dropped:
        lead.append(said_of_rows(judged, dropped))
    if "train_passes" not in results:
        lead.append(Notice("warning", "The run is not finished: this is how far it has come."))
    sections = [
        Section("Perplexity", perplexity(curve, results)),
        *sample_sections(directory),
        Section("Batches", batches(trace)),
        Section(f"Skipped batches ({len(skipped)})", skips(directory, skipped)),
        *(
            [Section(f"Broken rows ({len(dropped):,})", broken(directory, dropped, judged))]
            if has_row_rule(directory)
            else []
        ),
        Section("Learning rate and memory", (learning_rate(trace), memory(trace))),
        Section("What it cost", (ledger(trace, results),)),
        Section("How it was made", how(directory)),
    ]
    return Report(f"Run {directory.resolve().name}", tuple(lead), tuple(sections))


def evaluations(directory: Path, trace: list[dict[str, Any]], results: dict[str, Any]) -> list[list[Any]]:
    """Return `[passes, perplexity]` for each evaluation so far: of a run at work, those up to its last checkpoint."""
    at = directory if (directory / TRAINER_STATE).is_file() else last_state(directory)
    return [] if at is None else learning_curve(Path(at), trace, results)


def summary(trace: list[dict[str, Any]], curve: list[list[Any]], results: dict[str, Any]) -> str:
    repeats = sum(map(updates_of, trace))
    skipped = sum(batch["repeats"] == 0 for batch in trace)
    parts = [
        f"{len(trace):,} batches for {trace[-1]['passes']:g} passes: {repeats:,} updates, {repeats / len(trace):.2f} "
        f"a batch, {skipped:,} batches skipped."
    ]
    if len(curve) > 1 and curve[0][1] and curve[-1][1]:
        change = curve[-1][1] / curve[0][1] - 1
        parts.append(
            f"Validation perplexity {number(curve[0][1])} at first, {number(curve[-1][1])} at last ({change:+.1%})."
        )
    if results.get("test_perplexity"):
        parts.append(f"Test perplexity {number(results['test_perplexity'])}.")
    return " ".join(parts)


def perplexity(curve: list[list[Any]], results: dict[str, Any]) -> tuple[Any, ...]:
    if not curve:
        return ("Nothing was evaluated. `--do_eval` evaluates, `--eval_passes` or `--eval_steps` say when.",)
    figure = Figure(
        "perplexity",
        "Validation perplexity",
        "exp of the mean negative log-likelihood of a target token, over the compute spent.",
        "lines",
        "passes spent",
        "validation perplexity",
        (Series("validation", x=_column(curve, 0), y=_column(curve, 1)),),
        y_log=True,
    )
    return (
        (figure, f"On the test split: {number(results['test_perplexity'])}.")
        if "test_perplexity" in results
        else (figure,)
    )


def _column(rows: list[Any], key: int | str) -> tuple[Any, ...]:
    return tuple(row[key] for row in rows)


def batches(trace: list[dict[str, Any]]) -> tuple[Any, ...]:
    end = trace[-1]["passes"]
    losses = [batch["loss"] for batch in trace if batch["loss"] is not None]
    by_time, by_pass = over_time(trace, end), over_passes(trace)
    by_loss = over_loss(trace, min(losses), max(losses)) if losses else []
    figures = [
        Figure(
            "batches",
            "First-pass loss of each batch",
            "What a batch was worth before any update on it, and what became of it.",
            "points",
            "passes spent",
            "first-pass loss, nats per token",
            points_by_fate(trace),
        ),
        Figure(
            "repeats_over_time",
            "Repeats and skips in the course of training",
            "Updates on a batch, and the share of batches skipped, in equal parts of the run.",
            "lines",
            "passes spent",
            "mean over the batches",
            tuple(
                Series(name, x=_column(by_time, "passes"), y=_column(by_time, key))
                for name, key in (("updates on a batch", "repeats"), ("share skipped", "skipped"))
            ),
        ),
        Figure(
            "repeats_over_loss",
            "Repeats against first-pass loss",
            "Mean updates on batches of about this loss, between the fewest and the most. A skip counts as 0.",
            "lines",
            "first-pass loss, nats per token",
            "updates on a batch",
            (_banded("updates on a batch", by_loss, "loss"),),
            range_label="fewest to most",
        ),
    ]
    if by_pass:
        figures.append(
            Figure(
                "loss_over_passes",
                "Loss after each pass of repeated batches",
                "Change of the loss of a batch from its first pass to each further one: mean and quartiles.",
                "lines",
                "pass over the batch",
                "loss minus first-pass loss, nats",
                (_banded("change of the loss", by_pass, "pass"),),
                whole_x=True,
                range_label="quartiles",
            )
        )
    return tuple(figures)


def _banded(name: str, points: list[dict[str, float]], x: str) -> Series:
    low, high = _column(points, "low"), _column(points, "high")
    return Series(name, x=_column(points, x), y=_column(points, "mean"), low=low, high=high)


def points_by_fate(trace: list[dict[str, Any]]) -> tuple[Series, ...]:
    """Return the batches as points, by what became of them. Of very many, all skipped ones and an even choice."""
    shown = [batch for batch in trace if batch["loss"] is not None]
    stride = -(-len(shown) // MOST_POINTS)
    fates: dict[str, list[dict[str, Any]]] = {"once": [], "repeated": [], "skipped": []}
    for i, batch in enumerate(shown):
        fate = "skipped" if batch["repeats"] == 0 else "once" if batch["repeats"] == 1 else "repeated"
        if fate == "skipped" or i % stride == 0:
            fates[fate].append(batch)
    return tuple(
        Series(
            fate,
            tuple(batch["passes"] for batch in some),
            tuple(batch["loss"] for batch in some),
            labels=tuple(f"batch {batch['step']} {describe_repeats(batch)} ({batch['reason']})" for batch in some),
        )
        for fate, some in fates.items()
        if some
    )


def skips(directory: Path, skipped: list[dict[str, Any]]) -> tuple[Any, ...]:
    if not skipped:
        return ("No batch was skipped.",)
    texts = read_skipped(directory)
    rows = [
        (
            str(batch["step"]),
            f"{batch['epoch']:.3f}" if batch["epoch"] is not None else DASH,
            number(batch["loss"]) if batch["loss"] is not None else without_loss(batch),
            batch["reason"],
            " ⏎ ".join(text[:160] for text in texts.get(batch["step"], [])) or DASH,
        )
        for batch in skipped[:MOST_SKIPPED]
    ]
    notes = ["Of the text, the beginning of each row of the batch. `abr why` tells more of a batch."]
    if len(skipped) > MOST_SKIPPED:
        notes.append(f"The first {MOST_SKIPPED} of {len(skipped)}; all are in the trace.")
    return (
        Table(
            "Which data were left out",
            ("batch", "epoch", "first-pass loss", "reason", "text"),
            tuple(rows),
            tuple(notes),
        ),
    )


def said_of_rows(judged: int, dropped: list[RunRow]) -> str:
    drops = sum(len(row.steps) for row in dropped)
    share = f" ({drops / judged:.2%})" if judged else ""
    return f"{judged:,} rows were judged, {drops:,} of them dropped{share}."


def broken(directory: Path, dropped: list[RunRow], judged: int) -> tuple[Any, ...]:
    said = said_of_rows(judged, dropped)
    if not dropped:
        return (said,)
    items = tuple((f"{row.place}: {row.numbers}; {row.fate}", printable(row.text)) for row in dropped[:MOST_ROWS])
    listed = f"`abr rows {shlex.quote(str(directory))}` lists them, and `--clean FILE OUT` writes a file without them."
    notes = [f"The worst {MOST_ROWS} of {len(dropped):,}."] if len(dropped) > MOST_ROWS else []
    return (f"{said} A row that was dropped more than once is shown once. {listed}", *notes, Excerpts(items))


def learning_rate(trace: list[dict[str, Any]]) -> Figure:
    return _over_passes("learning_rate", "Learning rate", "Of the first update on each batch.", trace, "learning_rate")


def memory(trace: list[dict[str, Any]]) -> Figure:
    held = [{**batch, "gib": batch["memory"] / GIB} for batch in trace]
    text = "On a GPU the most that was allocated until then; elsewhere what the process held."
    return _over_passes("memory", "Memory, GiB", text, held, "gib")


def _over_passes(name: str, title: str, description: str, trace: list[dict[str, Any]], key: str) -> Figure:
    thinned = trace[:: -(-len(trace) // MOST_POINTS)]
    return Figure(
        name,
        title,
        description,
        "lines",
        "passes spent",
        title,
        (Series(title, x=_column(thinned, "passes"), y=_column(thinned, key)),),
    )


def ledger(trace: list[dict[str, Any]], results: dict[str, Any]) -> Table:
    if "train_passes" in results:
        rows = [(heading, form(results[f"train_{key}"])) for key, (heading, form) in COST_COLUMNS.items()]
    else:
        so_far = {
            "passes": trace[-1]["passes"],
            "updates": sum(map(updates_of, trace)),
            "batches": len(trace),
            "skips": sum(batch["repeats"] == 0 for batch in trace),
            "seconds": sum(batch["seconds"] for batch in trace),
        }
        rows = [(COST_COLUMNS[key][0], COST_COLUMNS[key][1](value)) for key, value in so_far.items()]
    return Table("The ledger", ("what", "spent"), tuple(rows))


def how(directory: Path) -> tuple[Any, ...]:
    provenance = read_provenance(directory)
    if provenance is None:
        return (f"{PROVENANCE} is missing: the directory does not tell how.",)
    if "argv" not in provenance:
        said = f"A Python program started the run. Its rule: `{name_of_rule(provenance)}`."
        return (said, machine_table([provenance]))
    commands = [provenance["argv"], *provenance.get("resumed", [])]
    return (
        Commands("The command", tuple(map(pasted, commands))),
        machine_table([provenance]),
    )
