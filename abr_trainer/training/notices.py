"""What a run says of dropped rows and skipped batches: a line for each of the first, then one for each hundred."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..records.commands import command, pasted
from ..report.rows import row_of
from ..report.text import both_ends, number
from ..schedulers import Outcome
from ..schedulers.base import NO_ADVANTAGE, NO_TARGETS, TOO_FEW_ROWS
from .deciding import NO_ROOM
from .dropped_rows import DroppedRow, decoded

logger = logging.get_logger(__name__)

FIRST = 5
"""Rows, and batches, that get a line each."""

EVERY = 100
"""After these there is one line for each so many."""

WIDTH = 100
"""Characters of a line, where that leaves enough of a text."""

EXCERPT = range(18, 60)
"""Characters of a text: at least, and below."""


@dataclass
class Notices:
    """Which lines to say. Rows and batches are counted apart, so that many of one do not hide the first of the other.

    Attributes:
        rows: Rows dropped so far.
        batches: Batches skipped so far.
    """

    rows: int = 0
    batches: int = 0

    def note_rows(self, directory: Path | None, step: int, dropped: Iterable[Mapping[str, Any]]) -> list[str]:
        """Count the rows that were dropped from a batch, and return what to say of them.

        Args:
            directory: Where the records of the run are; None if it leaves only a trace.
            dropped: What `_dropped_rows.jsonl` says of them.
        """
        lines = []
        for drop in dropped:
            self.rows += 1
            if self.rows <= FIRST:
                row = row_of([drop])
                lines.append(_with_excerpt(f"Dropped in batch {step}: {row.place}; {row.numbers}", row.text))
                lines += _how_to_see_why(self.rows, directory, step)
            lines += self._summary(self.rows, f"rows dropped so far, the last from batch {step}", "rows", directory)
        return lines

    def note_batch(
        self,
        directory: Path | None,
        step: int,
        reason: str,
        loss: float,
        limit: float | None = None,
        text: str | None = None,
    ) -> list[str]:
        """Count a skipped batch, and return what to say of it.

        Args:
            reason: Why, as in the trace.
            limit: The loss above which the rule skips, if it has one.
            text: The beginning of its rows.
        """
        self.batches += 1
        lines = []
        if self.batches <= FIRST:
            lines.append(_with_excerpt(f"Batch {step} is skipped: {_why_skipped(reason, loss, limit)}", text or ""))
            lines += _how_to_see_why(self.batches, directory, step)
        return lines + self._summary(self.batches, f"batches skipped so far, the last is {step}", "report", directory)

    @staticmethod
    def _summary(count: int, what: str, verb: str, directory: Path | None) -> list[str]:
        if count == FIRST + 1:
            return [f"From here on, one line for each {EVERY} {what.partition(' so far')[0]}."]
        return [f"{count:,} {what}.{_command(verb, directory)}"] if count % EVERY == 0 else []

    def state_dict(self) -> dict[str, int]:
        """Return the counts, for a checkpoint: a resumed run goes on counting."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.rows, self.batches = state.get("rows", 0), state.get("batches", 0)


def _why_skipped(reason: str, loss: float, limit: float | None) -> str:
    if reason == NO_TARGETS:
        return "it has no targets (labels other than -100)"
    if reason == TOO_FEW_ROWS:
        return "more than half of its rows are dropped"
    if reason == NO_ADVANTAGE:
        return "all rewards of each group are equal, and nothing can be learned from it"
    if reason == NO_ROOM:
        return "the budget has no room for the pass without its broken rows"
    if not math.isfinite(loss):
        return f"its loss is {loss}"
    return f"loss {number(loss)}" + (f", limit {number(limit)}" if limit is not None else "") + f" ({reason})"


def _with_excerpt(said: str, text: str) -> str:
    """Return a sentence, and as much of both ends of a text as the line has room for."""
    if not text.strip():
        return f"{said}."
    room = min(max(WIDTH - len(said) - len('; "".'), EXCERPT.start), EXCERPT.stop)
    return f'{said}; "{both_ends(text, room)}".'


def _how_to_see_why(count: int, directory: Path | None, step: int) -> list[str]:
    """Return the command that explains it, once: it is the same for all, but for the number of the batch."""
    return [f"Why:{_command('why', directory, str(step))}"] if count == 1 and directory is not None else []


def _command(verb: str, directory: Path | None, *more: str) -> str:
    return "" if directory is None else " " + pasted(command(verb, [str(directory), *more]))


def say_what_is_left_out(
    trainer: Any, outcome: Outcome, dropped: Sequence[DroppedRow], excerpts: Sequence[list[int]]
) -> None:
    """Warn of a batch that was skipped and of rows that were dropped, before the rule takes note of it.

    Args:
        excerpts: The first tokens of the rows of a skipped batch.
    """
    if not (outcome.skipped or dropped) or not trainer.is_world_process_zero():
        return
    output_dir = Path(trainer.args.output_dir)
    is_trial = trainer._trace.directory not in (None, output_dir)  # of which only the trace is written
    notices, directory = trainer._run.notices, None if is_trial else output_dir
    seen = outcome.observation
    step = seen.batch + 1
    lines = notices.note_rows(directory, step, [{"step": step, **row.as_line()} for row in dropped])
    if outcome.skipped:
        limit = trainer.repeat_scheduler.evidence(seen).get("outlier above") if math.isfinite(seen.loss) else None
        text = decoded(trainer, excerpts[0]) if excerpts else None
        lines += notices.note_batch(directory, step, outcome.reason, seen.loss, limit, text)
    for line in lines:
        logger.warning(line)
