"""What a comparison shows, in sentences: for its report and for the terminal."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..comparison.arms import quoted
from ..comparison.scores import Score, score_of, words_for
from ..records.flags import budget_in
from .figure import Kind, Notice
from .text import DASH, fixed, number, share, terminal_width

PROTOCOLS = {
    "passes": "All runs had the same compute, {passes} passes (forward-backwards over a batch), over which the "
    "learning rate falls to the same end. A scheduler that repeats batches sees fewer of them.",
    "seconds": "All runs had the same time, {seconds} seconds of training: batches and the wait for their data, "
    "without evaluation, logs and checkpoints. Over these the learning rate falls to the same end. Seconds depend on "
    "the machine and on what else it does: these were taken on {machine}.",
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

KINDS: dict[str, Kind] = {"better": "good", "worse": "bad", "no verdict: one seed": "neutral"}

BADGES = {"no evidence": "cannot tell", "no difference": "equal", "no verdict: one seed": "one seed"}

MOST_NAMED = 3
"""Arms that the answer names."""


def what_varies(data: dict[str, Any]) -> str:
    """Return what the arms differ in. Before prompts were compared, data did not tell."""
    varied: str = data.get("varied", "scheduler")
    return varied


def describe_protocol(data: dict[str, Any]) -> str:
    seeds = f"{len(data['seeds'])} seed{'s' * (len(data['seeds']) > 1)}"
    if what_varies(data) == "prompt":
        epochs = max((at for run in data["runs"] for at, _ in run["curve"]), default=0)
        return (
            f"{PROTOCOLS['prompts'].format(epochs=epochs, s='s' * (epochs != 1))} {seeds.capitalize()}, paired: for "
            "each, all prompts begin with the same weights of adapter and head, and the rows come in the same order."
        )
    passes = [run["cost"]["passes"] for run in data["runs"]]
    budget = budget_in(data["flags"], data["match"])
    machines = [machine_of(run) for run in data["runs"]] if data["match"] == "seconds" else []
    protocol = PROTOCOLS[data["match"]].format(
        passes=f"{max(passes, default=0):g}",
        seconds="" if budget is None else budget[1],
        machine=" and ".join(dict.fromkeys(machines)),
    )
    return (
        f"{protocol} {seeds.capitalize()}, paired: for each, all schedulers begin with the same weights and see the "
        "data in the same order."
    )


def machine_of(run: dict[str, Any]) -> str:
    """Name the machine of a run.

    >>> machine_of({"machine": {"system": "Linux x86_64", "cores": 8, "device": "cpu", "processes": 2}})
    'Linux x86_64 with 8 cores, cpu, in 2 processes'
    """
    machine = run["machine"]
    processes = f", in {machine['processes']} processes" if machine["processes"] > 1 else ""
    return f"{machine['system']} with {machine['cores']} cores, {machine['device']}{processes}"


def circumstances(data: dict[str, Any], arms: list[dict[str, Any]]) -> list[str]:
    """Return what to know beside the verdicts: what was skipped, and what was chosen."""
    texts = []
    if any(arm["cost"]["skips"] for arm in arms):
        shares = [f"{quoted(arm['name'])} {share(arm['cost']['skips'], arm['cost']['batches'])}" for arm in arms]
        texts.append(
            f"Batches skipped as outliers (`--skip_outliers none` turns that off): {', '.join(shares)}."
            + " Which ones they are depends on the loss, and so on the prompt." * (what_varies(data) == "prompt")
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
    """Return the answer of a comparison, and a verdict for each arm and each control; the first one says most."""
    metric, reference = data["metric"], data["reference"]
    unit = "seconds" if data.get("match") == "seconds" else "passes"
    spent = {arm["name"]: arm["cost"][unit] for arm in arms}
    found = []
    for arm in arms:
        if arm["name"] != reference and metric in arm:
            ratio = spent[arm["name"]] / spent.get(reference, spent[arm["name"]])
            remark = f"It spent {ratio:.1f} times the {unit}." if not 0.95 < ratio < 1.05 else ""
            # What took more compute has won nothing by being better.
            found.append(verdict_on(arm, reference, metric, remark, is_fair=is_fair(data)))
    if len(found) > 1:
        found.insert(0, answer(data, arms))
    found += [
        replace(verdict_on(arm, arm["control"], metric, is_control=True), kind="neutral")
        for arm in data["against_controls"]
        if metric in arm
    ]
    return found


def caution(data: dict[str, Any], arms: list[dict[str, Any]]) -> list[str]:
    """Return what to keep in mind where several verdicts stand side by side."""
    metric = data["metric"]
    count = sum(arm["name"] != data["reference"] and metric in arm for arm in arms)
    count += sum(metric in arm for arm in data["against_controls"])
    if count < 2:
        return []
    text = "Each finds a difference where there is none in one case of twenty: one of them may be chance."
    return [f"These are {count} comparisons. {text}"]


def is_fair(data: dict[str, Any]) -> bool:
    """Tell whether the arms had the same to spend."""
    return what_varies(data) == "prompt" or data["match"] != "batches"


def answer(data: dict[str, Any], arms: list[dict[str, Any]]) -> Notice:
    """Answer the question of a comparison of several arms in a sentence."""
    metric, reference = data["metric"], quoted(data["reference"])
    varied, match = what_varies(data), data.get("match")
    compute = "" if varied == "prompt" else " in equal time" if match == "seconds" else " at equal compute"
    others = [arm for arm in arms if arm["name"] != data["reference"] and metric in arm]
    of = {
        verdict: [quoted(arm["name"]) for arm in others if arm[metric]["verdict"] == verdict]
        for verdict in ("better", "worse", "no difference")
    }
    better, worse, count = of["better"], of["worse"], len(others)
    unsure = count - sum(map(len, of.values()))
    if not is_fair(data):
        text = f"The {varied}s saw the same batches, but did not spend the same compute: nothing here shows a gain."
        return Notice("neutral", text, "not equal compute")
    if len(worse) == count:
        they = "both" if count == 2 else f"all {count}"
        return Notice("bad", f"No: {they} {varied}s are worse than {reference}{compute}.", "worse")
    if unsure == count:
        text = f"No clear difference to {reference} was found for any of the {count} {varied}s{compute}."
        return Notice("neutral", text, "cannot tell")
    parts = [
        f"{_listed(names)} {'is' if len(names) == 1 else 'are'} {verdict}" for verdict, names in of.items() if names
    ]
    if unsure:
        parts.append(f"for the other{'s' if unsure > 1 else ' one'}, the seeds cannot tell")
    says_yes = better or (worse and varied == "prompt")
    text = f"{'Yes' if says_yes else 'No'}: against {reference}{compute}, {'; '.join(parts)}."
    if better:
        return Notice("good", text, f"{len(better)} of {count} better")
    return Notice("bad" if worse else "neutral", text, f"{len(worse)} of {count} worse" if worse else "no gain")


def _listed(names: list[str]) -> str:
    if len(names) > MOST_NAMED:
        return f"{len(names)} of them"
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def badge_of(verdict: str) -> str:
    """Return a verdict of the statistics in a word or two.

    >>> badge_of("better"), badge_of("no evidence"), badge_of("no verdict: 1 of 2 pairs")
    ('better', 'cannot tell', 'no verdict')
    """
    return BADGES.get(verdict, verdict.partition(":")[0])


def verdict_on(
    arm: dict[str, Any], reference: str, metric: str, remark: str = "", is_fair: bool = True, is_control: bool = False
) -> Notice:
    """Say in a sentence how an arm differs from the reference and how sure that is, with the numbers below.

    Args:
        is_fair: Whether both had the same to spend. Else neither has won.
        is_control: The reference makes as many updates as the arm, and looks at nothing.
    """
    entry, score = arm[metric], score_of(metric)
    other = f"{quoted(reference)}, its control" if is_control else quoted(reference)
    found, name, words = entry["difference"], quoted(arm["name"]), entry["verdict"]
    kind: Kind = KINDS.get(words, "warning" if words.startswith("no verdict") else "neutral")
    kind, badge = kind if is_fair or kind == "warning" else "neutral", badge_of(words)
    if words == "no difference":
        equal = "every run equals" if score.in_logs else f"with every seed, {words_for(metric)} equals"
        return Notice(kind, f"{name}: {equal} that of {other}.", badge)
    seeds = f"{found['seeds']} seed{'s' * (found['seeds'] != 1)}"
    reasons = {
        "no evidence": f", but {seeds} cannot tell that from chance",
        "no verdict: one seed": ", but one seed cannot tell that from chance",
        "no verdict: the seeds do not differ": ", by the same with every seed: the seeds do not reach the runs",
        "no verdict: tuning is not finished": " so far: tuning is not finished",
    }
    if words.endswith("pairs"):
        pairs = words.removeprefix("no verdict: ")
        text = (
            f"{name}: only {pairs} with {other} can be compared. The other runs diverged, failed or are not finished."
        )
    elif found["seeds"]:
        text = f"With {name}, {words_for(metric)} is {in_words(found, score)} {other}{reasons.get(words, '')}."
    else:
        text = f"{name} cannot be compared with {other}{reasons.get(words, '')}."
    return Notice(kind, f"{text} {remark}".strip(), badge, detail_of(found, score, words))


def in_words(found: dict[str, Any], score: Score) -> str:
    """Write a difference in words, in percent where ratios count.

    >>> from abr_trainer.comparison.scores import PERPLEXITY
    >>> in_words({"mean": -0.5, "relative_to": 20.0}, PERPLEXITY)
    '2.5 % lower than with'
    """
    mean = found["mean"]
    if mean == 0:
        return "as high as with"
    size = percent(abs(mean), found).lstrip("+") if score.in_logs else number(abs(mean), 3)
    return f"{size} {'higher' if mean > 0 else 'lower'} than with"


def detail_of(found: dict[str, Any], score: Score, words: str) -> str:
    """Return the numbers behind a verdict."""
    if not found["seeds"]:
        return ""
    parts = [f"Difference {difference(found, score)}"]
    if "t_low" in found:
        parts.append(f"95 % interval {signed(found['t_low'])} to {signed(found['t_high'])}")
        parts.append(f"{score.direction} with {found['wins']} of {found['seeds']} seeds")
    text = ", ".join(parts) + "."
    if words == "no evidence":
        in_percent = f" ({percent(found['detectable'], found).lstrip('+')})" if score.in_logs else ""
        text += f" A true difference of {number(found['detectable'], 3)}{in_percent} would be found with 80 % power."
    return text


def summary_lines(data: dict[str, Any], out: Path) -> list[str]:
    """Return the verdicts and where the report lies, wrapped for the terminal."""
    arms, width = [arm for arm in data["arms"] if arm["seeds"]], terminal_width()
    before = [
        *([describe_protocol(data)] if what_varies(data) == "scheduler" and data["match"] != "passes" else []),
        *circumstances(data, arms),
        *(f"warning: {text}" for text in shortcomings(data)),
    ]
    return [
        "",
        *(line for text in before for line in textwrap.wrap(text, width, break_long_words=False)),
        *(line for notice in verdicts(data, arms) for line in notice.plain(width)),
        *(line for text in caution(data, arms) for line in textwrap.wrap(text, width)),
        *(f"{what:<11} {out / name}" for what, name in FILES.items() if (out / name).exists()),
    ]


def signed(value: float | None, places: int | None = None) -> str:
    if value is None:
        return DASH
    return f"{value:+.3g}" if places is None else fixed(value, places, "+")


def difference(found: dict[str, Any], score: Score, places: int | None = None) -> str:
    """Write the mean of paired differences: in units of the score, and in percent where ratios count."""
    in_percent = f" ({percent(found['mean'], found)})" if score.in_logs else ""
    return f"{signed(found['mean'], places)}{in_percent}"


def percent(value: float, found: dict[str, Any]) -> str:
    relative = 100 * value / found["relative_to"]
    digits = f"{relative:+.1f}" if abs(relative) >= 0.1 else f"{relative:+.2g}"
    return f"{digits} %"


def mean_and_deviation(entry: dict[str, Any], places: int) -> str:
    if entry["mean"] is None:
        return "not finite"
    spread = "" if entry["deviation"] is None else f" ± {fixed(entry['deviation'], places)}"
    lost = f" ({entry['not_finite']} not finite)" if entry["not_finite"] else ""
    return fixed(entry["mean"], places) + spread + lost
