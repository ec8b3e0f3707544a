"""Read the runs of a comparison, align them on the ledger, and say what they show: statistics over paired seeds."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import optimize, stats

from ..records.files import (
    COMPARISON,
    CONFIGS,
    PROVENANCE,
    TRACE_NAME,
    TRAINER_STATE,
    read_json,
    read_lines,
    updates_of,
    write_whole,
)
from ..records.flags import BUDGET, given_flags
from .arms import Arm, quoted
from .experiment import Experiment, Run
from .scores import PERPLEXITY, Score, main_metric, metrics_in, score_of

COSTS = ("passes", "updates", "batches", "skips", "repeats", "tokens", "flops", "seconds")

CONFIDENCE = 0.95
POWER = 0.8
RESAMPLES = 9999

SAME_LOSS = 1e-3
"""Relative difference up to which the first loss of two runs is that of the same weights on the same data."""

SAME_COST = 0.02
"""Relative difference up to which passes cost the same: the last batch of an epoch may be smaller."""

TOO_LARGE = 1e100

BINS = 20

CLOCKS = {"scheduler": "passes", "prompt": "epoch"}
"""What learning curves run over, by what is varied. Whoever repeats a batch has seen less at the same compute; what a
prompt costs is no matter of choice, and all have seen the same after as many epochs."""

SAME_TIME = {"passes": 1.0, "epoch": 1e-6}
"""By how much less one run may have spent than another that still counts as having spent the same."""

MAY_DIFFER = ("path", "seed", "dir")
"""Ends of the names of settings that say where a model lies, or which seed a run had."""

Curve = list[list[Any]]
"""`[passes spent or epochs, validation score]` for each evaluation of a run, in order; None for one that is not
finite."""


# ---- Statistics ----


def paired(differences: Sequence[float], lower_is_better: bool = True) -> dict[str, Any]:
    """Return what paired differences over seeds show.

    The t interval is the one to decide by. The percentile bootstrap of few seeds is too narrow: of five normal
    differences it covers the mean in 84 % of the cases, not in 95 %.

    Returns:
        `seeds`, `mean`, `deviation`, `wins` (how many are on the better side of 0); from two seeds on, `t_low` and
        `t_high`, `bootstrap_low` and `bootstrap_high`, the ends of 95 % intervals, and `detectable`: the difference
        that a t test at 5 % would have found with 80 % power, had the seeds scattered as these do.

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
        return POWER - float(stats.nct.sf(limit, freedom, mean))  # that it comes out on the other side is negligible

    return float(optimize.brentq(missing, 0.0, 2 * limit))


