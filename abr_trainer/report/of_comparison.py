"""The report on a comparison, from its data alone: its sections and tables."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..comparison.arms import quoted
from ..comparison.scores import metrics_in, score_of, sentence_case, words_for
from ..records.commands import pasted
from .figure import Commands, Figure, Fold, Notice, Report, Section, Series, Table
from .figures_of_comparison import behaviour, difference_figure, final_figure, on_the_way
from .text import DASH, amount, decimals, fixed, number, share
from .times import SHOWN_WAITING, share_waited
from .verdicts import (
    badge_of,
    caution,
    circumstances,
    describe_protocol,
    difference,
    mean_and_deviation,
    shortcomings,
    signed,
    verdicts,
    what_varies,
)

MOST_LETTERS = 80
"""Of a name in a figure."""

MOST_IN_TITLE = 40
"""Letters of all names in the title together; else it says how many they are."""

TITLES = {
    "scheduler": "Does it pay? {others} against {reference}",
    "prompt": "Does the prompt matter? {others} against {reference}",
}

UNITS = "Differences are in units of the score: +0.01 of an accuracy is one row in a hundred more."

WAITING = "Waiting is the share of these seconds in which a run waited for its data. It depends on the machine, too."

COST_COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "passes": ("passes", amount),
    "flops": ("FLOPs", lambda value: number(value, 3)),
    "updates": ("updates", amount),
    "batches": ("batches", amount),
    "skips": ("skips", amount),
    "repeats": ("updates/batch", lambda value: f"{value:.2f}"),
    "tokens": ("tokens", lambda value: f"{value:,.0f}"),
    "seconds": ("seconds", lambda value: f"{value:,.1f}"),
}


def report_on_comparison(data: dict[str, Any]) -> Report:
    """Build the report on what `abr_trainer.comparison.collect` returned."""
    varied = what_varies(data)
    arms = [arm for arm in data["arms"] if arm["seeds"]]
    names = tuple(arm["name"] for arm in data["arms"])
    warnings = [Notice("warning", text) for text in shortcomings(data)]
    about = (describe_protocol(data), *circumstances(data, arms), *caution(data, arms))
    sections = [
        Section("Results", reached(data, arms)),
        Section("Over the course of training", on_the_way(data, arms)),
        Section("What the schedulers did", behaviour(data, arms))
        if varied == "scheduler"
        else Section("The prompts", (prompt_table(arms, data["runs"]),)),
        Section("Costs", (cost_table(arms, data["jobs"], varied),)),
        *([Section("Tuning", tuned(data, arms))] if any(arm["tuning"] for arm in arms) else []),
        Section("How to repeat it", method(data, arms)),
    ]
    others = [quoted(name) for name in names if name != data["reference"]]
    who = ", ".join(others)
    who = f"{len(others)} {varied}s" if len(others) > 1 and len(who) > MOST_IN_TITLE else who
    return shortened(
        Report(
            TITLES[varied].format(others=who, reference=quoted(data["reference"])),
            (*verdicts(data, arms), *warnings, *about),
            tuple(sections),
            names,
        )
    )


def shortened(report: Report) -> Report:
    """Cut names that are too long for a figure, as far as what is left of them differs."""
    short = {name: textwrap.shorten(name, MOST_LETTERS, placeholder=" ...") for name in report.names}
    short = {name: text for name, text in short.items() if list(short.values()).count(text) == 1}

    def cut(block: Any) -> Any:
        if not isinstance(block, Figure):
            return block
        return replace(
            block, series=tuple(replace(each, name=short.get(each.name, each.name)) for each in block.series)
        )

    sections = tuple(replace(each, blocks=tuple(map(cut, each.blocks))) for each in report.sections)
    return replace(report, sections=sections, names=tuple(short.get(name, name) for name in report.names))


def reached(data: dict[str, Any], arms: list[dict[str, Any]]) -> tuple[Any, ...]:
    metric, reference = data["metric"], data["reference"]
    varied = what_varies(data)
    return (
        result_table(data, arms),
        final_figure(arms, metric, varied),
        difference_figure(arms, metric, reference, varied),
        Fold("More numbers: all scores, and how sure the differences are", more_numbers(data, arms)),
    )


def result_table(data: dict[str, Any], arms: list[dict[str, Any]]) -> Table:
    """Tabulate the score that runs are judged by."""
    metric, reference, varied = data["metric"], quoted(data["reference"]), what_varies(data)
    score = score_of(metric)
    places = decimals_of(arms, metric)
    differences = [arm[metric]["difference"].get("mean") for arm in arms if metric in arm]
    finer = max(places + 1, min(places + 3, decimals(differences, 2)))
    rows = []
    for arm in arms:
        entry = arm.get(metric, {})
        found = entry.get("difference", {"seeds": 0})
        cells = [arm["name"], mean_and_deviation(entry, places) if entry else DASH]
        if arm["name"] == data["reference"] or found["seeds"] == 0:
            is_reference = arm["name"] == data["reference"]
            cells += [DASH, DASH, DASH, "reference" if is_reference else badge_of(entry.get("verdict", DASH))]
        else:
            cells += [difference(found, score, finer), interval(found, "t", finer)]
            cells += [f"{found['wins']} of {found['seeds']}", badge_of(entry["verdict"])]
        rows.append(tuple(cells))
    return Table(
        f"{sentence_case(words_for(metric))}: mean ± standard deviation over seeds",
        (
            varied,
            words_for(metric),
            f"difference to {reference}",
            "95 % interval",
            f"seeds {score.direction}",
            "verdict",
        ),
        tuple(rows),
        (
            "The verdict rests on the 95 % t interval of the differences, seed by seed. If the interval includes 0, "
            "the difference may be chance.",
            *([] if score.in_logs else [UNITS]),
        ),
        tuple(i for i, arm in enumerate(arms) if arm["name"] == data["reference"]),
    )


def more_numbers(data: dict[str, Any], arms: list[dict[str, Any]]) -> tuple[Table, ...]:
    """Tabulate all scores, and what else is known of the differences."""
    metric, reference, varied = data["metric"], data["reference"], what_varies(data)
    metrics = metrics_in((name for arm in arms for name in arm), varied)
    places = {name: decimals_of(arms, name) for name in metrics}
    scores = Table(
        "All scores: mean ± standard deviation over seeds",
        (varied, *map(words_for, metrics)),
        tuple(
            (arm["name"], *(mean_and_deviation(arm[name], places[name]) if name in arm else DASH for name in metrics))
            for arm in arms
        ),
    )
    rows = []
    for arm in arms:
        found = arm[metric]["difference"] if metric in arm else {}
        if arm["name"] != reference and found.get("seeds"):
            ends = (interval(found, kind) for kind in ("t", "bootstrap"))
            rows.append((arm["name"], *ends, number(found.get("detectable"), 2)))
    sure = Table(
        f"Difference in {words_for(metric)} to {quoted(reference)}",
        (varied, "95 % interval (t)", "95 % interval (bootstrap)", "detectable"),
        tuple(rows),
        (
            "The bootstrap of few seeds is too narrow: the verdict rests on the t interval. Detectable is the "
            "true difference that this many seeds, if they vary as much as these do, find with 80 % power.",
        ),
    )
    return (*([scores] if len(metrics) > 1 else []), sure)


def decimals_of(arms: list[dict[str, Any]], metric: str) -> int:
    return decimals(arm[metric]["mean"] for arm in arms if metric in arm)


def interval(found: dict[str, Any], kind: str, places: int | None = None) -> str:
    if f"{kind}_low" not in found:
        return DASH
    return f"{signed(found[f'{kind}_low'], places)} to {signed(found[f'{kind}_high'], places)}"


def waits(arms: list[dict[str, Any]]) -> bool:
    """Tell whether an arm waited for its data for so long that the report has to show it."""
    return any(_waited(arm["cost"]) > SHOWN_WAITING for arm in arms)


def _waited(cost: dict[str, float]) -> float:
    return share_waited(cost.get("waiting_seconds", 0.0), cost["seconds"])


def costs_of(cost: dict[str, float], with_waiting: bool) -> tuple[str, ...]:
    """Return the cells of what an arm or a run has spent."""
    cells = [form(cost[key]) for key, (_, form) in COST_COLUMNS.items()]
    if with_waiting:
        cells.append(share(_waited(cost), 1.0) if "waiting_seconds" in cost else DASH)
    return tuple(cells)


def cost_headings(with_waiting: bool) -> tuple[str, ...]:
    """Return what stands above these cells."""
    return (*(heading for heading, _ in COST_COLUMNS.values()), *(["waiting"] if with_waiting else []))


def cost_table(arms: list[dict[str, Any]], jobs: int, varied: str) -> Table:
    with_waiting = waits(arms)
    shared = f"; with --jobs {jobs}, up to {jobs} runs share that machine" if jobs > 1 else ""
    return Table(
        "Mean over seeds of what a run has spent",
        (varied, *cost_headings(with_waiting)),
        tuple((arm["name"], *costs_of(arm["cost"], with_waiting)) for arm in arms),
        (
            "A pass is a forward-backward over a batch; a skip costs its forward. Tokens are those of all forwards. "
            "Seconds are those of batches alone, without evaluation, logging and checkpoints, on the machine named "
            f"below{shared}.",
            *([WAITING] if with_waiting else []),
            *(["The prompt is part of each row: a longer one is more tokens and more FLOPs."] * (varied == "prompt")),
        ),
    )


def tuned(data: dict[str, Any], arms: list[dict[str, Any]]) -> tuple[Any, ...]:
    varied, metric = what_varies(data), f"eval_{score_of(data['metric']).name}"
    names = sorted({name for arm in arms if arm["tuning"] for name in arm["tuning"]["chosen"]})
    places = decimals(each[metric] for arm in arms if arm["tuning"] for each in arm["tuning"]["tried"])
    rows, series = [], []
    for arm in (arm for arm in arms if arm["tuning"]):
        for candidate in arm["tuning"]["tried"]:
            is_chosen = candidate["values"] == arm["tuning"]["chosen"]
            values = [candidate["values"].get(name, DASH) for name in names]
            score = DASH if candidate[metric] is None else fixed(candidate[metric], places)
            rows.append((arm["name"], *values, score, "chosen" if is_chosen else ""))
        if len(names) == 1 and all(_is_number(each["values"][names[0]]) for each in arm["tuning"]["tried"]):
            tried = sorted((float(each["values"][names[0]]), each[metric]) for each in arm["tuning"]["tried"])
            series.append(Series(arm["name"], x=tuple(x for x, _ in tried), y=tuple(y for _, y in tried)))
    table = Table(
        f"{sentence_case(words_for(metric))} of each value, mean over the seeds it was chosen by",
        (varied, *names, words_for(metric), "choice"),
        tuple(rows),
        ("The values are chosen on the validation split alone. The runs with these values are reported.",),
    )
    if not series:
        return (table,)
    figure = Figure(
        "tuning",
        f"{sentence_case(words_for(metric))} against {names[0]}",
        f"Each {varied} is compared at its own best value.",
        "lines",
        names[0],
        words_for(metric),
        tuple(series),
        x_log=all(x > 0 for each in series for x in each.x),
    )
    return table, figure


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def updates_a_batch(cost: dict[str, float]) -> float:
    return cost["updates"] / max(1, cost["batches"] - cost["skips"])


def method(data: dict[str, Any], arms: list[dict[str, Any]]) -> tuple[Any, ...]:
    updates = {arm["name"]: updates_a_batch(arm["cost"]) for arm in arms}
    controls = [
        f"{pair['control']}, which made {updates[pair['control']]:.2f} updates on a batch that was not skipped, for "
        f"{pair['name']}, which made {updates[pair['name']]:.2f}"
        for pair in data["against_controls"]
        if {pair["name"], pair["control"]} <= updates.keys()
    ]
    return (
        *([f"Controls, which look at nothing: {'; '.join(controls)}."] if controls else []),
        Commands("The command of this comparison:", (pasted(data["argv"]),)),
        Fold(
            f"The commands of all {len(data['runs'])} runs",
            (Commands("One a line:", tuple(pasted(run["argv"], data["launcher"]) for run in data["runs"])),),
        ),
        Fold(f"The results of all {len(data['runs'])} runs", run_tables(data)),
        Fold("Machine, versions and commit", (machine_table(data["runs"]),)),
    )


def prompt_table(arms: list[dict[str, Any]], runs: list[dict[str, Any]]) -> Table:
    texts = {run["arm"]: run["prompt"] for run in runs}
    rows = tuple((arm["name"], texts[arm["name"]] or DASH) for arm in arms)
    return Table("What stands before each row", ("prompt", "text"), rows)


def run_tables(data: dict[str, Any]) -> tuple[Table, Table]:
    """Tabulate what every run has reached, and what it has spent."""
    varied = what_varies(data)
    metrics = metrics_in((name for run in data["runs"] for name in run["metrics"]), varied)
    columns = (f"{varied}, seed", *map(words_for, metrics), "directory")
    with_waiting = waits([arm for arm in data["arms"] if arm["seeds"]])
    reached_by, spent_by = [], []
    for run in data["runs"]:
        name = f"{run['arm']}, seed {run['seed']}"
        scores = (number(run["metrics"].get(metric), 6) for metric in metrics)
        reached_by.append((name, *scores, run["directory"]))
        spent_by.append((name, *costs_of(run["cost"], with_waiting)))
    headings = (f"{varied}, seed", *cost_headings(with_waiting))
    return (
        Table("What every run has reached", columns, tuple(reached_by)),
        Table("What every run has spent", headings, tuple(spent_by)),
    )


def machine_table(runs: list[dict[str, Any]]) -> Table:
    """Tabulate what made these runs, by their `machine`, `versions` and `git`; a value a row where they differ."""
    rows: dict[tuple[str, str], None] = {}
    for run in runs:
        known = {**run.get("machine", {}), **run.get("versions", {})}
        rows.update(dict.fromkeys((name, str(value)) for name, value in known.items()))
        rows[("commit", str(run.get("git")))] = None
    return Table("Machine, versions and commit", ("what", "value"), tuple(rows))
