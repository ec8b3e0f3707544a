"""Why a batch was repeated or skipped: the rule of a run, replayed over its trace."""

from __future__ import annotations

import contextlib
import itertools
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..records.files import (
    COMPARISON,
    PROVENANCE,
    SKIPPED_NAME,
    TRACE_NAME,
    Damaged,
    last_state,
    read_json,
    read_lines,
)
from ..records.shapes import BATCH, NUMBER, RUN, SKIPPED, Shape
from ..schedulers import (
    BatchTimes,
    GradNormSkip,
    Observation,
    Outcome,
    OutlierSkip,
    PolicyDrift,
    RepeatScheduler,
    RepeatUntil,
)
from ..schedulers.base import NO_ADVANTAGE, NO_TARGETS, TOO_FEW_ROWS
from ..schedulers.recorded import name_of_row_rule, name_of_rule, part_at, row_rule_of_run, rule_of_run
from .rows import explain_rows, has_row_rule, read_drops, read_judged_rows
from .text import amount

WITHOUT_THE_RULE = {
    "non-finite": "a loss is not a finite number: no update is made on it, whatever the rule",
    NO_TARGETS: "it has no label other than -100 to train on: no update is made on it, whatever the rule",
    TOO_FEW_ROWS: "more than half of its rows were dropped, so it was skipped as a whole, whatever the rule",
    "primer": "the first --primer_batches batches are trained on once each, whatever the rule",
}

BECAUSE = {
    "outlier": "its loss, {loss:.4g}, is above the limit for outliers, {outlier above:.4g}",
    "gradient": "its gradient norm, {gradient norm:.4g}, is above the limit, {skipped above:.4g}",
    "threshold": "its loss, {loss:.4g}, is {loss / loss_threshold:.3g} times the threshold of {loss_threshold:g}, and "
    "the whole part of that, between 1 and {max_repeats}, is the number of updates",
    "easy": "its loss, {loss:.4g}, is above {share of them below:.0%} of the last losses, and the rule skips what is "
    "not above {quantile:.0%}",
    "tail": "{progress:.0%} of the run is spent, and the rule repeats nothing after {repeat_until:.0%}",
    "saturated": "the accuracy on it, {accuracy:.3g}, is above {saturation:.3g}: a second pass would teach little",
    "probe": "the rule tries a second pass, to measure what one gains",
    "constant": "the rule trains on every batch equally often",
    "once": "the rule trains on every new batch once",
    "random": "the rule draws the number of updates at random",
    "learned": "the rule has learnt that this number of updates pays most at such a loss",
    "explored": "the rule tried a number of updates at random, to learn from it",
    "warmup": "the rule has not learnt enough yet, and follows a simple rule until then",
    "budget": "the budget left room for no more",
    "window": "the rule goes by the trend of the last losses and by where this one lies among them",
    "kl": "the rule allows up to {max_repeats} updates, while the divergence is not above {kl_limit:g}",
    NO_ADVANTAGE: "all rewards of each group are equal: nothing can be learned from it",
    "cheap": "generating takes {share of generating:.0%} of the time, and the rule repeats from {least_share:.0%} on",
    "off policy": "its last update had moved the model too far from the one that generated it",
    "waiting": "after one pass, training would wait {wait after one pass:.3g} s for the next batch, and a pass takes "
    "{a pass takes:.3g} s",
    "ready": "after one pass, training would wait {wait after one pass:.3g} s for the next batch, less than the "
    "{a pass takes:.3g} s of a pass",
    "unmeasured": "the rule has not measured enough waits yet, and trains on each batch once until then",
    "followed": "the run follows the trace of another one, which says so",
    "gain": "the rule compares what a second pass gains with what a fresh batch gains",
}
"""Why, by the reason that the trace gives; in braces what the rule weighed. Numbers say the rest."""

RANKED = "its loss, {loss:.4g}, is above {share of them below:.0%} of the last {losses remembered} losses"

RULES_AROUND: tuple[tuple[Any, str], ...] = (
    (OutlierSkip, "outlier rule"),
    (GradNormSkip, "gradient rule"),
    (RepeatUntil, "end of repeats"),
)
"""What rules around others are called."""

LABEL = 25
"""Columns before a value."""

EXPLAINED: Shape = BATCH | {"progress": NUMBER, "learning_rate": NUMBER}
"""A line of a trace from which a batch is explained."""


def read_trace(directory: Path, shape: Shape = BATCH) -> list[dict[str, Any]]:
    """Return the batches of a run.

    Args:
        shape: What a line of the trace must look like.

    Raises:
        ValueError: The directory holds no run, or its trace is damaged.
    """
    path = directory / TRACE_NAME
    if not path.is_file():
        hint = " It holds a comparison: abr report makes its report." if (directory / COMPARISON).exists() else ""
        raise ValueError(f"{directory} holds no run: there is no {TRACE_NAME} in it.{hint}")
    first = next(read_lines(path), None)
    if first is not None and {"step", "loss"} <= first.keys() and "passes" not in first:
        raise ValueError(f"{path} was written by an earlier version, which did not say what a batch had cost.")
    trace = list(read_lines(path, shape))
    for before, batch in itertools.pairwise(trace):
        if batch["step"] <= before["step"]:
            raise Damaged(f"{path} is damaged: batch {batch['step']} comes after batch {before['step']}.")
    return trace


