"""The report on a comparison, from its data alone."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..comparison.arms import quoted
from ..comparison.scores import Score, metrics_in, score_of, sentence_case, words_for
from ..records.commands import pasted
from .figure import Commands, Figure, Notice, Report, Section, Series, Table
from .text import DASH, number

MOST_LETTERS = 80
"""Of a name in a figure."""

TITLES = {
    "scheduler": "Does it pay? {others} against {reference}",
    "prompt": "Does the prompt matter? {others} against {reference}",
}

PROTOCOLS = {
    "passes": "All runs had the same compute, {passes} passes (forward-backwards over a batch), over which the "
    "learning rate falls to the same end. Who repeats a batch sees fewer others.",
    "batches": "All runs saw the same batches, whatever they spent on them. This is the published protocol: a "
    "scheduler that repeats has more compute than one that does not, see the costs. It cannot show that repeating "
    "pays.",
    "prompts": "All runs saw the same rows, {epochs:g} epoch{s} of them. Only the prompt before each row differs, and "
    "with it the number of tokens: see the costs.",
}

FILES = {
    "report": "report.html",
    "Markdown": "report.md",
    "data": "comparison.json",
    "TensorBoard": "tensorboard",
    "model": "config.json",
    "quantised": "quant_config.json",
    "adapter": "adapter_config.json",
}

UNITS = "Differences are in units of the score: +0.01 of an accuracy is one row in a hundred more."

KINDS: dict[str, Any] = {"better": "good", "worse": "bad"}


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


def what_varies(data: dict[str, Any]) -> str:
    """Return what the arms differ in. Before prompts were compared, data did not tell."""
    varied: str = data.get("varied", "scheduler")
    return varied


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


# ---- In words ----


def describe_protocol(data: dict[str, Any]) -> str:
    seeds = f"{len(data['seeds'])} seed{'s' * (len(data['seeds']) > 1)}"
    if what_varies(data) == "prompt":
        epochs = max((at for run in data["runs"] for at, _ in run["curve"]), default=0)
        return (
            f"{PROTOCOLS['prompts'].format(epochs=epochs, s='s' * (epochs != 1))} {seeds.capitalize()}, paired: for "
            "each, all prompts begin with the same weights of adapter and head, and the rows come in the same order."
        )
    passes = [run["cost"]["passes"] for run in data["runs"]]
    protocol = PROTOCOLS[data["match"]].format(passes=f"{max(passes, default=0):g}")
    return (
        f"{protocol} {seeds.capitalize()}, paired: for each, all schedulers begin with the same weights and see the "
        "data in the same order."
    )


def circumstances(data: dict[str, Any], arms: list[dict[str, Any]]) -> list[str]:
    """Return what to know beside the verdicts: what was skipped, and what was chosen."""
    texts = []
    if any(arm["cost"]["skips"] for arm in arms):
        shares = [f"{quoted(arm['name'])} {arm['cost']['skips'] / arm['cost']['batches']:.1%}" for arm in arms]
        texts.append(
            f"Skipped as outliers, which `--skip_outliers none` turns off: {', '.join(shares)} of the batches."
            + " Which ones depends on the loss, and so on the prompt." * (what_varies(data) == "prompt")
        )
    chosen = [
        f"{quoted(arm['name'])} {', '.join(f'{name} {value}' for name, value in arm['tuning']['chosen'].items())}"
        for arm in arms
        if arm["tuning"]
    ]
    return [*texts, f"Chosen by {validation(data)}: {'; '.join(chosen)}."] if chosen else texts


def validation(data: dict[str, Any]) -> str:
    return words_for(f"eval_{score_of(data['metric']).name}")


def shortcomings(data: dict[str, Any]) -> list[str]:
    missing = data["missing"]
    texts = [f"Not finished and left out: {', '.join(missing)}."] if missing else []
    if not data["metric"].startswith("test_") and any(arm["tuning"] for arm in data["arms"]):
        texts.append(
            f"There is no test split: what is reported is the {validation(data)} that values were chosen by. It "
            f"flatters, and the {what_varies(data)} with the most values to choose from the most."
        )
    texts += [
        f"{quoted(arm['name'])}: the best {name}, {arm['tuning']['chosen'][name]}, lies at an end of what was tried. "
        "Try further values."
        for arm in data["arms"]
        if arm["tuning"]
        for name in arm["tuning"]["at_edge"]
    ]
    return [*texts, *data["failures"], *data["warnings"]]


def verdicts(data: dict[str, Any], arms: list[dict[str, Any]]) -> list[Notice]:
    metric = data["metric"]
    passes = {arm["name"]: arm["cost"]["passes"] for arm in arms}
    found = []
    for arm in arms:
        if arm["name"] != data["reference"] and metric in arm:
            kind = kind_of(arm[metric]["verdict"])
            if what_varies(data) == "scheduler" and data["match"] == "batches" and kind != "warning":
                kind = "neutral"  # what took more compute has won nothing by being better
            sentence = verdict_sentence(arm, data["reference"], metric)
            ratio = passes[arm["name"]] / passes.get(data["reference"], passes[arm["name"]])
            if not 0.95 < ratio < 1.05:
                sentence += f" It spent {ratio:.1f} times the passes."
            found.append(Notice(kind, sentence))
    found += [
        Notice("neutral", verdict_sentence(arm, arm["control"], metric, "beside its control"))
        for arm in data["against_controls"]
        if metric in arm
    ]
    if len(found) > 1:
        text = (
            f"These are {len(found)} comparisons, each with an interval of its own: that one of {len(found)} looks "
            "different by chance alone is likelier than one in twenty."
        )
        found.append(Notice("neutral", text))
    return found


def kind_of(verdict: str) -> Any:
    if verdict.startswith("no verdict") and not verdict.endswith("one seed"):
        return "warning"
    return KINDS.get(verdict, "neutral")


def verdict_sentence(arm: dict[str, Any], reference: str, metric: str, remark: str = "") -> str:
    """Say what the difference of an arm to the reference is, and how sure that is."""
    entry, score, reference = arm[metric], score_of(metric), quoted(reference)
    found = entry["difference"]
    name, words = f"{quoted(arm['name'])} {remark}".strip(), entry["verdict"]
    if words == "no difference":
        equal = "every run equals" if score.in_logs else f"with every seed, {words_for(metric)} equals"
        return f"{name}: {equal} that of {reference}."
    sentence = f"{name}: {words}."
    if words.endswith("pairs"):
        sentence += f" The other runs of it or of {reference} diverged, failed or are not finished."
    if not found["seeds"]:
        return sentence
    sentence += f" {sentence_case(words_for(metric))} {difference(found, score)} against {reference}"
    if "t_low" not in found:
        return f"{sentence}."
    interval = f"95 % interval {signed(found['t_low'])} to {signed(found['t_high'])}"
    sentence += f", {interval}, {score.direction} in {found['wins']} of {found['seeds']} seeds."
    if words == "no evidence":
        share = f" ({percent(found['detectable'], found).lstrip('+')})" if score.in_logs else ""
        sentence += (
            f" With {found['seeds']} seeds that scatter like these, a difference of "
            f"{number(found['detectable'], 3)}{share} would have been found four times in five."
        )
    return sentence


def summary_lines(data: dict[str, Any], out: Path) -> list[str]:
    """Return the verdicts and where the report lies, for the terminal."""
    arms = [arm for arm in data["arms"] if arm["seeds"]]
    return [
        "",
        *([describe_protocol(data)] if what_varies(data) == "scheduler" and data["match"] == "batches" else []),
        *circumstances(data, arms),
        *(f"warning: {text}" for text in shortcomings(data)),
        *(notice.text for notice in verdicts(data, arms)),
        *(f"{what:<11} {out / name}" for what, name in FILES.items() if (out / name).exists()),
    ]


# ---- Numbers ----


def signed(value: float | None) -> str:
    return DASH if value is None else f"{value:+.3g}"


def difference(found: dict[str, Any], score: Score) -> str:
    """Write the mean of paired differences: in units of the score, and in percent where ratios count."""
    share = f" ({percent(found['mean'], found)})" if score.in_logs else ""
    return f"{signed(found['mean'])}{share}"


def percent(value: float, found: dict[str, Any]) -> str:
    return f"{100 * value / found['relative_to']:+.1f} %"


def mean_and_deviation(entry: dict[str, Any]) -> str:
    if entry["mean"] is None:
        return "not finite"
    spread = "" if entry["deviation"] is None else f" ± {entry['deviation']:.2g}"
    return number(entry["mean"]) + spread + (f" ({entry['not_finite']} not finite)" if entry["not_finite"] else "")


# ---- What was reached ----


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
        f"Mean over seeds with its 95 % t interval, and each seed. {better_side(metric)} is better. The scatter "
        f"between seeds is shared by all {varied}s: the next figure takes it out.",
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
        f"{better_side(metric)} of 0 is better than {quoted(reference)}; an interval across 0 is no evidence.",
        "intervals",
        f"{words_for(metric)} minus that of {quoted(reference)}",
        varied,
        tuple(series),
        reference=0.0,
        range_label="95 % t interval",
        inner_label="95 % bootstrap interval",
    )


# ---- On the way, and what they did ----


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
        return curves(arms), relative_curves(arms, data["reference"])
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


def curves(arms: list[dict[str, Any]]) -> Figure:
    return Figure(
        "curves",
        "Validation perplexity against compute",
        "Mean over seeds and one standard deviation around it. At the same place on the abscissa, runs have spent the "
        "same.",
        "lines",
        "passes spent",
        words_for("eval_perplexity"),
        lines(arms, "curve", "passes", "mean", band=True),
        y_log=True,
        range_label="one standard deviation",
    )


def relative_curves(arms: list[dict[str, Any]], reference: str) -> Figure:
    return Figure(
        "relative_curves",
        f"Validation perplexity relative to {reference}, at equal compute",
        f"Mean over paired seeds with its 95 % t interval. Below 0 is better than {reference} at that compute. "
        f"Between two evaluations of {reference} its negative log-likelihood is interpolated.",
        "lines",
        "passes spent",
        f"% above {reference}",
        lines([arm for arm in arms if arm["name"] != reference], "relative_curve", "passes", "mean", band=True),
        reference=0.0,
        range_label="95 % t interval",
    )


def behaviour(arms: list[dict[str, Any]]) -> tuple[Any, ...]:
    figures: list[Any] = [
        Figure(
            "repeats_over_loss",
            "Repeats against first-pass loss",
            "Mean updates on batches of about this loss. A skip counts as 0.",
            "lines",
            "first-pass loss, nats per token",
            "updates on a batch",
            lines(arms, "over_loss", "loss", "mean"),
        ),
        Figure(
            "repeats_over_time",
            "Repeats in the course of training",
            "Mean updates on a batch, by the passes spent until then.",
            "lines",
            "passes spent",
            "updates on a batch",
            lines(arms, "over_time", "passes", "repeats"),
        ),
    ]
    if any(point["skipped"] for arm in arms for point in arm["over_time"]):
        figures.append(skips_over_time(arms))
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
            "batches that had so many passes. It tells what was learnt of this batch, not of others.",
            "lines",
            "pass over the batch",
            "loss minus first-pass loss, nats",
            repeating,
            whole_x=True,
            range_label="quartiles",
        )
    )
    return tuple(figures)


def skips_over_time(arms: list[dict[str, Any]]) -> Figure:
    return Figure(
        "skips_over_time",
        "Skips in the course of training",
        "Share of the batches that were skipped, by the passes spent until then.",
        "lines",
        "passes spent",
        "share of batches skipped",
        lines(arms, "over_time", "passes", "skipped"),
    )


# ---- Costs, tuning, method ----

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
