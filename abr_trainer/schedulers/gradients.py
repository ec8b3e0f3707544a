"""Skip batches whose gradient norm is an outlier."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from .base import Observation, Outcome, check_least
from .outliers import StandoutSkip
from .recent import median_and_spread
from .remarks import counted

MIN_HISTORY = 20
"""Number of norms that are needed before one can be an outlier."""

MIN_SPREAD = 0.1
"""Least spread of the logarithm, so that nearly equal norms do not make the next one an outlier."""


@dataclass
class GradNormSkip(StandoutSkip):
    """Skip a batch whose gradient norm is far above the recent ones; otherwise ask `inner`.

    The limit comes from the median and the scaled median absolute deviation of the logarithms of the last `window`
    norms, including those of skipped batches. Up to half of these batches may be broken. The decision uses the norm
    before clipping, after the backward pass, so a skip costs a full pass. After `patience` skips in a row we assume
    that the data have changed, and clear the history.

    It can find what the loss does not show, such as a few rows of garbage or a few wrong labels. If the loss shows it,
    `--skip_outliers` is cheaper: of such broken batches (measured, see docs/measure/effectiveness.md) this rule
    catches 72 %, fewer than `robust`. It does not work with FSDP1, nor with DeepSpeed, which updates the weights
    inside the backward pass.

    Attributes:
        inner: The scheduler for all batches that are not outliers.
        sigmas: Distance from the median, in robust standard deviations of the logarithm.
        window: Number of recent norms to remember.
        patience: Most batches to skip in a row.
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
        """Return the norm above which a batch is skipped; infinity while there are too few norms."""
        if len(self.history) < MIN_HISTORY:
            return math.inf
        level, spread = median_and_spread(self.history)
        logarithm = level + self.sigmas * max(spread, MIN_SPREAD)
        return math.exp(logarithm) if logarithm < math.log(sys.float_info.max) else math.inf

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
