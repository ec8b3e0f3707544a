"""Which rows a run dropped, and why: its records, and its row rule replayed over them."""

from __future__ import annotations

import math
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..records.files import DROPPED_NAME, RANKED_NAME, ROW_LOSSES_NAME, ROW_TRACE_NAME, read_lines
from ..records.shapes import COUNT, DROP, LOSS, RANKED, STEP, Kind, Shape, misfit
from ..schedulers.robust_rows import RobustRows
from ..schedulers.rows import Row, RowRule
from .text import number, printable

ROW_TRACE: Shape = {
    "step": STEP,
    "rows": [Kind("a loss, a number of targets, an index and a micro-batch", lambda row: is_judged(row))],
}
"""A line of the judged rows; earlier versions wrote neither index nor micro-batch."""

UNKNOWN_PLACE = "a row of unknown place"

CUT_TO_BLOCKS = "The run joined the rows of the file, cut them into blocks of tokens, and judged these blocks."

JUDGED_ALONE = "abr sft on the same file judges each row of the file by itself."


@dataclass(frozen=True)
class RunRow:
    """A row of the training set, and what a run has found out about it.

    Attributes:
        index: In the training set, before shuffling, from 0.
        source: The file or data set that it is of.
        first_row, last_row: Rows of the source, from 1. A block of tokens can be of several. The last may be unknown.
        is_block: It is a block of tokens, which may hold only a part of these rows.
        loss: In nats a target: of the worst of its drops, or the last one. None if it is not finite.
        limit: The loss above which the rule dropped it then.
        targets: Targets in the row.
        reason: "outlier" or "non-finite"; None if it was never dropped.
        steps: The batches in which it was dropped.
        visits: How often the run passed over it.
        text: The beginning of the row, decoded, or its first tokens.
        tokens: How many tokens of the row were stored; 0 if none were.
    """

    index: int | None = None
    source: str | None = None
    first_row: int | None = None
    last_row: int | None = None
    is_block: bool = False
    loss: float | None = None
    limit: float | None = None
    targets: int | None = None
    reason: str | None = None
    steps: tuple[int, ...] = ()
    visits: int | None = None
    text: str = ""
    tokens: int = 0

    @property
    def place(self) -> str:
        """Where the row comes from: its file and row, as far as the run knew it."""
        if self.source is not None and self.first_row is not None:
            rows = (
                f"rows {self.first_row:,} to {self.last_row:,}" if self.last_row else f"from row {self.first_row:,} on"
            )
            rows = f"row {self.first_row:,}" if self.is_one_row else rows
            return f"{printable(self.source)}, {rows}"
        if self.index is not None:
            of = f" ({printable(self.source)})" if self.source else ""
            return f"index {self.index:,} of the training set, counted from 0{of}"
        return UNKNOWN_PLACE if self.source is None else f"a row of {printable(self.source)}"

    @property
    def is_one_row(self) -> bool:
        return self.first_row is not None and self.first_row == self.last_row

    @property
    def numbers(self) -> str:
        """Its loss, limit and targets, in words."""
        parts = ["loss not finite" if self.loss is None else f"loss {number(self.loss)}"]
        parts += [f"limit {number(self.limit)}"] if self.limit is not None else []
        parts += [f"{self.targets:,} target{'s' * (self.targets != 1)}"] if self.targets is not None else []
        return ", ".join(parts)

    @property
    def left_out(self) -> str:
        """What to say if the run stored only the beginning of the row; empty if it stored all, or may have."""
        if self.targets is None or not 0 < self.tokens <= self.targets:  # the first token is no target
            return ""
        return f"The run stored the first {self.tokens:,} of more than {self.targets:,} tokens."

    @property
    def fate(self) -> str:
        """How often it was dropped, and in which batches."""
        if not self.steps:
            return "never dropped" if self.visits is None else f"never dropped in {_visits(self.visits)}"
        times = "once" if len(self.steps) == 1 else f"{len(self.steps):,} times"
        often = f"in {len(self.steps):,} of {_visits(self.visits)}" if self.visits else times
        named = ", ".join(map(str, self.steps[:5])) + (", ..." if len(self.steps) > 5 else "")
        return f"dropped {often} (batch{'es' * (len(self.steps) > 1)} {named})"


def _visits(count: int) -> str:
    return f"{count:,} visit{'s' * (count != 1)}"


# ---- Records ----