def read_provenance(directory: Path) -> dict[str, Any] | None:
    """Return what `run.json` says of a run; None if an earlier version was used from Python."""
    provenance: dict[str, Any] | None = read_json(directory / PROVENANCE, RUN)
    return provenance


def explain_batch(directory: Path, step: int) -> list[str]:
    """Return lines that say what became of a batch and why, and what the rule saw: losses, history, thresholds.

    The rule is built from `run.json`, and shown every batch before this one.

    Raises:
        ValueError: There is no such batch.
    """
    trace = read_trace(directory, EXPLAINED)
    batch = next((batch for batch in trace if batch["step"] == step), None)
    if batch is None:
        held = f"batches 1 to {trace[-1]['step']}" if trace else "no batch yet"
        raise ValueError(f"Batch {step}: {directory} holds {held}.")
    spent = next((before["passes"] for before in reversed(trace) if before["step"] < step), 0.0)
    lines = describe_losses(batch)
    lines.append(f"{'spent before':<24} {amount(spent)} passes, {100 * batch['progress']:.1f} % of the run")
    lines.append(f"{'learning rate':<24} {batch['learning_rate']:.4g}")
    lines.append(f"{'decided by':<24} {batch['reason']}")
    provenance = read_provenance(directory)
    evidence: dict[str, float] = {}
    part: Mapping[str, Any]
    if batch["reason"] not in WITHOUT_THE_RULE and provenance is None:
        lines.append(f"{'':<24} {PROVENANCE} is missing: the parameters of the rule are unknown")
    elif batch["reason"] not in WITHOUT_THE_RULE and provenance is not None:
        try:
            part, begun = part_at(provenance, step, name_of_rule)
            rule = rule_of_run(part)
        except ValueError as error:
            lines.append(f"{'the rule':<24} {error}")
        else:
            lines += explain_rule(rule, [each for each in trace if each["step"] > begun], batch)
            evidence = dict(rule.evidence(outcome_of(batch).observation))
    lines = [sentence_on(batch, evidence), "", *lines]
    if again := batch.get("replayed"):
        named = ", ".join(f"{earlier['step']} (loss {earlier['loss']:.4f})" for earlier in again if earlier["loss"])
        lines.append(f"{'trained on after it':<24} batch {named}, once more")
    if "rows" in batch and has_row_rule(directory):
        part, begun = ({}, 0) if provenance is None else part_at(provenance, step, name_of_row_rule)
        row_rule = None
        with contextlib.suppress(ValueError):  # it cannot be made again: what it dropped is known all the same
            row_rule = row_rule_of_run(part) if part else None
        judged = {before: rows for before, rows in read_judged_rows(directory).items() if before > begun}
        lines += explain_rows(row_rule, batch, read_drops(directory), judged)
    texts = read_skipped(directory).get(step, [])
    return [*lines, *(f"{'text' if i == 0 else '':<24} {text}" for i, text in enumerate(texts))]


def sentence_on(batch: dict[str, Any], evidence: dict[str, float]) -> str:
    """Say in plain words what became of a batch and why.

    >>> batch = {"step": 7, "repeats": 0, "reason": "outlier", "loss": 9.5}
    >>> sentence_on(batch, {"outlier above": 3.1})
    'Batch 7 was skipped: its loss, 9.5, is above the limit for outliers, 3.1.'
    """
    said = f"Batch {batch['step']} {describe_repeats(batch)}"
    because = WITHOUT_THE_RULE.get(batch["reason"], "")
    weighed = {**evidence, "loss": math.nan if batch["loss"] is None else batch["loss"]}
    for template in (BECAUSE.get(batch["reason"], RANKED), RANKED):
        with contextlib.suppress(KeyError, ValueError):  # the rule does not weigh that, or not yet
            because = because or template.format_map(weighed)
    said = f"{said}: {because}." if because else f"{said} (reason: {batch['reason']})."
    if dropped := batch.get("rows_dropped"):
        said += f" {dropped:,} of its {batch['rows']:,} rows {'was' if dropped == 1 else 'were'} dropped."
    return said


def wrapped(lines: Iterable[str], width: int) -> list[str]:
    """Break long lines at that width; a value goes on below its beginning.

    >>> wrapped(["text                     one two three four"], 35)
    ['text                     one two', '                         three four']
    """
    broken = []
    for line in lines:
        if len(line) <= width:
            broken.append(line)
            continue
        has_label = "  " in line[:LABEL]  # blanks up to the column of values; a sentence has none
        broken += textwrap.wrap(line, width, subsequent_indent=" " * LABEL if has_label else "")
    return broken


def describe_repeats(batch: dict[str, Any]) -> str:
    if batch["repeats"] == 0:
        return "was skipped"
    return "was trained on once" if batch["repeats"] == 1 else f"was trained on {batch['repeats']} times"


def without_loss(batch: dict[str, Any]) -> str:
    """Return what to say instead of the first-pass loss of a batch that has none in the trace."""
    return "none" if batch["reason"] == NO_TARGETS else "not finite"


