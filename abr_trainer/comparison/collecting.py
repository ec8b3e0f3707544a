"""Read the runs of a comparison, sum them up arm by arm, and tell what speaks against comparing them."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..records.commands import commands_in
from ..records.files import COMPARISON, CONFIGS, PROVENANCE, TRACE_NAME, Damaged, read_json, read_lines, write_whole
from ..records.flags import BUDGETS, budget_in
from ..records.shapes import SPENT
from .arms import Arm, quoted
from .curves import (
    SAME_SHARE_OF_SECONDS,
    clock_of,
    difference,
    finite,
    learning_curve,
    loss_curve,
    mean_curve,
    on_clock,
    over_loss,
    over_passes,
    over_time,
    relative_curve,
)
from .experiment import Experiment, Run
from .scores import main_metric, metrics_in, score_of
from .shape import flaw_of_comparison
from .statistics import mean_interval, paired, verdict

LATER_COSTS = ("waiting_seconds",)
"""Those that runs of earlier versions have not counted."""

SAME_LOSS = 1e-3
"""Relative difference up to which the first loss of two runs is that of the same weights on the same data."""

SAME_COST = 0.02
"""Relative difference up to which passes cost the same: the last batch of an epoch may be smaller."""

MAY_DIFFER = ("path", "seed", "dir")
"""Ends of the names of settings that say where a model lies, or which seed a run had."""


def read_run(
    run: Run, results: dict[str, float], root: Path, metric: str = "eval_perplexity", clock: str = "passes"
) -> dict[str, Any]:
    """Return what a report tells of a finished run; batches of the trace under "batches".

    Args:
        metric: What its learning curve shows.
        clock: What it shows that over.
    """
    provenance = json.loads((run.directory / PROVENANCE).read_text(encoding="utf-8"))
    batches = on_clock(list(read_lines(run.directory / TRACE_NAME)), clock)
    return {
        "arm": run.arm.name,
        "seed": run.seed,
        "tuned": dict(run.tuned),
        "directory": str(run.directory.relative_to(root)),
        "argv": provenance["argv"],
        "resumed": len(commands_in(provenance)) - 1,
        **{name: provenance[name] for name in ("versions", "git", "machine")},
        **({"prompt": provenance.get("arguments", {}).get("prompt_text")} if run.varied == "prompt" else {}),
        "metrics": {name: finite(results[name]) for name in metrics_in(results, run.varied)},
        "cost": {
            name: results[f"train_{name}"]
            for name in (*SPENT, *LATER_COSTS)
            if name in SPENT or f"train_{name}" in results
        },
        "curve": learning_curve(run.directory, batches, results, metric, clock),
        "first_loss": batches[0]["loss"] if batches else None,
        "batches": batches,
    }


def summarise_arm(
    runs: list[dict[str, Any]],
    reference: list[dict[str, Any]],
    metrics: list[str],
    planned: int,
    is_tuned: bool = True,
) -> dict[str, Any]:
    """Return mean and deviation of each metric over seeds, its paired difference to the reference, and mean costs.

    Args:
        planned: How many seeds were asked for.
        is_tuned: Whether the values to compare at are chosen. Else there is no verdict.
    """
    summary: dict[str, Any] = {"seeds": [run["seed"] for run in runs]}
    before = {run["seed"]: run["metrics"] for run in reference}
    for metric in metrics:
        values = {run["seed"]: run["metrics"].get(metric) for run in runs}
        finite = [value for value in values.values() if value is not None]
        pairs = [
            (value, before[seed][metric])
            for seed, value in values.items()
            if value is not None and before.get(seed, {}).get(metric) is not None
        ]
        score = score_of(metric)
        found = paired([difference(value, other, score) for value, other in pairs], score.lower_is_better)
        if pairs:
            found["relative_to"] = statistics.fmean(other for _, other in pairs)
        summary[metric] = {
            "values": values,
            "not_finite": len(values) - len(finite),
            "mean": statistics.fmean(finite) if finite else None,
            "deviation": statistics.stdev(finite) if len(finite) > 1 else None,
            "interval": mean_interval(finite),
            "difference": found,
            "verdict": verdict(found, planned, score.lower_is_better)
            if is_tuned
            else "no verdict: tuning is not finished",
        }
    if runs:
        counted = [name for name in (*SPENT, *LATER_COSTS) if all(name in run["cost"] for run in runs)]
        summary["cost"] = {name: statistics.fmean(run["cost"][name] for run in runs) for name in counted}
    return summary


def collect(experiment: Experiment, argv: Sequence[str]) -> dict[str, Any]:
    """Read all finished runs of an experiment, and return everything that the report is made of.

    Args:
        argv: The command line of the comparison.
    """
    wanted = {arm.name: experiment.final_runs([arm]) for arm in experiment.arms}
    finished = {
        name: [(run, results) for run in planned if (results := experiment.results(run))]
        for name, planned in wanted.items()
    }
    reached = [name for some in finished.values() for _, results in some for name in results]
    metrics, metric = metrics_in(reached, experiment.varied), main_metric(reached, experiment.varied)
    score, clock = score_of(metric), clock_of(experiment.varied, experiment.match)
    runs = {
        name: [read_run(run, results, experiment.out, f"eval_{score.name}", clock) for run, results in some]
        for name, some in finished.items()
    }
    of_prompts: dict[str, dict[str, Any]] = {name: {} for name in runs}
    if experiment.varied == "prompt":
        for name, read in runs.items():
            of_prompts[name]["loss_curve"] = mean_curve([loss_curve(run["batches"]) for run in read], clock="epoch")
    batches = {name: [batch for run in read for batch in run.pop("batches")] for name, read in runs.items()}
    curves = {name: {run["seed"]: run["curve"] for run in read} for name, read in runs.items()}
    everything = [run for read in runs.values() for run in read]
    untuned = {arm.name for arm in experiment.arms if not is_tuned(experiment, arm)}

    def against(name: str, other: str) -> dict[str, Any]:
        return summarise_arm(runs[name], runs[other], metrics, len(experiment.seeds), not {name, other} & untuned)

    spent = "seconds" if clock == "seconds" else "passes"
    end = max((run["cost"][spent] for run in everything), default=1.0)
    losses = [batch["loss"] for some in batches.values() for batch in some if batch["loss"] is not None] or [0.0]
    arms = [
        {
            "name": arm.name,
            "flags": list(arm.arguments),
            "tuning": tuning_of(experiment, arm),
            **against(arm.name, experiment.reference),
            "curve": mean_curve([run["curve"] for run in runs[arm.name]], score, clock),
            "relative_curve": relative_curve(curves[arm.name], curves[experiment.reference], score, clock),
            **of_prompts[arm.name],
            "over_time": over_time(batches[arm.name], end, spent),
            "over_loss": over_loss(batches[arm.name], min(losses), max(losses)),
            "over_passes": over_passes(batches[arm.name]),
        }
        for arm in experiment.arms
    ]
    return {
        "format": 1,
        "argv": list(argv),
        "varied": experiment.varied,
        "match": experiment.match,
        "metric": metric,
        "reference": experiment.reference,
        "seeds": experiment.seeds,
        "flags": experiment.flags,
        "launcher": experiment.launcher,
        "jobs": experiment.jobs,
        "arms": arms,
        "against_controls": [
            {"name": name, "control": control, **against(name, control)} for name, control in experiment.controlled
        ],
        "runs": everything,
        "missing": [
            run.title
            for arm in experiment.arms
            for run in dict.fromkeys([*experiment.tuning_runs([arm]), *wanted[arm.name]])
            if experiment.results(run) is None and run not in experiment.failures
        ],
        "failures": list(experiment.failures.values()),
        "warnings": [
            *find_mismatches(everything, experiment.match, experiment.varied),
            *(find_other_configs(experiment.out, everything) if experiment.varied == "prompt" else []),
        ],
    }


def tuning_of(experiment: Experiment, arm: Arm) -> dict[str, Any] | None:
    """Return the candidates of an arm with their mean validation score, which was chosen, and which of the chosen
    values lie at an end of what was tried. None where nothing was tuned.
    """
    chosen = dict(experiment.chosen(arm))
    if not chosen:
        return None
    at_edge = []
    for name, value in chosen.items():
        with contextlib.suppress(ValueError):  # what is no number has no ends
            numbers = [float(each) for each in experiment.tune[name]]
            if len(numbers) > 1 and float(value) in (min(numbers), max(numbers)):
                at_edge.append(name)
    metric = f"eval_{experiment.score(experiment.tuning_runs([arm])).name}"
    tried = [{"values": dict(each), metric: finite(mean)} for each, mean in experiment.tried(arm).items()]
    return {"chosen": chosen, "tried": tried, "at_edge": at_edge}


def is_tuned(experiment: Experiment, arm: Arm) -> bool:
    """Tell whether all values have been tried, and one was good enough to choose."""
    is_over = all(run in experiment.failures or run.results() for run in experiment.tuning_runs([arm]))
    return is_over and (
        len(experiment.candidates(arm)) == 1 or any(map(math.isfinite, experiment.tried(arm).values()))
    )


def find_mismatches(runs: list[dict[str, Any]], match: str, varied: str = "scheduler") -> list[str]:
    """Return what speaks against comparing these runs, a sentence each."""
    warnings = find_same_runs(runs) + find_uneven_data(runs) if varied == "prompt" else find_unpaired(runs)
    for arm in dict.fromkeys(run["arm"] for run in runs):
        reached = [(run["first_loss"], *run["metrics"].values()) for run in runs if run["arm"] == arm]
        if len(set(reached)) < len(reached):
            warnings.append(
                f"Seeds of {quoted(arm)} gave the same run: neither the order of the data nor the weights depend on "
                "the seed. What scatters over seeds says nothing here."
            )
    kinds = {"commits of the code": "git", "package versions": "versions", "machines": "machine"}
    for what, key in kinds.items():
        if len({json.dumps(run[key], sort_keys=True) for run in runs}) > 1:
            warnings.append(f"The runs come from different {what}; see `{key}` in {COMPARISON}.")
    if match in BUDGETS:
        warnings += find_uneven_budgets(runs, match)
    return warnings if varied == "prompt" or match == "seconds" else warnings + find_uneven_costs(runs)


def find_unpaired(runs: list[dict[str, Any]]) -> list[str]:
    """Return for which seeds the arms did not begin with the same weights on the same data."""
    warnings = []
    for seed in sorted({run["seed"] for run in runs}):
        first = [run["first_loss"] for run in runs if run["seed"] == seed and run["first_loss"] is not None]
        if first and max(first) - min(first) > SAME_LOSS * abs(max(first)):
            warnings.append(
                f"Seed {seed} is not paired: the loss of the first batch, before any update, lies between "
                f"{min(first):.4f} and {max(first):.4f}."
            )
    return warnings


def find_same_runs(runs: list[dict[str, Any]]) -> list[str]:
    """Return which arms did not differ with a seed: their prompts have not reached the model."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for run in runs:
        key = (run["seed"], run["first_loss"], *run["metrics"].values(), run["cost"]["tokens"])
        alike.setdefault(key, []).append(quoted(run["arm"]))
    return [
        f"{' and '.join(arms)} gave the same run with seed {seed}: their prompts have not reached the model."
        for (seed, *_), arms in alike.items()
        if len(arms) > 1
    ]


