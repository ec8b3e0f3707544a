"""What a comparison shows, in sentences: for its report and for the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..comparison.arms import quoted
from ..comparison.scores import Score, score_of, sentence_case, words_for
from .figure import Notice
from .text import DASH, number

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

KINDS: dict[str, Any] = {"better": "good", "worse": "bad"}


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
