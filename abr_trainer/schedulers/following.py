"""Repeat the decisions of an earlier run, batch by batch, as its trace has them."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from ..records.files import TRACE_NAME
from .base import Observation, Outcome, PolicyDrift, RepeatScheduler, is_finite

ALIKE = 1e-6
"""Relative difference from which a loss is not that of the trace. The same run has the same losses."""


class BadTrace(ValueError):
    """A trace that cannot be followed, or no further; the message says which, and what to do."""


class Done(NamedTuple):
    """What a run has done with one batch.

    Attributes:
        passes: Passes over it, the one that failed included; 0 for a skip.
        updates: Updates on it.
        saw_gradient: Whether it was skipped after its backward.
        replayed: Indices of the batches that were trained on again after it.
        loss: Its first-pass loss; NaN if it has none.
    """

    passes: int
    updates: int
    saw_gradient: bool
    replayed: tuple[int, ...]
    loss: float


@dataclass
class FollowScheduler(RepeatScheduler):
    """Do with each batch what an earlier run has done with it: repeat, skip and replay, as its trace says.

    With the same model, data and flags, the weights are those of that run to the last bit, also under rules that are
    not reproducible, such as `wait`. Repeats that a rule or the budget ended early end there as well. No rule judges
    again: there is no outlier rule and no gradient rule around it. Rows are judged anew, by `--skip_rows`, and batches
    that the trainer skips by itself, such as those without a finite loss, are skipped without the trace.

    Costs what the other run has cost. A checkpoint stores no part of the trace, but a checksum: a resumed run is
    refused if the part that it has followed is not the same any more.

    Attributes:
        trace: `abr_trace.jsonl` of the run to follow, or its directory.
    """

    reason: ClassVar[str] = "followed"

    trace: str = ""
    batches: int = field(init=False, repr=False, default=0)
    """Batches that are followed: up to the last one that had a finite loss."""
    differs: int | None = field(init=False, repr=False, default=None)
    """Step of the first batch whose first-pass loss is not that of the trace."""
    _plan: tuple[Done, ...] = field(init=False, repr=False, compare=False)
    _last_use: dict[int, int] = field(init=False, repr=False, compare=False)
    _held: set[int] = field(init=False, repr=False, compare=False, default_factory=set)

    def __post_init__(self) -> None:
        self.trace = str(self.trace)
        if not self.trace:
            raise BadTrace(f"--repeat_scheduler follow needs --trace: the {TRACE_NAME} of a run, or its directory.")
        if not self.path.is_file():
            what = f"holds no {TRACE_NAME}" if Path(self.trace).is_dir() else "does not exist"
            raise BadTrace(f"--trace {self.trace} {what}. Give the {TRACE_NAME} of a run, or its directory.")
        version = self.path.stat()
        self._plan = read_plan(self.path, version.st_mtime_ns, version.st_size)
        # In the order of batches, so that the last one counts.
        self._last_use = {earlier: batch for batch, done in enumerate(self._plan) for earlier in done.replayed}
        sees_gradient = any(done.saw_gradient for done in self._plan)
        self.wants = frozenset({"grad_norm"} if sees_gradient else ()) | ({"inputs"} if self._last_use else set())

    @property
    def path(self) -> Path:
        """The file that is followed."""
        given = Path(self.trace)
        return given / TRACE_NAME if given.is_dir() else given

    def done(self, batch: int) -> Done:
        """Return what was done with a batch.

        Raises:
            BadTrace: The trace has no such batch.
        """
        if batch >= len(self._plan):
            raise BadTrace(
                f"--trace {self.trace} has {len(self._plan)} batches, and this run has a batch {batch + 1}. Train on "
                f"fewer, with --max_steps {len(self._plan)}, or follow a longer run."
            )
        return self._plan[batch]

    def decide(self, observation: Observation) -> int:
        done = self.done(observation.batch)
        return 1 if done.saw_gradient and observation.grad_norm is None else done.passes

    def may_update(self, observation: Observation, drifts: Sequence[PolicyDrift]) -> bool:
        return len(drifts) <= self.done(observation.batch).updates

    def replay(self, observation: Observation) -> Sequence[int]:
        return self.done(observation.batch).replayed

    def held(self) -> Sequence[int]:
        return sorted(index for index in self._held if self._last_use[index] >= self.batches)

    def evidence(self, observation: Observation) -> dict[str, float]:
        numbers: dict[str, float] = {"batches in the trace": len(self._plan)}
        if observation.batch < len(self._plan) and math.isfinite(loss := self._plan[observation.batch].loss):
            numbers["loss in the trace"] = loss
        return numbers

    def remark(self, outcomes: Sequence[Outcome]) -> str | None:
        if self.differs is None:
            return None
        return (
            f"follow did what {self.trace} says, but the losses differ from batch {self.differs} on: this run has "
            "another model, other data or other flags, or it ran on another machine."
        )

    def observe(self, outcome: Outcome) -> None:
        batch = outcome.observation.batch
        if batch >= len(self._plan) or not is_finite(outcome):
            return
        self.batches = batch + 1
        if self.differs is None and not math.isclose(self._plan[batch].loss, outcome.observation.loss, rel_tol=ALIKE):
            self.differs = self.batches
        if batch in self._last_use:
            self._held.add(batch)
        self._held = set(self.held())

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches, "differs": self.differs, "followed": self._checksum(self.batches)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            BadTrace: The trace has changed since.
        """
        self.batches, self.differs = state["batches"], state["differs"]
        if self._checksum(self.batches) != state["followed"]:
            raise BadTrace(
                f"--trace {self.trace} has changed: its first {self.batches} batches are not those that this run has "
                "followed. Restore the file, or start again in another --output_dir."
            )
        self._held = {index for index, last in self._last_use.items() if index < self.batches <= last}

    def _checksum(self, batches: int) -> str:
        followed = [(done.passes, done.updates, done.saw_gradient, done.replayed) for done in self._plan[:batches]]
        return hashlib.sha256(json.dumps(followed).encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=4)
