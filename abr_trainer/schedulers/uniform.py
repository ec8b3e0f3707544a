"""A random number of updates for every batch: a control that costs as much as a rule but ignores the loss."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from .base import Observation, Outcome, RepeatScheduler, check_least
from .remarks import forbidden


@dataclass
class UniformScheduler(RepeatScheduler):
    """Train on each batch 1 to `max_repeats` times, drawn at random: uniformly, or with a given mean.

    The draw depends only on `(seed, batch)`, so it is the same on all ranks and after a resume.

    Attributes:
        max_repeats: Most updates on a batch.
        seed: Seed of the draws.
        mean_repeats: Mean to draw with, from 1 to `max_repeats` (binomial). None draws uniformly.

    >>> scheduler = UniformScheduler(max_repeats=3, seed=0)
    >>> [scheduler.decide(Observation(batch=batch, loss=2.0, progress=0.0)) for batch in (0, 1, 2, 1, 0)]
    [2, 1, 3, 1, 2]
    """

    reason: ClassVar[str] = "random"

    max_repeats: int = 5
    seed: int = 0
    mean_repeats: float | None = None

    def __post_init__(self) -> None:
        check_least(self, max_repeats=1)
        if self.mean_repeats is not None and not 1 <= self.mean_repeats <= self.max_repeats:
            raise ValueError(
                f"`mean_repeats` must be between 1 and `max_repeats` ({self.max_repeats}), got {self.mean_repeats}."
            )

    def decide(self, observation: Observation) -> int:
        draw = random.Random(f"{self.seed}-{observation.batch}")
        if self.mean_repeats is None:
            return draw.randint(1, self.max_repeats)
        extra = self.max_repeats - 1
        return 1 + sum(draw.random() * extra < self.mean_repeats - 1 for _ in range(extra))

    def remark(self, outcomes: Sequence[Outcome]) -> str | None:
        return forbidden("random", self.max_repeats)
