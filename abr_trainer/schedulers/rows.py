"""The interface between a row rule and the trainer: `Row` and `RowRule`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """What a row rule may look at: one row of a batch, after the first pass over it.

    Attributes:
        loss: Mean loss per target of the row, in nats. Finite.
        targets: Number of targets in the row, at least 1.
        batch: Index of the batch since training began, from 0.
        position: Index of the row in its batch, from 0, ordered by rank and then by micro-batch. If documents are
            packed into rows, other ranks may have more rows than expected; then `observe` gets other positions than
            `decide`.
        micro_batch: Number of its micro-batch among those of the batch, over all ranks.
    """

    loss: float
    targets: int
    batch: int
    position: int
    micro_batch: int = 0


class RowRule(ABC):
    """Decide which rows of a batch to train on.

    Only `observe` changes the state; all other methods only read. Each checkpoint stores the state as JSON, through
    `state_dict`. All ranks have the same state: each decides on its own rows, and `observe` gets the rows of all
    ranks.

    The trainer drops rows whose loss is NaN or infinite. A rule sees neither these nor rows without targets. If more
    than half of its rows are dropped, the trainer skips the batch.
    """

    def __repr__(self) -> str:
        """Return the rule with its parameters. A checkpoint can only be resumed with the same text."""
        return f"{type(self).__qualname__}()"

    def beside(self, rows: Sequence[Row]) -> RowRule:
        """Return the rule that decides on these rows: all of one micro-batch that have targets and a finite loss.

        By default it is the rule itself. A rule that compares a row with those beside it returns a copy that knows
        them. This method only reads.
        """
        return self

    @abstractmethod
    def decide(self, row: Row) -> bool:
        """Tell whether to train on this row."""

    def evidence(self, row: Row) -> dict[str, float]:
        """Return the numbers that `decide` uses, by name. "limit" is the loss above which it drops such a row."""
        return {}

    def observe(self, rows: Sequence[Row], kept: Sequence[bool]) -> None:
        """Record the rows of a finished batch, over all ranks, by position. Called exactly once per batch.

        Args:
            rows: The rows with targets and a finite loss.
            kept: The result of `decide` for each row.
        """
        return

    def state_dict(self) -> dict[str, Any]:
        """Return everything `observe` has changed, as JSON-serialisable values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        return
