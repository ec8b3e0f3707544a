"""The contract between a repeat scheduler and the trainer: one record in, one number out, one record back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .remarks import remark_on_any

NO_TARGETS = "no targets"
"""Why a batch is skipped in which no label counts: it has no mean loss per target."""

TOO_FEW_ROWS = "rows"
"""Why a batch is skipped of which more than half of the rows were dropped."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What a scheduler may look at: one batch, after the first pass over it.

    Attributes:
        batch: Index of the batch since training began, from 0. Users read numbers from 1: the step in logs and trace.
        loss: Mean loss per target token of the first pass, in nats, averaged over ranks; over the rows that are kept.
        progress: Share of the training run already spent, in [0, 1).
        accuracy: Share of the target tokens that the first pass predicted right, over all ranks; None unless the rule
            `wants` it, and for a batch without targets. A run in which it cannot be seen is refused.
        grad_norm: Norm of the gradient of the first pass, before clipping; None unless the rule `wants` it, and before
            the backward.
    """

    batch: int
    loss: float
    progress: float
    accuracy: float | None = None
    grad_norm: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one batch.

    Attributes:
        observation: What the scheduler saw before it decided.
        repeats: Updates made on the batch; 0 is a skip.
        losses: `losses[i]` is the loss of pass i+1, in nats per target token, averaged over ranks. A skipped batch has
            one.
        reason: Why the batch got these repeats, in one word, for the trace.
        replayed: Earlier batches that were trained on once more after this one, by index, each with the loss of that
            pass.
        rows: Rows that a row rule has judged, over all ranks.
        rows_dropped: How many of them were not trained on.
    """

    observation: Observation
    repeats: int
    losses: tuple[float, ...]
    reason: str = ""
    replayed: tuple[tuple[int, float], ...] = ()
    rows: int = 0
    rows_dropped: int = 0

    @property
    def skipped(self) -> bool:
        return self.repeats == 0

    @property
    def updates(self) -> int:
        """Updates made: on the batch, and on those replayed after it."""
        return self.repeats + sum(math.isfinite(loss) for _, loss in self.replayed)


class RepeatScheduler(ABC):
    """Decide how many updates each batch gets.

    `observe` is the only method that writes, all others only read. What a scheduler remembers goes through
    `state_dict`, as JSON, and is written into every checkpoint. A rule that needs a coin derives it from `(seed,
    observation.batch)`, so that all ranks and a resumed run toss the same one.

    The trainer never asks about a batch whose first-pass loss is not finite, or that has no targets and so no mean
    loss per target: it skips it, and reports the outcome with that loss or with NaN. `observe` must leave such a loss
    out of everything it remembers.

    `decide` and `observe` are enough for most rules. `goes_on` ends the repeats of a batch early, by what they have
    shown; `replay` and `held` train on earlier batches again; `wants` asks for more to look at than the loss.
    """

    reason: ClassVar[str] = "scheduler"
    wants: frozenset[str] = frozenset()
    """What the rule needs beside the loss: "accuracy", "grad_norm", "inputs".

    The first two stand in `observation`. With "grad_norm", `decide` is asked twice: before the backward, without it,
    and after, with it; a skip after the backward costs the whole pass. With "inputs" the trainer asks what to hold.
    """

    def __repr__(self) -> str:
        """Name the rule: a checkpoint tells by it whether its state fits. A dataclass adds its parameters."""
        return f"{type(self).__qualname__}()"

    @abstractmethod
    def decide(self, observation: Observation) -> int:
        """Return the repeats of this batch: 0 to skip it, 1 to train on it once, n for n updates."""

    def goes_on(self, observation: Observation, losses: Sequence[float], accuracy: float | None) -> bool:
        """Tell whether to pass over the batch again, now that the last of `losses` is known.

        Asked from the second pass on, as long as `decide` allows another one.

        Args:
            losses: Of the passes so far, as in `Outcome`.
            accuracy: Of the last of them, as in `Observation`.
        """
        return True

    def replay(self, observation: Observation) -> Sequence[int]:
        """Return the indices of held batches to train on once more, after this one. Not asked after a skip."""
        return ()

    def held(self) -> Sequence[int]:
        """Return the indices of the batches whose inputs the trainer shall keep, for `replay`.

        Asked after `observe`, of a rule that `wants` "inputs". A batch that it leaves out is gone.
        """
        return ()

    def explain(self, observation: Observation) -> str:
        """Name the rule that `decide` would follow, in one word."""
        return self.reason

    def evidence(self, observation: Observation) -> dict[str, float]:
        """Return the numbers that `decide` weighs, by name: thresholds, and what it remembers."""
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
        """Take note of a finished batch, skipped or not. Called exactly once a batch."""
        return

    def state_dict(self) -> dict[str, Any]:
        """Return everything `observe` has changed, as JSON-serialisable values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        return


@dataclass
class WrappedScheduler(RepeatScheduler):
    """Leave everything to `inner`: a base for rules that change some of its decisions.

    Attributes:
        inner: The scheduler that decides where this one does not.
    """

    inner: RepeatScheduler

    def __post_init__(self) -> None:
        self.wants = self.wants | self.inner.wants

    def decide(self, observation: Observation) -> int:
        return self.inner.decide(observation)

    def goes_on(self, observation: Observation, losses: Sequence[float], accuracy: float | None) -> bool:
        return self.inner.goes_on(observation, losses, accuracy)

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


def check_least(rule: RepeatScheduler, **least: int) -> None:
    """Refuse parameters of a rule that are too small.

    Raises:
        ValueError: One of them is.
    """
    for name, value in least.items():
        if not getattr(rule, name) >= value:
            raise ValueError(f"`{name}` must be at least {value}, got {getattr(rule, name)}.")


def is_finite(outcome: Outcome) -> bool:
    """Tell whether the first-pass loss may enter a history."""
    return math.isfinite(outcome.observation.loss)