def find_uneven_data(runs: list[dict[str, Any]]) -> list[str]:
    batches = [run["cost"]["batches"] for run in runs]
    if not batches or min(batches) == max(batches):
        return []
    return [f"The runs did not see the same: {min(batches):g} to {max(batches):g} batches."]


def find_other_configs(out: Path, runs: list[dict[str, Any]]) -> list[str]:
    """Return which files that describe a model say other things of some runs, paths and seeds aside."""
    warnings = []
    for name in CONFIGS:
        settings = [_settings(read_json(out / run["directory"] / name)) for run in runs]
        keys = dict.fromkeys(key for some in settings for key in some)
        if differing := [key for key in keys if len({some.get(key) for some in settings}) > 1]:
            warnings.append(f"{name} differs between the runs in {', '.join(differing)}.")
    return warnings


def _settings(value: Any, prefix: str = "") -> dict[str, str]:
    """Return the settings in a description of a model by their whole names, without those that may differ.

    >>> _settings({"seed": 1, "lora": {"r": 8, "modules": ["v", "q"]}})
    {'lora.r': '8', 'lora.modules': '["q", "v"]'}
    """
    if isinstance(value, dict):
        kept = {key: each for key, each in value.items() if not key.endswith(MAY_DIFFER)}
        return {k: v for key, each in kept.items() for k, v in _settings(each, f"{prefix}.{key}").items()}
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        value = sorted(value)  # PEFT writes sets, whose order differs from process to process
    return {prefix[1:]: json.dumps(value)} if prefix else {}


