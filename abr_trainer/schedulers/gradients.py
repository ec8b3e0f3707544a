"""Skipping batches whose gradient stands out, where their loss did not."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .base import Observation, Outcome, WrappedScheduler
from .recent import median_and_spread

MIN_HISTORY = 20
"""Norms to have seen before one may be called an outlier."""

MIN_SPREAD = 0.1
"""Least spread of the logarithm: norms that happen to agree must not make the next one an outlier."""


@dataclass
class GradNormSkip(WrappedScheduler):
    """Skip a batch whose gradient norm lies far above the recent ones; otherwise ask `inner`.

    Norms are compared by their logarithms: median and scaled median absolute deviation of the last `window`, skipped
    batches among them, of which up to half may be broken. Decided after the backward, on the norm before clipping: a
    skip costs a whole pass. After `patience` skips in a row the gradients have changed rather than broken, and the
    history is dropped.

    It sees what a loss does not show (a few rows of garbage, labels that are wrong in one place). Where the loss shows
    it, `--skip_outliers` is cheaper. Not under DeepSpeed, which updates the weights inside the backward, nor under
    FSDP1. Not measured on real data.

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
    history: deque[float] = field(init=False, repr=False)
    consecutive: int = field(init=False, repr=False, default=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sigmas > 0:
            raise ValueError(f"`skip_grad_norm` must be positive, got {self.sigmas}.")
        if self.window < MIN_HISTORY:
            raise ValueError(f"`window` must be at least {MIN_HISTORY}, got {self.window}.")
        if self.patience < 1:
            raise ValueError(f"`patience` must be at least 1, got {self.patience}.")
        self.history = deque(maxlen=self.window)

    def limit(self) -> float:
        """Return the norm above which a batch is skipped; infinite while too few were seen."""
        if len(self.history) < MIN_HISTORY:
            return math.inf
        level, spread = median_and_spread(self.history)
        return math.exp(level + self.sigmas * max(spread, MIN_SPREAD))

    def is_outlier(self, observation: Observation) -> bool:
        return observation.grad_norm is not None and observation.grad_norm > self.limit()

    def decide(self, observation: Observation) -> int:
        return 0 if self.is_outlier(observation) else super().decide(observation)

    def explain(self, observation: Observation) -> str:
        return self.reason if self.is_outlier(observation) else super().explain(observation)

    def evidence(self, observation: Observation) -> dict[str, float]:
        numbers: dict[str, float] = {"norms remembered": len(self.history)}
        if observation.grad_norm is not None:
            numbers["gradient norm"] = observation.grad_norm
        if math.isfinite(self.limit()):
            numbers["skipped above"] = self.limit()
        return numbers | super().evidence(observation)

    def observe(self, outcome: Outcome) -> None:
        norm = outcome.observation.grad_norm
        if norm is not None and 0 < norm < math.inf:
            left_out = outcome.skipped and self.is_outlier(outcome.observation)
            self.history.append(math.log(norm))
            self.consecutive = self.consecutive + 1 if left_out else 0
            if self.consecutive >= self.patience:
                self.history.clear()
                self.consecutive = 0
        super().observe(outcome)

    def state_dict(self) -> dict[str, Any]:
        return {"history": list(self.history), "consecutive": self.consecutive, **super().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = deque(state["history"], maxlen=self.window)
        self.consecutive = state["consecutive"]
        super().load_state_dict(state)