def is_judged(row: Any) -> bool:
    """Tell whether this is what a run writes of a row that it has judged."""
    shapes = (LOSS, COUNT, (COUNT, None), COUNT)
    return (
        isinstance(row, list)
        and 2 <= len(row) <= len(shapes)
        and not any(misfit(value, shape) for value, shape in zip(row, shapes, strict=False))
    )


def has_row_rule(directory: Path) -> bool:
    """Return whether a run had a row rule: then it has a file for dropped rows, if an empty one."""
    return (directory / DROPPED_NAME).is_file()


def read_drops(directory: Path) -> list[dict[str, Any]]:
    """Return what a run has written of each row that it dropped, each time that it did."""
    return list(read_lines(directory / DROPPED_NAME, DROP)) if has_row_rule(directory) else []


def read_row_losses(directory: Path) -> dict[str, Any] | None:
    """Return the last `loss` of each row, `visits` and `step`, by index; None for a run without `--rank_rows`.

    Raises:
        ValueError: The file is damaged.
    """
    path = directory / ROW_LOSSES_NAME
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in ("loss", "visits", "step")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged: it does not hold the losses of rows.") from error


def broken_rows(directory: Path) -> list[RunRow]:
    """Return the rows that a run has dropped, each once, worst first.

    A row whose loss is not finite is worse than all others; else that is worse which lies further above its limit.
    """
    drops: dict[Any, list[dict[str, Any]]] = {}
    for drop in read_drops(directory):
        drops.setdefault(_identity(drop), []).append(drop)
    visits = _visits_of_rows(directory, {index for index, *_ in drops if index is not None})
    found = [row_of(of_one, visits) for of_one in drops.values()]
    return sorted(found, key=lambda row: _badness(row.loss, row.limit), reverse=True)


