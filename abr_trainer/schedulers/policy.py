"""Repeat a generated batch while the policy is still close to the one that generated it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .base import NO_ADVANTAGE, Observation, Outcome, PolicyDrift, RepeatScheduler, check_least
from .remarks import NEARLY_ALL, counted, forbidden, parameters

EXPLODED = 10
"""A pass makes no update if its divergence is above so many limits."""

TRIES = 10
"""If second passes usually make no update, one of so many batches gets one all the same."""


@dataclass
class KLScheduler(RepeatScheduler):
    """Repeat a generated batch as long as the policy has moved less than `kl_limit` from the one that generated it.

    The divergence is measured on the batch at each pass, before its update: the mean over the generated tokens of
    ratio - 1 - log(ratio). A pass whose divergence is above ten limits makes no update, and ends the repeats.

    A batch without an advantage, because all rewards of each group are equal, is skipped before its backward pass.

    Costs its extra passes. The log-probabilities that it compares are those of the passes: no extra forward.

    Attributes:
        max_repeats: Most updates on a batch.
        kl_limit: Divergence up to which another pass is made, in nats per token. Proximal policy optimisation stops at
            1.5 times a target of 0.01 to 0.02 (https://spinningup.openai.com/en/latest/algorithms/ppo.html).
        least_share: Repeat only if generating takes at least this share of a batch with one pass, in [0, 1). With 0,
            the rule looks at no clock, and a run can be repeated exactly.
    """

    reason: ClassVar[str] = "kl"

    max_repeats: int = 4
    kl_limit: float = 0.02
    least_share: float = 0.0
    second: float | None = field(init=False, repr=False, default=None)
    share: float | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        check_least(self, max_repeats=1)
        if not (self.kl_limit > 0 and math.isfinite(self.kl_limit)):
            raise ValueError(f"`kl_limit` must be above 0, got {self.kl_limit}.")
        if not 0 <= self.least_share < 1:
            raise ValueError(f"`least_share` must be at least 0 and below 1, got {self.least_share}.")
        self.wants = frozenset({"policy", "times"} if self.least_share else {"policy"})

    def is_cheap(self) -> bool:
        """Tell whether a fresh batch takes too little time for a repeat to save any, or it is not known yet."""
        return self.least_share > 0 and (self.share is None or self.share < self.least_share)

    def explodes(self) -> bool:
        """Tell whether second passes usually make no update."""
        return self.second is not None and self.second > EXPLODED * self.kl_limit

    def decide(self, observation: Observation) -> int:
        if observation.advantage == 0:
            return 0
        if self.is_cheap() or (self.explodes() and observation.batch % TRIES):
            return 1
        return self.max_repeats

    def may_repeat(self, observation: Observation, drifts: Sequence[PolicyDrift]) -> bool:
        return drifts[-1].kl <= self.kl_limit

    def may_update(self, observation: Observation, drifts: Sequence[PolicyDrift]) -> bool:
        return drifts[-1].kl <= EXPLODED * self.kl_limit

    def explain(self, observation: Observation) -> str:
        return NO_ADVANTAGE if observation.advantage == 0 else "cheap" if self.is_cheap() else self.reason

    def evidence(self, observation: Observation) -> dict[str, float]:
        numbers: dict[str, float] = {"max_repeats": self.max_repeats, "kl_limit": self.kl_limit}
        if observation.advantage is not None:
            numbers["mean advantage"] = observation.advantage
        if self.second is not None:
            numbers["divergence at second passes"] = self.second
        if self.share is not None:
            numbers |= {"share of generating": self.share, "least_share": self.least_share}
        return numbers

    def remark(self, outcomes: Sequence[Outcome]) -> str | None:
        if said := forbidden("kl", self.max_repeats):
            return said
        of = counted(len(outcomes), "batch", "batches")
        empty = sum(outcome.reason == NO_ADVANTAGE for outcome in outcomes)
        if empty >= NEARLY_ALL * len(outcomes):
            return (
                f"kl skipped {empty:,} of {of}, because all rewards of each group were equal: nothing can be learned "
                "from them. Use a reward that tells answers apart, or more generations a prompt."
            )
        if any(outcome.repeats > 1 for outcome in outcomes):
            return None
        if self.is_cheap():
            share = f"{self.share:.0%}" if self.share is not None else "an unknown share"
            return (
                f"kl repeated none of {of}: generating took {share} of the time, and `least_share` is "
                f"{self.least_share:.0%}. To repeat all the same: {parameters(least_share=0.0)}."
            )
        moved = f" ({self.second:.3g} nats at the second pass)" if self.second is not None else ""
        return (
            f"kl repeated none of {of}: one update moved the policy too far{moved}. Use a lower --learning_rate, or a "
            f"higher limit than {self.kl_limit:g}: {parameters(kl_limit=2 * self.kl_limit)}."
        )

    def observe(self, outcome: Outcome) -> None:
        if len(outcome.drifts) > 1 and math.isfinite(kl := outcome.drifts[1].kl):
            self.second = kl if self.second is None else 0.8 * self.second + 0.2 * kl
        times = outcome.observation.times
        if times is not None and times.generating and times.one_pass:
            share = times.generating / (times.generating + times.one_pass)
            self.share = share if self.share is None else 0.9 * self.share + 0.1 * share

    def state_dict(self) -> dict[str, Any]:
        return {"second": self.second, "share": self.share}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.second, self.share = state["second"], state["share"]
