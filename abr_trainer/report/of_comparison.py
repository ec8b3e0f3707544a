"""The report on a comparison, from its data alone: its sections and tables."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..comparison.arms import quoted
from ..comparison.scores import metrics_in, score_of, sentence_case, words_for
from ..records.commands import pasted
from .figure import Commands, Figure, Notice, Report, Section, Series, Table
from .figures_of_comparison import behaviour, difference_figure, final_figure, on_the_way
from .text import DASH, number
from .verdicts import (
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

TITLES = {
    "scheduler": "Does it pay? {others} against {reference}",
    "prompt": "Does the prompt matter? {others} against {reference}",
}

UNITS = "Differences are in units of the score: +0.01 of an accuracy is one row in a hundred more."

COST_COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "passes": ("passes", lambda value: f"{value:,.1f}"),
    "flops": ("FLOPs", lambda value: f"{value:.3g}"),
    "updates": ("updates", lambda value: f"{value:,.1f}"),
    "batches": ("batches", lambda value: f"{value:,.1f}"),
    "skips": ("skips", lambda value: f"{value:,.1f}"),
    "repeats": ("updates a batch", lambda value: f"{value:.2f}"),
    "tokens": ("tokens", lambda value: f"{value:,.0f}"),
    "seconds": ("seconds", lambda value: f"{value:,.1f}"),
}


def report_on_comparison(data: dict[str, Any]) -> Report:
    """Build the report on what `abr_trainer.comparison.collect` returned."""
    varied = what_varies(data)
    arms = [arm for arm in data["arms"] if arm["seeds"]]
    names = tuple(arm["name"] for arm in data["arms"])
    warnings = [Notice("warning", text) for text in shortcomings(data)]
    sections = [
        Section("What was reached", reached(data, arms)),
        Section("On the way", on_the_way(data, arms)),
        Section("What the schedulers did", behaviour(arms))
        if varied == "scheduler"
        else Section("What the prompts say", (prompt_table(arms, data["runs"]),)),
        Section("What it cost", (cost_table(arms, data["jobs"], varied),)),
        *([Section("What was tuned", tuned(data, arms))] if any(arm["tuning"] for arm in arms) else []),
        Section("How it was done", method(data, arms)),
    ]
    others = [quoted(name) for name in names if name != data["reference"]]
    who = ", ".join(others) if len(others) < 4 else f"{len(others)} {varied}s"
    return shortened(
        Report(
            TITLES[varied].format(others=who, reference=quoted(data["reference"])),
            (describe_protocol(data), *circumstances(data, arms), *warnings, *verdicts(data, arms)),
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
    )


def result_table(data: dict[str, Any], arms: list[dict[str, Any]]) -> Table:
    metric, reference, varied = data["metric"], data["reference"], what_varies(data)
    score = score_of(metric)
    metrics = metrics_in((name for arm in arms for name in arm), varied)
    scores = " and ".join(dict.fromkeys(score_of(name).words for name in metrics))
    rows = []
    for arm in arms:
        entry = arm.get(metric, {})
        found = entry.get("difference", {"seeds": 0})
        cells = [arm["name"], *(mean_and_deviation(arm[name]) if name in arm else DASH for name in metrics)]
        if arm["name"] == reference or found["seeds"] == 0:
            cells += [DASH, "reference" if arm["name"] == reference else entry.get("verdict", DASH), *[DASH] * 4]
        else:
            cells += [
                difference(found, score),
                entry["verdict"],
                *(interval(found, kind) for kind in ("t", "bootstrap")),
                f"{found['wins']} of {found['seeds']}",
                number(found.get("detectable"), 2),
            ]
        spent = number(arm["cost"]["repeats"], 3) if varied == "scheduler" else f"{arm['cost']['tokens']:,.0f}"
        rows.append((*cells, spent, f"{arm['cost']['flops']:.3g}"))
    return Table(
        f"{sentence_case(scores)}, mean ± standard deviation over seeds; difference in {words_for(metric)} to "
        f"{quoted(reference)}",
        (
            *(varied, *map(words_for, metrics), "difference", "verdict"),
            *("95 % interval (t)", "95 % interval (bootstrap)", "wins", "detectable"),
            *("repeats" if varied == "scheduler" else "tokens", "FLOPs"),
        ),
        tuple(rows),
        (
            "The verdict rests on the t interval over paired seeds; the bootstrap of few seeds is too narrow. "
            "Detectable is the difference that this many seeds, scattering as they do, would have shown in four cases "
            "of five.",
            *([] if score.in_logs else [UNITS]),
        ),
        tuple(i for i, arm in enumerate(arms) if arm["name"] == reference),
    )


def interval(found: dict[str, Any], kind: str) -> str:
    return f"{signed(found[f'{kind}_low'])} to {signed(found[f'{kind}_high'])}" if f"{kind}_low" in found else DASH


def cost_table(arms: list[dict[str, Any]], jobs: int, varied: str) -> Table:
    shared = f"; with --jobs {jobs}, up to {jobs} runs share that machine" if jobs > 1 else ""
    return Table(
        "Mean over seeds of what a run has spent",
        (varied, *(heading for heading, _ in COST_COLUMNS.values())),
        tuple((arm["name"], *(form(arm["cost"][key]) for key, (_, form) in COST_COLUMNS.items())) for arm in arms),
        (
            "A pass is a forward-backward over a batch; a skip costs its forward. Tokens are those of all forwards. "
            "Seconds are those of batches alone, without evaluation, logging and checkpoints, on the machine named "
            f"below{shared}.",
            *(["The prompt is part of each row: a longer one is more tokens and more FLOPs."] * (varied == "prompt")),
        ),
    )


def tuned(data: dict[str, Any], arms: list[dict[str, Any]]) -> tuple[Any, ...]:
    varied, metric = what_varies(data), f"eval_{score_of(data['metric']).name}"
    names = sorted({name for arm in arms if arm["tuning"] for name in arm["tuning"]["chosen"]})
    rows, series = [], []
    for arm in (arm for arm in arms if arm["tuning"]):
        for candidate in arm["tuning"]["tried"]:
            is_chosen = candidate["values"] == arm["tuning"]["chosen"]
            values = [candidate["values"].get(name, DASH) for name in names]
            rows.append((arm["name"], *values, number(candidate[metric]), "chosen" if is_chosen else ""))
        if len(names) == 1 and all(_is_number(each["values"][names[0]]) for each in arm["tuning"]["tried"]):
            tried = sorted((float(each["values"][names[0]]), each[metric]) for each in arm["tuning"]["tried"])
            series.append(Series(arm["name"], x=tuple(x for x, _ in tried), y=tuple(y for _, y in tried)))
    table = Table(
        f"{sentence_case(words_for(metric))} of each value, mean over the seeds it was chosen by",
        (varied, *names, words_for(metric), "choice"),
        tuple(rows),
        ("What is reported are runs with the values chosen on the validation split. A test split has no say.",),
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
        Commands("The comparison", (pasted(data["argv"]),)),
        Commands("Each run", tuple(pasted(run["argv"], data["launcher"]) for run in data["runs"])),
        run_table(data),
        machine_table(data["runs"]),
    )


def prompt_table(arms: list[dict[str, Any]], runs: list[dict[str, Any]]) -> Table:
    texts = {run["arm"]: run["prompt"] for run in runs}
    rows = tuple((arm["name"], texts[arm["name"]] or DASH) for arm in arms)
    return Table("What stands before each row", ("prompt", "text"), rows)


def run_table(data: dict[str, Any]) -> Table:
    varied = what_varies(data)
    metrics = metrics_in((name for run in data["runs"] for name in run["metrics"]), varied)
    rows = [
        (
            run["arm"],
            str(run["seed"]),
            *(number(run["metrics"].get(name), 6) for name in metrics),
            *(form(run["cost"][key]) for key, (_, form) in COST_COLUMNS.items()),
            run["directory"],
        )
        for run in data["runs"]
    ]
    headings = (heading for heading, _ in COST_COLUMNS.values())
    columns = (varied, "seed", *map(words_for, metrics), *headings, "directory")
    return Table("Every run", columns, tuple(rows))


def machine_table(runs: list[dict[str, Any]]) -> Table:
    """Tabulate what made these runs, by their `machine`, `versions` and `git`; a value a row where they differ."""
    rows: dict[tuple[str, str], None] = {}
    for run in runs:
        rows.update(dict.fromkeys((name, str(value)) for name, value in {**run["machine"], **run["versions"]}.items()))
        rows[("commit", str(run["git"]))] = None
    return Table("Machine, versions and commit", ("what", "value"), tuple(rows))
