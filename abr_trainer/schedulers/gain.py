"""Repeat a batch as long as another pass over it gains more than a pass over a fresh batch."""

from __future__ import annotations

import random
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .base import Observation, Outcome, RepeatScheduler, check_least, is_finite
from .recent import MIN_HISTORY, bounded
from .remarks import (
    NEARLY_ALL,
    counted,
    forbidden,
    in_warm_up,
    made,
    parameters,
    repeated_none,
    usual_updates,
)


@dataclass
class GainScheduler(RepeatScheduler):
    """Repeat while the last pass over the batch improved its loss by more than a fresh batch improves the loss level.

    The gain of a fresh batch is the slope of the last `window` first-pass losses, per batch. It includes the gains
    from earlier repeats, so repeating must gain more than all of that. The gain of a pass over the same batch is
    measured from its losses. Before the second pass it is estimated by the mean gain of recent second passes. To keep
    this mean up to date, a second pass is tried on one of `probe_every` batches. Most of the gain on the batch itself
    is memorisation, so only the share `transfer` of it counts.

    A batch is not repeated once the model predicts the share `saturation` of its tokens correctly.

    Costs its extra passes, and an argmax over the logits of each pass for the accuracy. If the accuracy cannot be
    measured, the run is refused. At equal passes (measured, see docs/measure/effectiveness.md), perplexity is 15 %
    higher than the baseline's on fresh data after 160 passes, and 12.6 % after 500. If there are only 20 batches,
    there is no evidence of a difference.

    Attributes:
        max_repeats: Most updates on a batch.
        transfer: Share of the gain on the batch itself, in nats, that counts as gain on other batches, in (0, 1].
        saturation: Share of correctly predicted target tokens from which a batch is not repeated, in (0, 1].
        window: Number of batches for measuring the gain of fresh batches.
        probe_every: Try a second pass on one of this many batches, chosen at random. The gain of second passes is
            averaged over about ten of them.
        seed: Seed of that choice.
    """

    reason: ClassVar[str] = "gain"
    wants = frozenset({"accuracy"})

    max_repeats: int = 5
    transfer: float = 0.1
    saturation: float = 0.9
    window: int = 30
    probe_every: int = 10
    seed: int = 0
    history: deque[float] = field(init=False, repr=False)
    second: float | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        check_least(self, max_repeats=1, window=MIN_HISTORY, probe_every=1)
        for name in ("transfer", "saturation"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be above 0 and at most 1, got {getattr(self, name)}.")
        self.history = deque(maxlen=self.window)

    def fresh_gain(self) -> float | None:
        """Return how much a fresh batch lowers the first-pass loss of the next one, in nats; None if not yet known."""
        if len(self.history) < MIN_HISTORY:
            return None
        return -statistics.linear_regression(range(len(self.history)), self.history).slope

    def probes(self, observation: Observation) -> bool:
        return random.Random(f"{self.seed}-{observation.batch}").random() * self.probe_every < 1

    def pays(self, improvement: float) -> bool:
        fresh = self.fresh_gain()
        return fresh is not None and self.transfer * improvement > max(fresh, 0.0)

    def is_saturated(self, accuracy: float | None) -> bool:
        return accuracy is not None and accuracy >= self.saturation

    def decide(self, observation: Observation) -> int:
        if len(self.history) < MIN_HISTORY or self.is_saturated(observation.accuracy):
            return 1
        if self.second is not None and self.pays(self.second):
            return self.max_repeats
        return min(2, self.max_repeats) if self.probes(observation) else 1

    def goes_on(self, observation: Observation, losses: Sequence[float], accuracy: float | None) -> bool:
        return self.pays(losses[-2] - losses[-1]) and not self.is_saturated(accuracy)

    def explain(self, observation: Observation) -> str:
        if self.is_saturated(observation.accuracy):
            return "saturated"
        is_known = self.second is not None and self.pays(self.second)
        return "probe" if self.decide(observation) > 1 and not is_known else self.reason

    def evidence(self, observation: Observation) -> dict[str, float]:
        numbers: dict[str, float] = {"losses remembered": len(self.history)}
        if (fresh := self.fresh_gain()) is not None:
            numbers["a fresh batch gains"] = fresh
        if self.second is not None:
            numbers["a second pass gains"] = self.second
            numbers["of that counts"] = self.transfer * self.second
        if observation.accuracy is not None:
            numbers |= {"accuracy": observation.accuracy, "saturation": self.saturation}
        return numbers

    def remark(self, outcomes: Sequence[Outcome]) -> str | None:
        if said := forbidden("gain", self.max_repeats) or in_warm_up("gain", outcomes, MIN_HISTORY):
            return said
        saturated = sum(outcome.reason == "saturated" for outcome in outcomes)
        if saturated >= NEARLY_ALL * len(outcomes):
            return (
                f"gain did not repeat {saturated:,} of {len(outcomes):,} batches, because the model predicts "
                f"{self.saturation:.0%} of their tokens already. To repeat them too: {parameters(saturation=1.0)}."
            )
        if self.second is None:
            return (
                f"{repeated_none('gain', outcomes)}: it has tried no second pass. To try one on every second batch: "
                f"{parameters(probe_every=2)}."
            )
        fresh = self.fresh_gain() or 0.0
        why = (
            f"a second pass improved its batch by {self.second:.3g} nats, of which `transfer` = {self.transfer:g} "
            f"counts, and a fresh batch brings {max(fresh, 0.0):.3g} nats"
        )
        if all(outcome.repeats == 1 or outcome.reason == "probe" for outcome in outcomes):
            tried = counted(sum(outcome.repeats > 1 for outcome in outcomes), "second pass", "second passes")
            return (
                f"gain repeated no batch but to try it, with {tried} on {len(outcomes):,} batches: {why}. baseline "
                "costs less; a higher `transfer` repeats more."
            )
        usual = usual_updates(outcomes)
        if usual is None or usual[0] == 1:
            return None
        return f"{made('gain', *usual, len(outcomes))}: {why}. A lower `transfer` repeats less."

    def observe(self, outcome: Outcome) -> None:
        if not is_finite(outcome) or outcome.skipped:
            return
        self.history.append(bounded(outcome.observation.loss))
        if outcome.repeats > 1:
            gained = bounded(outcome.losses[0]) - bounded(outcome.losses[1])
            self.second = gained if self.second is None else 0.9 * self.second + 0.1 * gained

    def state_dict(self) -> dict[str, Any]:
        return {"history": list(self.history), "second": self.second}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = deque(state["history"], maxlen=self.window)
        self.second = state["second"]
