"""Skipping batches whose gradient stands out, where their loss did not."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from .base import Observation, Outcome, check_least
from .outliers import StandoutSkip
from .recent import median_and_spread
from .remarks import counted

MIN_HISTORY = 20
"""Norms to have seen before one may be called an outlier."""

MIN_SPREAD = 0.1
"""Least spread of the logarithm: norms that happen to agree must not make the next one an outlier."""


@dataclass
class GradNormSkip(StandoutSkip):
    """Skip a batch whose gradient norm lies far above the recent ones; otherwise ask `inner`.

    Norms are compared by their logarithms: median and scaled median absolute deviation of the last `window`, skipped
    batches among them, of which up to half may be broken. Decided after the backward, on the norm before clipping: a
    skip costs a whole pass. After `patience` skips in a row the gradients have changed rather than broken, and the
    history is dropped.

    It sees what a loss does not show (a few rows of garbage, labels that are wrong in one place). Where the loss
    shows it, `--skip_outliers` is cheaper. Not under DeepSpeed, which updates the weights inside the backward, nor
    under FSDP1. Of broken batches whose loss shows it (measured, see docs/measure/effectiveness.md) it catches
    72 %, fewer than `robust`, for the price of a whole pass each.

    Attributes:
        inner: The scheduler that decides about every batch that is not an outlier.
        sigmas: Distance from the median, in robust standard deviations of the logarithm.
        window: Number of recent norms.
        patience: Batches in a row that may be skipped.
    """

    reason: ClassVar[str] = "gradient"
    wants = frozenset({"grad_norm"})

    sigmas: float = 6.0
    window: int = 50
    patience: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sigmas > 0:
            raise ValueError(f"`skip_grad_norm` must be positive, got {self.sigmas}.")
        check_least(self, window=MIN_HISTORY, patience=1)
        self.history = deque(maxlen=self.window)

    def limit(self) -> float:
        """Return the norm above which a batch is skipped; infinite while too few were seen."""
        if len(self.history) < MIN_HISTORY:
            return math.inf
        level, spread = median_and_spread(self.history)
        return math.exp(level + self.sigmas * max(spread, MIN_SPREAD))

    def measured(self, observation: Observation) -> float | None:
        norm = observation.grad_norm
        return math.log(norm) if norm is not None and 0 < norm < math.inf else None

    def stands_out(self, value: float) -> bool:
        return math.exp(value) > self.limit()

    def remark(self, outcomes: Sequence[Outcome]) -> str | None:
        if len(outcomes) <= MIN_HISTORY:
            batches, norms = counted(len(outcomes), "batch", "batches"), f"{MIN_HISTORY} gradient norms"
            return f"--skip_grad_norm judged none of {batches}: it first has to see {norms}. Train on more batches."
        return super().remark(outcomes)

    def evidence(self, observation: Observation) -> dict[str, float]:
        numbers: dict[str, float] = {"norms remembered": len(self.history)}
        if observation.grad_norm is not None:
            numbers["gradient norm"] = observation.grad_norm
        if math.isfinite(self.limit()):
            numbers["skipped above"] = self.limit()
        return numbers | super().evidence(observation)