def verdict(found: dict[str, Any], planned: int, lower_is_better: bool = True) -> str:
    """Say in words what `paired` has found.

    Args:
        planned: How many pairs there should be. Without those that have diverged or failed, the others say nothing.

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


# ---- One run ----


def read_run(run: Run, results: dict[str, float], root: Path, metric: str = "eval_perplexity") -> dict[str, Any]:
    """Return what a report tells of a finished run; batches of the trace under "batches".

    Args:
        metric: What its learning curve shows.
    """
    provenance = json.loads((run.directory / PROVENANCE).read_text(encoding="utf-8"))
    batches = list(read_lines(run.directory / TRACE_NAME))
    return {
        "arm": run.arm.name,
        "seed": run.seed,
        "tuned": dict(run.tuned),
        "directory": str(run.directory.relative_to(root)),
        "argv": provenance["argv"],
        "resumed": len(provenance.get("resumed", [])),
        **{name: provenance[name] for name in ("versions", "git", "machine")},
        **({"prompt": provenance.get("arguments", {}).get("prompt_text")} if run.varied == "prompt" else {}),
        "metrics": {name: _finite(results[name]) for name in metrics_in(results, run.varied)},
        "cost": {name: results[f"train_{name}"] for name in COSTS},
        "curve": learning_curve(run.directory, batches, results, metric, CLOCKS[run.varied]),
        "first_loss": batches[0]["loss"] if batches else None,
        "batches": batches,
    }


def _finite(value: float) -> float | None:
    """Return None for a score that is not finite, or so large that its square is not."""
    return value if math.isfinite(value) and abs(value) < TOO_LARGE else None


def learning_curve(
    directory: Path,
    batches: list[dict[str, Any]],
    results: dict[str, float],
    metric: str = "eval_perplexity",
    clock: str = "passes",
) -> Curve:
    """Return the evaluations of a run: those in the state of its trainer, and what it has reached in the end.

    Args:
        metric: Of the evaluations.
        clock: What to have them over: "passes" or "epoch".
    """
    spent = {0: 0.0, **{batch["step"]: batch[clock] for batch in batches}}
    log = (read_json(directory / TRAINER_STATE) or {"log_history": []})["log_history"]
    if clock == "epoch":
        spent |= {logs["step"]: logs["epoch"] for logs in log if "epoch" in logs}
    curve = {spent[logs["step"]]: _finite(logs[metric]) for logs in log if metric in logs and logs["step"] in spent}
    if metric in results and "train_passes" in results:
        end = results["train_passes"] if clock == "passes" else max(spent.values())
        curve[end] = _finite(results[metric])
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


# ---- One arm ----


def mean_curve(curves: list[Curve], score: Score = PERPLEXITY, clock: str = "passes") -> list[dict[str, float]]:
    """Average the learning curves of several seeds over passes spent, or over epochs.

    Where all have as many evaluations, the i-th of each are taken together; else see `aligned`. Where one is not
    finite there is no mean.

    Returns:
        A list of `passes` (or `epoch`), `mean`, `low` and `high`: one standard deviation around the mean.
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
            pass earlier counts as having spent the same.

    Returns:
        A list of `passes` (or `epoch`) and `mean`, in percent of the reference for a score in logs, else the plain
        difference, with the ends `low` and `high` of a 95 % t interval, from two seeds on. Where one of the curves is
        not finite there is no point.
    """

    def change(value: float, was: float) -> float:
        return 100 * (value / was - 1) if score.in_logs else _difference(value, was, score)

    changes = []
    seeds = [seed for seed in curves if reference.get(seed)]
    for seed, curve in zip(seeds, aligned([curves[seed] for seed in seeds], score), strict=False):
        shared = [point for point in curve if point[0] < reference[seed][-1][0] + SAME_TIME[clock]]
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


def _difference(value: float, other: float, score: Score) -> float:
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
        return [[at, _finite(float(value))] for at, value in zip(grid, np.interp(grid, times, numbers), strict=True)]
    nats = np.interp(grid, times, np.log(numbers))
    return [[at, _finite(math.exp(value))] for at, value in zip(grid, nats, strict=True)]


def over_time(batches: list[dict[str, Any]], end: float) -> list[dict[str, float]]:
    """Return mean repeats and the share of skipped batches in equal parts of the passes up to `end`."""
    bins: list[list[dict[str, Any]]] = [[] for _ in range(BINS)]
    for batch in batches:
        bins[min(BINS - 1, int(batch["passes"] / end * BINS))].append(batch)
    return [
        {
            "passes": (i + 0.5) * end / BINS,
            "repeats": statistics.fmean(updates_of(batch) for batch in part),
            "skipped": statistics.fmean(batch["repeats"] == 0 for batch in part),
            "batches": len(part),
        }
        for i, part in enumerate(bins)
        if part
    ]


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
        found = paired([_difference(value, other, score) for value, other in pairs], score.lower_is_better)
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
        summary["cost"] = {name: statistics.fmean(run["cost"][name] for run in runs) for name in COSTS}
    return summary


# ---- The comparison ----


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
    score, clock = score_of(metric), CLOCKS[experiment.varied]
    runs = {
        name: [read_run(run, results, experiment.out, f"eval_{score.name}") for run, results in some]
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

    end = max((run["cost"]["passes"] for run in everything), default=1.0)
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
            "over_time": over_time(batches[arm.name], end),
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
    tried = [{"values": dict(each), metric: _finite(mean)} for each, mean in experiment.tried(arm).items()]
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
    if match == "passes":
        warnings += find_uneven_budgets(runs)
    return warnings if varied == "prompt" else warnings + find_uneven_costs(runs)


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


def find_uneven_budgets(runs: list[dict[str, Any]]) -> list[str]:
    """Return which arms stop early by a budget of their own, and whether others have ended before theirs."""
    budgets = {run["arm"]: int(given_flags(run["argv"]).get(BUDGET, ["0"])[-1]) for run in runs}
    most = max(budgets.values(), default=0)
    warnings = [
        f"{arm} stops after {budget} of {most} passes, by a flag of its own."
        for arm, budget in budgets.items()
        if budget < most
    ]
    passes = [run["cost"]["passes"] for run in runs if budgets[run["arm"]] == most]
    if passes and max(passes) - min(passes) >= 1:
        warnings.append(
            f"The runs did not spend the same: {min(passes):g} to {max(passes):g} passes. The data ended before the "
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
    return data
