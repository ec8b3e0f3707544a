"""The contract between a repeat scheduler and the trainer: one record in, one number out, one record back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Observation:
    """What a scheduler may look at: one batch, after the first pass over it.

    Attributes:
        batch: Index of the batch since training began, from 0.
        loss: Mean loss per target token of the first pass, in nats, averaged over ranks.
        progress: Share of the training run already spent, in [0, 1).
    """

    batch: int
    loss: float
    progress: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one batch.

    Attributes:
        observation: What the scheduler saw before it decided.
        repeats: Updates made on the batch; 0 is a skip.
        losses: `losses[i]` is the loss of pass i+1, in nats per target token, averaged over ranks. A skipped batch has
            one.
        reason: Why the batch got these repeats, in one word, for the trace.
    """

    observation: Observation
    repeats: int
    losses: tuple[float, ...]
    reason: str = ""

    @property
    def skipped(self) -> bool:
        return self.repeats == 0


class RepeatScheduler(ABC):
    """Decide how many updates each batch gets.

    `decide`, `explain` and `evidence` only read, `observe` is the only method that writes. What a scheduler remembers
    goes through `state_dict`, as JSON, and is written into every checkpoint. A rule that needs a coin derives it from
    `(seed, observation.batch)`, so that all ranks and a resumed run toss the same one.

    The trainer never asks about a batch whose first-pass loss is not finite: it skips it, and reports the outcome.
    `observe` must leave such a loss out of everything it remembers.
    """

    reason: ClassVar[str] = "scheduler"

    def __repr__(self) -> str:
        """Name the rule: a checkpoint tells by it whether its state fits. A dataclass adds its parameters."""
        return f"{type(self).__qualname__}()"

    @abstractmethod
    def decide(self, observation: Observation) -> int:
        """Return the repeats of this batch: 0 to skip it, 1 to train on it once, n for n updates."""

    def explain(self, observation: Observation) -> str:
        """Name the rule that `decide` would follow, in one word."""
        return self.reason

    def evidence(self, observation: Observation) -> dict[str, float]:
        """Return the numbers that `decide` weighs, by name: thresholds, and what it remembers."""
        return {}

    def observe(self, outcome: Outcome) -> None:
        """Take note of a finished batch, skipped or not. Called exactly once a batch."""
        return

    def state_dict(self) -> dict[str, Any]:
        """Return everything `observe` has changed, as JSON-serialisable values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        return


def is_finite(outcome: Outcome) -> bool:
    """Tell whether the first-pass loss may enter a history."""
    return math.isfinite(outcome.observation.loss)