def _identity(drop: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what tells a row from others: its index, and what it holds. Documents of a packed row have one index."""
    return drop.get("index"), drop.get("text"), *drop.get("input_ids", ())


def _visits_of_rows(directory: Path, indices: set[int]) -> Mapping[int, int]:
    """Return in how many batches a run passed over rows, as far as its records say."""
    losses = read_row_losses(directory) if indices else None
    if losses is not None:
        return {index: int(losses["visits"][index]) for index in indices if index < len(losses["visits"])}
    found: Counter[int] = Counter()
    path = directory / ROW_TRACE_NAME
    for line in read_lines(path, ROW_TRACE) if indices and path.is_file() else ():
        found.update({index for _, targets, *known in line["rows"] for index in known if targets} & indices)
    return found


def row_of(drops: Sequence[Mapping[str, Any]], visits: Mapping[int, int] | None = None) -> RunRow:
    """Return what is known of a row by what was written of it each time that it was dropped.

    Args:
        visits: Of rows of the training set, by index.
    """
    worst = max(drops, key=lambda drop: _badness(drop["loss"], drop.get("limit")))
    index = worst.get("index")
    named = ("index", "source", "first_row", "last_row", "loss", "limit", "targets", "reason")
    return RunRow(
        **{name: worst.get(name) for name in named},
        is_block=worst.get("is_block", False),
        steps=tuple(drop["step"] for drop in drops),
        visits=None if visits is None or index is None else visits.get(index),
        text=text_of(worst),
        tokens=len(worst.get("input_ids") or ()),
    )


def text_of(drop: Mapping[str, Any]) -> str:
    """Return the text of a dropped row as it was, or its tokens if there was no tokenizer."""
    text: str | None = drop.get("text")
    tokens = drop.get("input_ids")
    return text if text is not None else f"tokens {' '.join(map(str, tokens))}" if tokens else ""


def _badness(loss: float | None, limit: float | None) -> tuple[int, float]:
    if loss is None:
        return 2, 0.0
    return (0, loss) if limit is None else (1, loss - limit)


def read_described(directory: Path) -> list[RunRow]:
    """Return the rows of which a run with `--rank_rows` says what they say and where they come from."""
    path = directory / RANKED_NAME
    return [
        RunRow(
            line["index"],
            line.get("source"),
            line.get("first_row"),
            line.get("last_row"),
            is_block=line.get("is_block", False),
            text=text_of(line),
        )
        for line in (read_lines(path, RANKED) if path.is_file() else ())
    ]


def ranked_rows(
    losses: Mapping[str, Any], described: Iterable[RunRow], most: int | None = None, lowest_first: bool = False
) -> list[RunRow]:
    """Return rows that a run has seen, by their last loss.

    Args:
        losses: What `read_row_losses` returns.
        described: Rows of which more is known than their loss: what they say, and where they come from.
        most: How many to return. Default: all.
        lowest_first: The highest come first otherwise.
    """
    known = {row.index: row for row in described}
    level = np.where(np.isfinite(losses["loss"]), losses["loss"], np.inf)
    level[losses["visits"] == 0] = -np.inf
    order = np.argsort(-level, kind="stable")[: np.count_nonzero(losses["visits"])]
    order = (order[::-1] if lowest_first else order)[:most]
    return [_ranked(index, losses, known.get(index, RunRow())) for index in order.tolist()]


def _ranked(index: int, losses: Mapping[str, Any], dropped: RunRow) -> RunRow:
    loss = float(losses["loss"][index])
    visits = int(losses["visits"][index])
    return replace(dropped, index=index, loss=loss if math.isfinite(loss) else None, limit=None, visits=visits)


def rows_judged(trace: Iterable[Mapping[str, Any]]) -> int:
    """Return how many rows a rule has judged, a row each time that it was passed over."""
    return sum(batch.get("rows", 0) for batch in trace)


# ---- Why ----


def explain_rows(
    rule: RowRule | None,
    batch: Mapping[str, Any],
    drops: Sequence[Mapping[str, Any]],
    batches: Mapping[int, list[Row]],
) -> list[str]:
    """Show a row rule all batches before this one, and return what it thinks of the rows that were dropped from it.

    Args:
        rule: None if it cannot be built any more.
        batch: Its line in the trace.
        drops: All that were dropped in this run.
        batches: What `read_judged_rows` returns.
    """
    step = batch["step"]
    own = {drop["position"]: drop for drop in drops if drop["step"] == step}
    lines = [f"{'rows':<24} {batch['rows']:,} judged, {batch['rows_dropped']:,} dropped"]
    if not own:
        return lines
    dropped = {(drop["step"], drop["position"]) for drop in drops}
    if rule is not None:
        for before, rows in batches.items():
            if before < step:
                rule.observe(rows, [(before, row.position) not in dropped for row in rows])
        lines.append(f"{'row rule':<24} {rule!r}")
    judged = {row.position: row for row in batches.get(step, ())}
    parts: dict[int, list[Row]] = {}
    for row in judged.values():
        parts.setdefault(row.micro_batch, []).append(row)
    judges = {part: None if rule is None else rule.beside(rows) for part, rows in parts.items()}
    for position, drop in sorted(own.items()):
        seen = judged.get(position)
        judge = None if seen is None else judges[seen.micro_batch]
        lines += _explain_drop(judge, row_of([drop]), position, seen)
    return lines


def read_judged_rows(directory: Path) -> dict[int, list[Row]]:
    """Return the rows that a rule was shown, by batch: those with a finite loss and targets."""
    path = directory / ROW_TRACE_NAME
    return {
        line["step"]: [
            Row(loss, targets, line["step"] - 1, position, *index_and_micro_batch[1:])
            for position, (loss, targets, *index_and_micro_batch) in enumerate(line["rows"])
            if loss is not None and targets
        ]
        for line in (read_lines(path, ROW_TRACE) if path.is_file() else ())
    }


def _meaning(rule: RowRule, name: str, value: float) -> str:
    """Return what a number of ours means that its name does not say."""
    if name != "caution" or not isinstance(rule, RobustRows):
        return ""
    if value == 1:
        return ": some rows stand out, so the limit is not moved"
    return f": hardly a row stands out, so the limit is {value:g} times as far from the level"


def _explain_drop(rule: RowRule | None, dropped: RunRow, position: int, judged: Row | None) -> list[str]:
    lines = [f"{f'dropped: row {position + 1}':<24} {dropped.numbers}"]
    lines.append(f"{'  it is':<24} {dropped.place}")
    if dropped.reason == "non-finite" or dropped.loss is None:
        lines.append(f"{'  why':<24} its loss is not a finite number: it is dropped, whatever the rule")
    elif rule is not None and judged is not None:
        numbers = rule.evidence(judged)
        lines += [f"  {name:<22} {value:.6g}{_meaning(rule, name, value)}" for name, value in numbers.items()]
        if rule.decide(judged):
            lines.append(f"{'  it asks for':<24} training on the row: the code of the rule has changed since")
    return [*lines, f"{'  text':<24} {printable(dropped.text)}"]
