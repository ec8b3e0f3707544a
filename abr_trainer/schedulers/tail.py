"""Stop repeating at the end of a run, so that the last updates use fresh data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from .base import Observation, Outcome, WrappedScheduler


@dataclass
class RepeatUntil(WrappedScheduler):
    """Use the repeats of `inner` until a share of the run is spent; from then on train on every batch once.

    Batches that `inner` skips are still skipped. Costs less than `inner` alone. At equal passes (measured, see
    docs/measure/effectiveness.md), perplexity with `abr` and q0.8 is 3.4 % higher than the baseline's on fresh data,
    instead of 3.7 %.

    Attributes:
        until: Share of the run, from 0 to 1.

    >>> from abr_trainer.schedulers import ConstantScheduler
    >>> scheduler = RepeatUntil(ConstantScheduler(repeats=3), until=0.85)
    >>> [scheduler.decide(Observation(batch=0, loss=2.0, progress=progress)) for progress in (0.84, 0.85)]
    [3, 1]
    """

    reason: ClassVar[str] = "tail"

    until: float = 0.85

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.until <= 1:
            raise ValueError(f"`repeat_until` must be between 0 and 1, got {self.until}.")

    def decide(self, observation: Observation) -> int:
        decided = super().decide(observation)
        return min(decided, 1) if observation.progress >= self.until else decided

    def replay(self, observation: Observation) -> Sequence[int]:
        return () if observation.progress >= self.until else super().replay(observation)

    def explain(self, observation: Observation) -> str:
        cuts = observation.progress >= self.until and super().decide(observation) > 1
        return self.reason if cuts else super().explain(observation)

    def remark(self, outcomes: Sequence[Outcome]) -> str | None:
        if self.until == 0:
            return "--repeat_until 0 leaves no part of the run in which a batch may be repeated. Raise it."
        return self.remark_of_inner(outcomes)

    def evidence(self, observation: Observation) -> dict[str, float]:
        return {"repeat_until": self.until, "progress": observation.progress, **super().evidence(observation)}