def describe_losses(batch: dict[str, Any]) -> list[str]:
    if batch["loss"] is None:
        return [f"{'first-pass loss':<24} {without_loss(batch)}"]
    lines = [f"{'first-pass loss':<24} {batch['loss']:.4f} nats per target"]
    if len(batch["losses"]) > 1:
        losses = ", ".join("not finite" if loss is None else f"{loss:.4f}" for loss in batch["losses"])
        lines.append(f"{'losses of all passes':<24} {losses}")
    return lines


def explain_rule(rule: RepeatScheduler, trace: list[dict[str, Any]], batch: dict[str, Any]) -> list[str]:
    """Show the rule all batches before this one, and return what it thinks of this one."""
    for before in trace:
        if before["step"] < batch["step"]:
            rule.observe(outcome_of(before))
    observation = outcome_of(batch).observation
    lines = [f"{'the rule':<24} {rule!r}"]
    lines += _numbers_of_rules(rule, observation)
    decided = rule.decide(observation)
    if decided != batch["repeats"]:
        why = "the budget left no more" if batch["reason"] == "budget" else "the code of the rule has changed since"
        if 2 <= batch["repeats"] < decided and batch["reason"] == rule.explain(observation):
            why = "it was not to go on after the last pass, or its code has changed since"
        lines.append(f"{'it asks for':<24} {decided}, and {batch['repeats']} were made: {why}")
    return lines


def _numbers_of_rules(rule: RepeatScheduler, observation: Observation) -> list[str]:
    """Return what each rule goes by, under its name; of a rule that does not tell, its parameters."""
    lines = []
    while True:
        inner = getattr(rule, "inner", None)
        numbers = dict(rule.evidence(observation))
        of_inner = {} if inner is None else inner.evidence(observation)
        own = [f"  {name:<22} {value:.6g}" for name, value in numbers.items() if name not in of_inner]
        if not numbers and inner is None:
            simple = {name: value for name, value in vars(rule).items() if isinstance(value, bool | int | float | str)}
            own = [f"  {name:<22} {value}" for name, value in simple.items() if not name.startswith("_")]
        if own:
            label = next((name for kind, name in RULES_AROUND if isinstance(rule, kind)), "repeat rule")
            lines += [f"{label:<24} {type(rule).__name__}", *own]
        if inner is None:
            return lines
        rule = inner


def outcome_of(batch: dict[str, Any]) -> Outcome:
    """Return what the scheduler was told of this batch of a trace."""
    losses = tuple(math.nan if loss is None else loss for loss in batch["losses"])
    observation = Observation(
        batch["step"] - 1,
        losses[0],
        batch["progress"],
        batch.get("accuracy"),
        batch.get("grad_norm"),
        _times_of(batch),
        batch.get("advantage"),
    )
    replayed = tuple(
        (earlier["step"] - 1, math.nan if earlier["loss"] is None else earlier["loss"])
        for earlier in batch.get("replayed", ())
    )
    drifts = tuple(
        PolicyDrift(**{name: math.nan if value is None else value for name, value in drift.items()})
        for drift in batch.get("policy", ())
    )
    return Outcome(observation, batch["repeats"], losses, batch["reason"], replayed, drifts=drifts)


def _times_of(batch: dict[str, Any]) -> BatchTimes | None:
    """Return how long a batch took, if its rule was told that."""
    if "pass_seconds" not in batch:
        return None
    return BatchTimes(
        batch["waiting_seconds"],
        batch.get("generating_seconds", 0.0),
        batch["working_seconds"],
        batch["pass_seconds"],
    )


def read_skipped(directory: Path) -> dict[int, list[str]]:
    """Return the beginning of each row of the skipped batches, decoded, by step."""
    path = directory / SKIPPED_NAME
    skipped = {line["step"]: line["input_ids"] for line in read_lines(path, SKIPPED)} if path.is_file() else {}
    if not skipped:
        return {}
    decode = find_decoder(directory)
    if decode is None:
        return {step: [f"tokens {' '.join(map(str, row))}" for row in rows] for step, rows in skipped.items()}
    return {step: [repr(decode(row))[1:-1] for row in rows] for step, rows in skipped.items()}


def find_decoder(directory: Path) -> Callable[[list[int]], Any] | None:
    """Return what makes text of tokens, special ones included; None if there is no tokenizer any more.

    It is the tokenizer that a run has left, or that it began with. transformers is imported only if none of them has
    a `tokenizer.json`.
    """
    arguments = (read_provenance(directory) or {}).get("arguments", {})
    places = [str(directory), last_state(directory)]
    places += [arguments.get("tokenizer_name"), arguments.get("model_name_or_path")]
    known = [str(place) for place in places if place]
    for place in known:
        if (file := Path(place, "tokenizer.json")).is_file():
            return partial(Tokenizer.from_file(str(file)).decode, skip_special_tokens=False)
    from transformers import AutoTokenizer

    for place in known:
        with contextlib.suppress(OSError, ValueError):
            return AutoTokenizer.from_pretrained(place).decode
    return None
