"""The same number of updates for every batch: the baseline, and the control for any rule that repeats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Observation, RepeatScheduler


@dataclass
class ConstantScheduler(RepeatScheduler):
    """Train on every batch `repeats` times; once is ordinary training.

    >>> ConstantScheduler(repeats=3).decide(Observation(batch=0, loss=2.0, progress=0.0))
    3
    """

    reason: ClassVar[str] = "constant"

    repeats: int = 1

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"`repeats` must be at least 1, got {self.repeats}.")

    def decide(self, observation: Observation) -> int:
        return self.repeats
