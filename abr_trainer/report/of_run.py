"""The report on one run, finished or not, from what lies in its directory."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path
from typing import Any

from ..comparison.curves import equal_parts, learning_curve, over_loss, over_passes, over_time
from ..records import shapes
from ..records.commands import commands_in, pasted
from ..records.files import (
    FINISHED,
    PROVENANCE,
    RESULTS,
    TRAINER_STATE,
    Damaged,
    last_state,
    read_json,
    updates_of,
)
from ..schedulers.recorded import name_of_rule, parts_of
from .figure import Commands, Excerpts, Facts, Figure, Fold, Notice, Report, Section, Series, Table
from .of_comparison import COST_COLUMNS, machine_table
from .rows import CUT_TO_BLOCKS, JUDGED_ALONE, RunRow, broken_rows, has_row_rule, rows_judged
from .samples import sample_sections
from .text import amount, both_ends, number, share, shortened
from .times import SHOWN_WAITING, parts_of_time, share_waited
from .why import describe_repeats, read_provenance, read_skipped, read_trace, without_loss

MOST_POINTS = 1500
"""Points of a figure: a browser has to hold them."""

MOST_SKIPPED = 50
"""Skipped batches that are listed."""

MOST_TEXTS = 8
"""Rows of a skipped batch whose text is shown."""

MOST_LETTERS = 1000
"""Of the text of a row: the page of a huge run stays small."""

SHOWN: shapes.Shape = shapes.BATCH | {
    "learning_rate": shapes.NUMBER,
    "seconds": shapes.NUMBER,
    "memory": shapes.NUMBER,
    "epoch": shapes.LOSS,
}
"""A line of a trace from which a page is made."""

SMALL = 0.005
"""By how much, as a share, perplexity must have moved to count as a change."""

MOST_ROWS = 200
"""Broken rows that are listed."""

GIB = 2**30

OF_TRAINING = (
    "By the wall-clock, from the start of training to its end. Passes are the time in batches, apart from waiting for "
    "their data and generating it. What is not above 0.5 % is left out."
)
OF_BATCHES = "Evaluation and saving are counted at the end of the run."


def report_on_run(directory: Path) -> Report:
    """Build the report on a run.

    Raises:
        ValueError: The directory holds no run.
    """
    trace = read_trace(directory, SHOWN)
    if not trace:
        raise ValueError(f"{directory} holds no batch yet: there is nothing to report.")
    results = results_of(directory)
    curve = evaluations(directory, trace, results)
    skipped = [batch for batch in trace if batch["repeats"] == 0]
    judged, dropped = rows_judged(trace), broken_rows(directory)
    lead: list[str | Notice | Facts] = found(dropped)
    if "train_passes" not in results:
        lead.append(Notice("warning", "The run is not finished: this is how far it has come.", "not finished"))
    lead += [*progress(curve), facts(trace, results, limit_of_seconds(directory))]
    left_out = [(bool(skipped), Section(f"Skipped batches ({len(skipped):,})", skips(directory, skipped)))]
    if has_row_rule(directory):
        rows = Section(f"Broken rows ({len(dropped):,})", broken(directory, dropped, judged))
        left_out.insert(0, (bool(dropped), rows))
    sections = [
        Section("Perplexity", perplexity(curve)),
        *(section for some, section in left_out if some),
        *sample_sections(directory),
        Section("Batches", batches(trace)),
        *(section for some, section in left_out if not some),
        Section("Learning rate and memory", tuple(map(unless_constant, (learning_rate(trace), memory(trace))))),
        *([Section("Where the time went", blocks)] if (blocks := times(trace, results)) else []),
        Section("Costs", (ledger(trace, results),)),
        Section("How to repeat it", how(directory)),
    ]
    return Report(f"Run {directory.resolve().name}", tuple(lead), tuple(sections))


def found(dropped: list[RunRow]) -> list[str | Notice | Facts]:
    """Say how many rows were dropped, if any were."""
    if not dropped:
        return []
    steps = [step for row in dropped for step in row.steps]
    rows = f"{len(dropped):,} row{'s were' if len(dropped) > 1 else ' was'} dropped"
    batches = f"{len(set(steps)):,} batch{'es' * (len(set(steps)) > 1)}"
    times = f", {len(steps):,} times in all" if len(steps) > len(dropped) else ""
    return [Notice("warning", f"{rows} in {batches}{times}.", "broken rows")]


def results_of(directory: Path) -> dict[str, Any]:
    """Return what a finished run has spent and reached; of one that is at work, `train_passes` is missing."""
    saved, provenance = read_json(directory / RESULTS, shapes.RESULTS) or {}, read_provenance(directory) or {}
    path, results = directory / RESULTS, saved
    if FINISHED in provenance:
        totals = (provenance[FINISHED] or {}).get("totals") or {}
        # A program may have saved its results, those of an earlier run in this directory too.
        is_of_this_run = bool(totals) and saved.get("train_runtime") == totals.get("train_runtime")
        path, results = directory / PROVENANCE, {**(saved if is_of_this_run else {}), **totals}
    shape = shapes.FINISHED if "train_passes" in results else shapes.RESULTS
    if wrong := shapes.misfit(results, shape):
        raise Damaged(f"{path} is damaged: {wrong}.")
    return results


def evaluations(directory: Path, trace: list[dict[str, Any]], results: dict[str, Any]) -> list[list[Any]]:
    """Return `[passes, perplexity]` for each evaluation so far: of a run at work, those up to its last checkpoint."""
    at = directory if (directory / TRAINER_STATE).is_file() else last_state(directory)
    kept = ((read_provenance(directory) or {}).get(FINISHED) or {}).get("kept_step")
    return [] if at is None else learning_curve(Path(at), trace, results, kept=kept)


def progress(curve: list[list[Any]]) -> list[Notice]:
    """Say what training has done to the validation perplexity, if it was measured before and after."""
    if len(curve) < 2:
        return []
    (start, before), (_, after) = curve[0], curve[-1]
    since = "before training" if start == 0 else f"after {amount(start)} passes"
    if before is None or after is None:
        when = since if before is None else "at the end"
        return [Notice("bad", f"Validation perplexity is not a finite number {when}.", "not finite")]
    change = after / before - 1
    moved = f"from {number(before)} {since} to {number(after)} at the end ({100 * change:+.1f} %)"
    if abs(change) < SMALL:
        return [Notice("neutral", f"Training changed little: validation perplexity went {moved}.", "unchanged")]
    if change > 0:
        return [Notice("bad", f"Training made the model worse: validation perplexity rose {moved}.", "worse")]
    return [Notice("good", f"Validation perplexity fell {moved}.", "better")]


def limit_of_seconds(directory: Path) -> int | None:
    """Return how many seconds a run may train; None if something else ends it."""
    limit = (read_provenance(directory) or {}).get("arguments", {}).get("max_seconds")
    return limit if isinstance(limit, int) else None


def facts(trace: list[dict[str, Any]], results: dict[str, Any], seconds: int | None = None) -> Facts:
    """Return the few numbers to know first.

    Args:
        seconds: The budget of seconds, if there is one.
    """
    updates, skipped = sum(map(updates_of, trace)), sum(batch["repeats"] == 0 for batch in trace)
    items = [
        ("batches", f"{len(trace):,}"),
        ("passes", amount(trace[-1]["passes"])),
        *([(f"seconds of {seconds:,}", f"{sum(batch['seconds'] for batch in trace):,.1f}")] if seconds else []),
        ("updates/batch", f"{updates / len(trace):.2f}"),
        (f"batches skipped ({share(skipped, len(trace))})", f"{skipped:,}"),
    ]
    judged, dropped = rows_judged(trace), sum(batch.get("rows_dropped", 0) for batch in trace)
    if judged:
        items.append((f"rows dropped ({share(dropped, judged)})", f"{dropped:,}"))
    if results.get("test_perplexity"):
        items.append(("test perplexity", number(results["test_perplexity"])))
    return Facts(tuple(items))


def perplexity(curve: list[list[Any]]) -> tuple[Any, ...]:
    if not curve:
        return ("Nothing was evaluated. `--do_eval` evaluates, `--eval_passes` or `--eval_steps` say when.",)
    thinned = _thinned(curve)
    return (
        Figure(
            "perplexity",
            "Validation perplexity",
            "Over the compute spent: exp of the mean negative log-likelihood of a target token. Lower is better.",
            "lines",
            "passes spent",
            "validation perplexity",
            (Series("validation", x=_column(thinned, 0), y=_column(thinned, 1)),),
            y_log=True,
        ),
    )


def _thinned(rows: list[Any]) -> list[Any]:
    """Return at most `MOST_POINTS` of the rows, evenly spaced, the last one among them."""
    stride = -(-len(rows) // MOST_POINTS)
    return rows[::-stride][::-1] if stride else rows


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
            "The loss of a batch before any update on it, and what became of the batch.",
            "points",
            "passes spent",
            "first-pass loss, nats per token",
            points_by_fate(trace),
        ),
    ]
    if len(updates := {updates_of(batch) for batch in trace if batch["repeats"]}) > 1:
        figures.append(
            Figure(
                "repeats_over_time",
                "Updates in the course of training",
                "Mean updates on a batch, in equal parts of the run. A skip counts as 0.",
                "lines",
                "passes spent",
                "updates/batch",
                (Series("updates/batch", x=_column(by_time, "passes"), y=_column(by_time, "repeats")),),
            )
        )
    if skips_some := any(batch["repeats"] == 0 for batch in trace):
        figures.append(
            Figure(
                "skips_over_time",
                "Skips in the course of training",
                "Share of the batches that were skipped, in equal parts of the run.",
                "lines",
                "passes spent",
                "share of batches skipped",
                (Series("share skipped", x=_column(by_time, "passes"), y=_column(by_time, "skipped")),),
            )
        )
    if len({batch["repeats"] for batch in trace}) > 1:
        figures.append(
            Figure(
                "repeats_over_loss",
                "Updates against first-pass loss",
                "Mean updates on batches of about this loss, with the fewest and the most. A skip counts as 0.",
                "lines",
                "first-pass loss, nats per token",
                "updates/batch",
                (_banded("updates/batch", by_loss, "loss"),),
                range_label="fewest to most",
            )
        )
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
    return (*figures, *always(updates, skips_some))


def always(updates: set[int], skips_some: bool) -> list[str]:
    """Say in a sentence what no figure is needed for, because it was the same for all batches.

    Args:
        updates: The numbers of updates that batches got which were not skipped.
    """
    said = []
    if len(updates) == 1:
        (count,) = updates
        which = "Each batch that was not skipped" if skips_some else "Each batch"
        said.append(f"{which} got {count} update{'s' * (count != 1)}.")
    if not skips_some:
        said.append("No batch was skipped.")
    return [" ".join(said)] if said else []


def _banded(name: str, points: list[dict[str, float]], x: str) -> Series:
    low, high = _column(points, "low"), _column(points, "high")
    return Series(name, x=_column(points, x), y=_column(points, "mean"), low=low, high=high)


def points_by_fate(trace: list[dict[str, Any]]) -> tuple[Series, ...]:
    """Return the batches as points, by what became of them; of very many an even choice, more of the skipped ones."""
    shown = [batch for batch in trace if batch["loss"] is not None]
    fates: dict[str, list[dict[str, Any]]] = {"once": [], "repeated": []}
    for batch in _thinned([batch for batch in shown if batch["repeats"]]):
        fates["once" if batch["repeats"] == 1 else "repeated"].append(batch)
    fates["skipped"] = _thinned([batch for batch in shown if not batch["repeats"]])
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
    listed = skipped[:MOST_SKIPPED]
    items = tuple((_said_of_skip(batch), _beginnings(texts.get(batch["step"], []))) for batch in listed)
    some = f"Of {len(skipped):,} skipped batches, the first {MOST_SKIPPED} are listed; all are in the trace. "
    said = f"{some if len(skipped) > MOST_SKIPPED else ''}The text is the beginning of each row of the batch."
    return (f"{said} `abr why {shlex.quote(str(directory))} BATCH` says why it was skipped.", Excerpts(items))


def _said_of_skip(batch: dict[str, Any]) -> str:
    loss = f"loss {number(batch['loss'])}" if batch["loss"] is not None else f"loss {without_loss(batch)}"
    epoch = f", epoch {batch['epoch']:.3f}" if batch["epoch"] is not None else ""
    return f"Batch {batch['step']:,}{epoch}: {loss}; reason: {batch['reason']}"


def _beginnings(texts: list[str]) -> str:
    shown = [shortened(text, 160) for text in texts[:MOST_TEXTS]]
    left = len(texts) - len(shown)
    return " ⏎ ".join([*shown, *([f"({left:,} more rows)"] if left else [])])


def said_of_rows(judged: int, dropped: list[RunRow]) -> str:
    drops = sum(len(row.steps) for row in dropped)
    return f"{judged:,} rows were judged, {drops:,} of them dropped ({share(drops, judged)})."


def broken(directory: Path, dropped: list[RunRow], judged: int) -> tuple[Any, ...]:
    said = said_of_rows(judged, dropped)
    if not dropped:
        return (said,)
    items = tuple(
        (
            f"{row.place}: {row.numbers}; {row.fate}. {row.left_out}".removesuffix(". "),
            both_ends(row.text, MOST_LETTERS),
        )
        for row in dropped[:MOST_ROWS]
    )
    listed = f"`abr rows {shlex.quote(str(directory))}` lists them, and `--clean FILE OUT` writes a file without them."
    notes = [f"The worst {MOST_ROWS} of {len(dropped):,}."] if len(dropped) > MOST_ROWS else []
    if any(row.is_block for row in dropped):
        notes.append(f"{CUT_TO_BLOCKS} One block can hold good and broken text. {JUDGED_ALONE}")
    return (f"{said} A row that was dropped more than once is shown once. {listed}", *notes, Excerpts(items))


def unless_constant(figure: Figure) -> Figure | str:
    """Return a figure of one line, or a sentence if the line is level."""
    (line,) = figure.series
    if len(set(line.y)) > 1:
        return figure
    unit = "" if figure.y_label == figure.title.lower() else f" {figure.y_label}"
    return f"{figure.title}: {number(line.y[0])}{unit}, the same throughout."


def learning_rate(trace: list[dict[str, Any]]) -> Figure:
    text = "Of the first update on each batch."
    return _over_passes("learning_rate", "Learning rate", text, "learning rate", trace, "learning_rate")


def memory(trace: list[dict[str, Any]]) -> Figure:
    held = [{**batch, "gib": batch["memory"] / GIB} for batch in trace]
    text = "On a GPU, the most that was allocated so far; elsewhere, what the process held."
    return _over_passes("memory", "Memory", text, "GiB", held, "gib")


def _over_passes(name: str, title: str, description: str, y: str, trace: list[dict[str, Any]], key: str) -> Figure:
    thinned = _thinned(trace)
    return Figure(
        name,
        title,
        description,
        "lines",
        "passes spent",
        y,
        (Series(y, x=_column(thinned, "passes"), y=_column(thinned, key)),),
    )


def times(trace: list[dict[str, Any]], results: dict[str, Any]) -> tuple[Any, ...]:
    """Say where the time went; nothing of a run that was begun by an earlier version, which did not tell."""
    if not all("waiting_seconds" in batch for batch in trace):
        return ()
    is_finished = "train_total_seconds" in results
    of_batches = {
        name: sum(batch.get(name, 0.0) for batch in trace)
        for name in ("seconds", "waiting_seconds", "generating_seconds")
    }
    total, parts = parts_of_time(
        {name.removeprefix("train_"): value for name, value in results.items() if name.endswith("_seconds")}
        if is_finished
        else of_batches
    )
    rows = tuple((name, f"{seconds:,.1f}", share(seconds, total)) for name, seconds in parts)
    table = Table(
        f"{total:,.1f} seconds of {'training' if is_finished else 'batches so far'}",
        ("what", "seconds", "share"),
        rows,
        (OF_TRAINING if is_finished else OF_BATCHES,),
    )
    waited = share_waited(of_batches["waiting_seconds"], of_batches["seconds"])
    return (table, *([waiting(trace)] if waited > SHOWN_WAITING else []))


def waiting(trace: list[dict[str, Any]]) -> Figure:
    parts = equal_parts(trace, trace[-1]["passes"])
    waited = (
        share_waited(*(sum(batch[name] for batch in part) for name in ("waiting_seconds", "seconds")))
        for _, part in parts
    )
    return Figure(
        "waiting",
        "Waiting for data in the course of training",
        "Share of the time in batches that was a wait for their data, in equal parts of the run.",
        "lines",
        "passes spent",
        "share of the time",
        (Series("share of the time", x=tuple(passes for passes, _ in parts), y=tuple(waited)),),
        reference=0.0,  # or a share that hardly varies would look as if it did
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
    return Table("What the run has spent", ("what", "spent"), tuple(rows))


def other_rules(provenance: dict[str, Any]) -> list[str]:
    """Say under which other rules a run was resumed."""
    parts = parts_of(provenance)
    return [
        f"Resumed after batch {part['step']:,} under `{name_of_rule(part)}`."
        for before, part in itertools.pairwise(parts)
        if name_of_rule(before) != name_of_rule(part)
    ]


def how(directory: Path) -> tuple[Any, ...]:
    provenance = read_provenance(directory)
    if provenance is None:
        return (f"{PROVENANCE} is missing: the directory does not tell how.",)
    if "argv" not in provenance:
        said = f"A Python program started the run. Its rule: `{name_of_rule(provenance)}`."
        return (said, *other_rules(provenance), machine_table([provenance]))
    commands = commands_in(provenance)
    return (
        Commands(
            "The command:" if len(commands) == 1 else "The command, and those that resumed it:",
            tuple(map(pasted, commands)),
        ),
        *other_rules(provenance),
        Fold("Machine, versions and commit", (machine_table([provenance]),)),
    )
