"""The contract between a row rule and the trainer: which rows of a batch are trained on."""

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
        targets: Targets in the row, at least 1.
        batch: Index of the batch since training began, from 0.
        position: Of the row in its batch, from 0: rank by rank, micro-batch by micro-batch. Where documents are packed
            into rows, other ranks can have more than were expected; then `observe` gets other positions than `decide`.
        micro_batch: Number of its micro-batch among those of the batch, over all ranks.
    """

    loss: float
    targets: int
    batch: int
    position: int
    micro_batch: int = 0


class RowRule(ABC):
    """Decide which rows of a batch are trained on.

    `observe` is the only method that writes, all others only read. What a rule remembers goes through `state_dict`, as
    JSON, and is written into every checkpoint. All ranks hold the same state: each decides on its own rows, and
    `observe` gets those of all ranks.

    The trainer drops a row whose loss is not finite and never shows it to a rule. Nor does it show rows without
    targets. It skips a batch as a whole if more than half of its rows are dropped.
    """

    def __repr__(self) -> str:
        """Name the rule: a checkpoint tells by it whether its state fits. A dataclass adds its parameters."""
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
        """Return the numbers that `decide` weighs, by name. "limit" is the loss above which it drops such a row."""
        return {}

    def observe(self, rows: Sequence[Row], kept: Sequence[bool]) -> None:
        """Take note of the rows of a finished batch, over all ranks, by position. Called exactly once a batch.

        Args:
            rows: Those whose loss is finite and that have targets.
            kept: Whether each was to be trained on, as `decide` said.
        """
        return

    def state_dict(self) -> dict[str, Any]:
        """Return everything `observe` has changed, as JSON-serialisable values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        return
