"""The interface between a repeat scheduler and the trainer: `Observation`, `Outcome` and `RepeatScheduler`."""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .remarks import remark_on_any

NO_TARGETS = "no targets"
"""Reason for skipping a batch without target tokens, which has no mean loss per target."""

TOO_FEW_ROWS = "rows"
"""Reason for skipping a batch of which more than half of the rows were dropped."""


NO_ADVANTAGE = "no advantage"
"""Reason for skipping a generated batch from which nothing can be learned: all rewards of each group are equal."""


OFF_POLICY = "off policy"
"""Why a generated batch gets fewer repeats than allowed: at the last pass the policy had moved too far."""


class BadDecision(TypeError, ValueError):
    """A rule has returned what it must not return; the message names its class."""

    def __init__(self, rule: object, method: str, returned: object, must: str) -> None:
        kind = type(rule)
        super().__init__(
            f"{method} of {kind.__module__}.{kind.__qualname__} returned {returned!r}. It must return {must}."
        )


@dataclass(frozen=True, slots=True)
class BatchTimes:
    """Times of one batch, in seconds, on which all ranks agree.

    Attributes:
        waiting: Longest wait of a rank for the data of this batch.
        generating: Longest time of a rank for generating this batch.
        working: Longest time of a rank between the arrival of the batch before and the wait for this one, during which
            worker processes of the loader have gone on loading. 0 if it has none.
        one_pass: Shortest time of a rank for one pass, averaged over the passes since the decision about the batch
            before. None if there were none.
    """

    waiting: float
    generating: float
    working: float
    one_pass: float | None


@dataclass(frozen=True, slots=True)
class PolicyDrift:
    """How far the policy has moved, over the generated tokens of a batch and all ranks, when a pass is made.

    The ratio of a token is its probability now, divided by that under the policy that generated it. Before the first
    update on a batch it is 1, if the batch was generated just before.

    Attributes:
        kl: Estimated divergence of the policy now from the one that generated, in nats per token: the mean of
            ratio - 1 - log(ratio) (k3 of http://joschu.net/blog/kl-approx.html). It is never negative.
        clip_fraction: Share of the tokens that the loss clips, in [0, 1].
        ess: Effective sample size as a share of the tokens, in (0, 1]: (sum of ratios)^2 / (tokens x sum of squares).
    """

    kl: float
    clip_fraction: float
    ess: float


@dataclass(frozen=True, slots=True)
class Observation:
    """What a scheduler may look at: one batch, after the first pass over it.

    Attributes:
        batch: Index of the batch since training began, from 0. The step in logs and traces counts from 1.
        loss: Mean loss per target token of the first pass over the kept rows, in nats, averaged over ranks.
        progress: Share of the training run already spent, in [0, 1).
        accuracy: Share of target tokens that the first pass predicted correctly, over all ranks, in [0, 1]. None
            unless the rule `wants` it, and for a batch without targets. A run that cannot measure it is refused.
        grad_norm: Norm of the gradient of the first pass, before clipping. None unless the rule `wants` it, and before
            the backward pass.
        times: How long the data of the batch took, and a pass. None unless the rule `wants` "times". Clocks differ
            from run to run: a rule that reads this is not reproducible.
        advantage: Mean absolute advantage of the rows of a generated batch, over all ranks. None unless the rule
            `wants` "policy", or where the gradient is 0 without advantages neither: a KL penalty, an entropy bonus.
    """

    batch: int
    loss: float
    progress: float
    accuracy: float | None = None
    grad_norm: float | None = None
    times: BatchTimes | None = None
    advantage: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was done with one batch.

    Attributes:
        observation: What the scheduler saw before it decided.
        repeats: Updates made on the batch; 0 is a skip.
        losses: `losses[i]` is the loss of pass i+1, in nats per target token, averaged over ranks. A skipped batch has
            one.
        reason: Why the batch got these repeats, in one word, for the trace.
        replayed: Index of each earlier batch that was trained on again after this one, and the loss of that pass.
        rows: Number of rows that a row rule has judged, over all ranks.
        rows_dropped: Number of these rows that were not trained on.
        drifts: Of a generated batch, how far the policy had moved at each pass; as long as `losses`.
    """

    observation: Observation
    repeats: int
    losses: tuple[float, ...]
    reason: str = ""
    replayed: tuple[tuple[int, float], ...] = ()
    rows: int = 0
    rows_dropped: int = 0
    drifts: tuple[PolicyDrift, ...] = ()

    @property
    def skipped(self) -> bool:
        return self.repeats == 0

    @property
    def updates(self) -> int:
        """Number of updates on the batch and on the batches replayed after it."""
        return self.repeats + sum(math.isfinite(loss) for _, loss in self.replayed)


class RepeatScheduler(ABC):
    """Decide how many updates each batch gets.

    Only `observe` changes the state; all other methods only read. Each checkpoint stores the state as JSON, through
    `state_dict`. A rule that needs random numbers must derive them from `(seed, observation.batch)`, so that all ranks
    and a resumed run draw the same.

    The trainer skips a batch whose first-pass loss is NaN or infinite, or that has no targets, without calling
    `decide`. It reports the outcome with this loss, or NaN. `observe` must not store such a loss.

    `decide` and `observe` are enough for most rules. `goes_on` ends the repeats of a batch early, depending on their
    losses. `replay` and `held` train on earlier batches again. `wants` asks for more than the loss.
    """

    reason: ClassVar[str] = "scheduler"
    wants: frozenset[str] = frozenset()
    """What the rule needs in addition to the loss: "accuracy", "grad_norm", "times", "policy",
    "inputs".

    The first three are in `observation`. With "grad_norm", `decide` is called twice: before the backward pass without
    the norm, and after it with the norm. A skip after the backward pass costs a full pass. With "policy" the trainer
    calls `may_repeat` and `may_update`; it must be one that generates its data. With "inputs" it calls `held`.
    """

    def __repr__(self) -> str:
        """Return the rule with its parameters. A checkpoint can only be resumed with the same text."""
        return f"{type(self).__qualname__}()"

    @abstractmethod
    def decide(self, observation: Observation) -> int:
        """Return the repeats of this batch: 0 to skip it, 1 to train on it once, n for n updates."""

    def goes_on(self, observation: Observation, losses: Sequence[float], accuracy: float | None) -> bool:
        """Tell whether to make another pass over the batch, given the losses so far.

        Called after each pass from the second on, as long as `decide` allows another one.

        Args:
            losses: Losses of the passes so far, as in `Outcome`.
            accuracy: Accuracy of the last pass, as in `Observation`.
        """
        return True

    def may_repeat(self, observation: Observation, drifts: Sequence[PolicyDrift]) -> bool:
        """Tell whether to make another pass over a generated batch, given how far the policy has moved.

        Called after each pass, the first among them, as long as `decide` allows another one.

        Args:
            drifts: Of the passes so far, as in `Outcome`.
        """
        return True

    def may_update(self, observation: Observation, drifts: Sequence[PolicyDrift]) -> bool:
        """Tell whether to make an update of the last pass over a generated batch.

        Called after each pass from the second on. If not, the repeats end with the update before.

        Args:
            drifts: Of the passes so far, as in `Outcome`.
        """
        return True

    def replay(self, observation: Observation) -> Sequence[int]:
        """Return the indices of held batches to train on again after this one. Not called after a skip."""
        return ()

    def held(self) -> Sequence[int]:
        """Return the indices of the batches whose inputs the trainer must keep for `replay`.

        Called after `observe`, if the rule `wants` "inputs". The trainer discards all other batches.
        """
        return ()

    def explain(self, observation: Observation) -> str:
        """Return the reason for the decision of `decide`, in one word."""
        return self.reason

    def evidence(self, observation: Observation) -> dict[str, float]:
        """Return the numbers that `decide` uses, by name: thresholds and remembered statistics."""
        return {}

    def remark(self, outcomes: Sequence[Outcome]) -> str | None:
        """Return what to say at the end of a run if the rule did nothing, or the same to nearly every batch.

        In one line: what it did, why, and what to change. None if there is nothing to say.

        Args:
            outcomes: What became of the batches that the rule has decided about, in order; at least one. Those that it
                was not asked about, or of which the budget left no room for all repeats, are not among them.
        """
        return remark_on_any(type(self).__name__, outcomes)

    def observe(self, outcome: Outcome) -> None:
        """Record a finished batch, skipped or not. Called exactly once per batch."""
        return

    def state_dict(self) -> dict[str, Any]:
        """Return everything `observe` has changed, as JSON-serialisable values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        return


