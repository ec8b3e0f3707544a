"""The published rule of Adaptive Batch Repetition: the higher the first-pass loss, the more updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Observation, RepeatScheduler


@dataclass
class ThresholdScheduler(RepeatScheduler):
    """Train on a batch once for every whole `loss_threshold` its loss contains: at least once, at most `max_repeats`
    times.

    Costs nothing but the passes it asks for. The threshold is absolute, in nats per target token: where all losses lie
    between 2 and 3, the default of 1.0 is two repeats for every batch.

    >>> scheduler = ThresholdScheduler(loss_threshold=1.5, max_repeats=4)
    >>> [scheduler.decide(Observation(batch=0, loss=loss, progress=0.0)) for loss in (0.9, 3.1, 90.0)]
    [1, 2, 4]
    """

    reason: ClassVar[str] = "threshold"

    loss_threshold: float = 1.0
    max_repeats: int = 5

    def __post_init__(self) -> None:
        if not self.loss_threshold > 0:
            raise ValueError(f"`loss_threshold` must be positive, got {self.loss_threshold}.")
        if self.max_repeats < 1:
            raise ValueError(f"`max_repeats` must be at least 1, got {self.max_repeats}.")

    def decide(self, observation: Observation) -> int:
        return max(1, int(min(observation.loss / self.loss_threshold, self.max_repeats)))

    def evidence(self, observation: Observation) -> dict[str, float]:
        return {
            "loss_threshold": self.loss_threshold,
            "loss / loss_threshold": observation.loss / self.loss_threshold,
            "max_repeats": self.max_repeats,
        }