def read_plan(path: Path, changed: int, size: int) -> tuple[Done, ...]:
    """Return what a trace says of each batch.

    Args:
        changed: When the file was last written: each version of it is read once.
        size: Of the file, in bytes.

    Raises:
        BadTrace: It cannot be read, is incomplete, or lacks a batch.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadTrace(f"--trace: {path} cannot be read: {error}.") from None
    plan: list[Done] = []
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            raise BadTrace(
                f"--trace: {path} is cut off in line {number}: the run was killed while it wrote. Resume that run, or "
                "delete this line."
            )
        try:
            entry = json.loads(line)
            step, done = entry["step"], _done(entry)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadTrace(
                f"--trace: line {number} of {path} is no batch of a trace: {line.strip()[:60]!r}."
            ) from None
        if step != number:
            raise BadTrace(
                f"--trace: line {number} of {path} is batch {step}, and should be batch {number}. A trace has each "
                "batch once, in order."
            )
        if late := [index + 1 for index in done.replayed if not 0 <= index < number - 1]:
            raise BadTrace(
                f"--trace: in {path}, batch {number} comes back to batch {late[0]}, which is not before it."
            )
        plan.append(done)
    if not plan:
        raise BadTrace(f"--trace: {path} holds no batch.")
    return tuple(plan)


def _done(entry: dict[str, Any]) -> Done:
    repeats, losses, loss = int(entry["repeats"]), entry["losses"], entry["loss"]
    # A gradient that is not finite is not in the trace; then the trainer skips the batch by itself.
    saw_gradient = repeats == 0 and loss is not None and ("grad_norm" in entry or entry["reason"] == "non-finite")
    replayed = tuple(earlier["step"] - 1 for earlier in entry.get("replayed", ()))
    passes = len(losses) if repeats else 0
    return Done(passes, repeats, saw_gradient, replayed, math.nan if loss is None else float(loss))
