"""Placeholder until the real rule arrives."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .rows import Row, RowRule


@dataclass
class RobustRows(RowRule):
    """Drop a row whose loss is above level + sigmas x spread of the recent row losses."""

    sigmas: float = 4.0
    window: int = 1000
    history: deque[float] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.history = deque(maxlen=self.window)

    def decide(self, row: Row) -> bool:
        return len(self.history) < 32 or row.loss <= self.evidence(row)["limit"]

    def evidence(self, row: Row) -> dict[str, float]:
        if not self.history:
            return {}
        level = statistics.median(self.history)
        spread = 1.4826 * statistics.median(abs(loss - level) for loss in self.history)
        return {"limit": level + self.sigmas * spread}

    def observe(self, rows: Sequence[Row], kept: Sequence[bool]) -> None:
        self.history.extend(row.loss for row in rows)

    def state_dict(self) -> dict[str, Any]:
        return {"history": list(self.history)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = deque(state.get("history", ()), maxlen=self.window)