def copy_configs(data: dict[str, Any], out: Path) -> None:
    """Copy what describes the model of the first finished run into the directory of the comparison."""
    for name in CONFIGS:
        source = out / data["runs"][0]["directory"] / name
        if source.is_file():
            write_whole(out / name, source.read_bytes())


def find_uneven_costs(runs: list[dict[str, Any]]) -> list[str]:
    """Return whether a pass was dearer in some runs."""
    costs = [run["cost"]["flops"] / run["cost"]["passes"] for run in runs]
    if not costs or max(costs) <= min(costs) * (1 + SAME_COST):
        return []
    return [
        f"A pass did not cost all runs the same: {min(costs):.3g} to {max(costs):.3g} FLOPs. Equal passes are not "
        "equal compute here."
    ]


def find_uneven_budgets(runs: list[dict[str, Any]], unit: str) -> list[str]:
    """Return which arms stop early by a budget of their own, and whether others have not spent theirs, or more.

    Args:
        unit: Of the budget: "passes" or "seconds".
    """
    budgets = {run["arm"]: int((budget_in(run["argv"], unit) or ("", "0"))[1]) for run in runs}
    most = max(budgets.values(), default=0)
    warnings = [
        f"{arm} stops after {budget} of {most} {unit}, by a flag of its own."
        for arm, budget in budgets.items()
        if budget < most
    ]
    spent = [run["cost"][unit] for run in runs if budgets[run["arm"]] == most]
    if unit == "seconds" and spent and max(spent) > most * (1 + SAME_SHARE_OF_SECONDS):
        warnings.append(
            f"A run ends with its batch under way: the longest took {max(spent):.1f} of {most} seconds. Give a larger "
            "--max_seconds, beside which a batch is short."
        )
    least = max(spent, default=0) - 1 if unit == "passes" else most * (1 - SAME_SHARE_OF_SECONDS)
    if spent and min(spent) <= least:
        warnings.append(
            f"The runs did not spend the same: {min(spent):g} to {max(spent):g} {unit}. The data ended before the "
            "budget, or a cap on batches did it."
        )
    return warnings


def write_comparison(data: dict[str, Any], out: Path) -> None:
    write_whole(out / COMPARISON, json.dumps(data, indent=1, allow_nan=False) + "\n")


def read_comparison(out: Path) -> dict[str, Any]:
    """Read what `write_comparison` wrote.

    Raises:
        ValueError: There is nothing to read, or it is of another format.
    """
    path = out / COMPARISON
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}. A comparison writes it to its --out.") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}.") from None
    if not isinstance(data, dict) or data.get("format") != 1:
        raise ValueError(f"{path} is of a format that this version does not read.")
    if wrong := flaw_of_comparison(data):
        raise Damaged(f"{path} is damaged: {wrong}.")
    return data
