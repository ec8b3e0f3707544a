"""Repeat a batch while the next one is not there yet: where a fresh batch costs more than a pass."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from .base import Observation, Outcome, RepeatScheduler, check_least
from .remarks import forbidden, has_repeated, in_warm_up, made, repeated_none, usual_updates

LEAST_HISTORY = 5
"""Number of measured batches that are needed before one is repeated."""

NEGLIGIBLE = 0.05
"""Share of a pass. A shorter wait counts as none, and a pass that is longer than a wait by that much still fits."""


class Sample(NamedTuple):
    """Times of one batch.

    Attributes:
        waiting: Seconds of waiting for its data.
        one_pass: Seconds of a pass over the batch before.
        hidden: Passes over the batch before, during which worker processes went on loading. 0 if there are none.
    """

    waiting: float
    one_pass: float
    hidden: int


@dataclass
class WaitScheduler(RepeatScheduler):
    """Repeat each batch as often as a pass fits into the time that training waits for the next one.

    `repeats = 1 + floor(wait / pass)`, at most `max_repeats`. `wait` is what a batch with one pass would have waited,
    and `pass` the median time of a pass, both over the last `window` batches. `wait` is a mean, because loaders often
    deliver several batches at once. The longest wait counts as the next longest: an epoch or a worker has begun.

    Without workers, nothing is loaded during a pass: `wait` is what was waited. With workers, repeats hide the wait
    that they fill, so the further passes are added to it. Where nothing is left to wait, the loader keeps up, and may
    be faster than that: the rule then makes one pass less, until waiting shows again.

    It is not reproducible, because times are not. `--repeat_scheduler follow` repeats what a run has done. Costs
    nothing where the next batch is always there: it then never repeats. Measured in docs/measure/waiting.md.

    Attributes:
        max_repeats: Most updates on one batch.
        window: Number of recent batches to remember.
    """

    reason: ClassVar[str] = "waiting"
    wants = frozenset({"times"})

    max_repeats: int = 5
    window: int = 20
    history: deque[Sample] = field(init=False, repr=False)
    passes: int = field(init=False, repr=False, default=0)
    """Passes over the last batch; 0 if it was skipped, or is not known."""

    def __post_init__(self) -> None:
        check_least(self, max_repeats=1, window=LEAST_HISTORY)
        self.history = deque(maxlen=self.window)

    def pass_seconds(self) -> float:
        """Return the median time of a pass, in seconds."""
        return statistics.median(sample.one_pass for sample in self.history)

    def mean_wait(self) -> float:
        """Return the mean wait, in seconds; the longest counts as the next longest."""
        *others, _ = sorted(sample.waiting for sample in self.history)
        return statistics.fmean([*others, others[-1]])

    def wait_after_one_pass(self) -> float:
        """Return what a batch with one pass would have waited, in seconds."""
        wait, one_pass = self.mean_wait(), self.pass_seconds()
        hidden = [sample.hidden for sample in self.history]
        if wait > NEGLIGIBLE * one_pass:
            return wait + one_pass * max(0.0, statistics.fmean(hidden) - 1)
        if not any(hidden):
            return wait
        return one_pass * max(0, max(hidden) - 2)

    def decide(self, observation: Observation) -> int:
        if len(self.history) < LEAST_HISTORY:
            return 1
        fitting = self.wait_after_one_pass() / max(self.pass_seconds(), 1e-9)
        return min(self.max_repeats, 1 + math.floor(min(fitting, self.max_repeats) + NEGLIGIBLE))

    def explain(self, observation: Observation) -> str:
        if len(self.history) < LEAST_HISTORY:
            return "unmeasured"
        return self.reason if self.decide(observation) > 1 else "ready"

    def evidence(self, observation: Observation) -> dict[str, float]:
        numbers: dict[str, float] = {"batches remembered": len(self.history)}
        if len(self.history) >= LEAST_HISTORY:
            numbers |= {
                "mean wait": self.mean_wait(),
                "wait after one pass": self.wait_after_one_pass(),
                "a pass takes": self.pass_seconds(),
                "max_repeats": self.max_repeats,
            }
        return numbers

    def remark(self, outcomes: Sequence[Outcome]) -> str | None:
        if said := forbidden("wait", self.max_repeats) or in_warm_up("wait", outcomes, LEAST_HISTORY + 1):
            return said
        if len(self.history) < LEAST_HISTORY:
            return f"{repeated_none('wait', outcomes)}: it has measured only {len(self.history)} of them."
        if not has_repeated(outcomes):
            return f"{repeated_none('wait', outcomes)}: {_why_not(outcomes)} baseline costs less."
        usual = usual_updates(outcomes)
        if usual is None or usual[0] < self.max_repeats:
            return None
        fitting = self.wait_after_one_pass() / max(self.pass_seconds(), 1e-9)
        return (
            f"{made('wait', *usual, len(outcomes))}, as many as --max_repeats allows: the wait for a batch is as long "
            f"as {fitting:.2g} passes. More workers or a faster source bring more than repeats."
        )

    def observe(self, outcome: Outcome) -> None:
        times = outcome.observation.times
        if times is None:
            return
        if times.one_pass is not None and self.passes:
            self.history.append(Sample(times.waiting, times.one_pass, self.passes if times.working else 0))
        self.passes = 0 if outcome.skipped else len(outcome.losses) + len(outcome.replayed)

    def state_dict(self) -> dict[str, Any]:
        return {"history": [list(sample) for sample in self.history], "passes": self.passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = deque((Sample(*sample) for sample in state["history"]), maxlen=self.window)
        self.passes = state["passes"]


def _why_not(outcomes: Sequence[Outcome]) -> str:
    """Return why no batch was repeated, as a sentence: how long training has waited."""
    timed = [outcome.observation.times for outcome in outcomes if outcome.observation.times is not None]
    waiting = sum(times.waiting for times in timed)
    passes = sum(
        len(outcome.losses) * outcome.observation.times.one_pass
        for outcome in outcomes
        if outcome.observation.times is not None and outcome.observation.times.one_pass is not None
    )
    share = waiting / (waiting + passes) if waiting + passes else 0.0
    if share <= NEGLIGIBLE:
        return f"the next batch was always there. Waiting took {share:.1%} of the time."
    return f"a batch waited less than a pass takes. Waiting took {share:.1%} of the time."