@dataclass
class WrappedScheduler(RepeatScheduler):
    """Pass every call to `inner`. Base class for rules that change some of its decisions.

    Attributes:
        inner: The scheduler for all other decisions.
    """

    inner: RepeatScheduler

    def __post_init__(self) -> None:
        self.wants = self.wants | self.inner.wants

    def decide(self, observation: Observation) -> int:
        return decided_by(self.inner, observation)

    def goes_on(self, observation: Observation, losses: Sequence[float], accuracy: float | None) -> bool:
        return self.inner.goes_on(observation, losses, accuracy)

    def may_repeat(self, observation: Observation, drifts: Sequence[PolicyDrift]) -> bool:
        return self.inner.may_repeat(observation, drifts)

    def may_update(self, observation: Observation, drifts: Sequence[PolicyDrift]) -> bool:
        return self.inner.may_update(observation, drifts)

    def replay(self, observation: Observation) -> Sequence[int]:
        return self.inner.replay(observation)

    def held(self) -> Sequence[int]:
        return self.inner.held()

    def explain(self, observation: Observation) -> str:
        return self.inner.explain(observation)

    def evidence(self, observation: Observation) -> dict[str, float]:
        return self.inner.evidence(observation)

    def remark_of_inner(self, outcomes: Sequence[Outcome]) -> str | None:
        """Return the remark of `inner` on the batches that this rule has left to it."""
        left = [outcome for outcome in outcomes if outcome.reason != self.reason]
        return self.inner.remark(left) if left else None

    def observe(self, outcome: Outcome) -> None:
        self.inner.observe(outcome)

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])


def rules_in(rule: Any) -> list[Any]:
    """Return a rule and those that it wraps, the outermost first."""
    found = [rule]
    while (rule := getattr(rule, "inner", None)) is not None:
        found.append(rule)
    return found


def decided_by(rule: RepeatScheduler, observation: Observation) -> int:
    """Return what a rule decides.

    Raises:
        BadDecision: It returns no number of repeats.
    """
    decided = rule.decide(observation)
    try:
        repeats = operator.index(decided)
    except TypeError:
        raise BadDecision(rule, "decide", decided, "an integer") from None
    if repeats < 0:
        raise BadDecision(rule, "decide", decided, "0 (skip) or more")
    return repeats


def check_least(rule: RepeatScheduler, **least: int) -> None:
    """Refuse parameters of a rule that are too small.

    Raises:
        ValueError: One of them is.
    """
    for name, value in least.items():
        if not getattr(rule, name) >= value:
            raise ValueError(f"`{name}` must be at least {value}, got {getattr(rule, name)}.")


def is_finite(outcome: Outcome) -> bool:
    """Tell whether the first-pass loss is finite, so that a rule may store it."""
    return math.isfinite(outcome.observation.loss)
