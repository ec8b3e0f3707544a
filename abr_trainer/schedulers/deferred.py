"""Train on hard batches again later, between fresh ones, instead of repeating them immediately."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .base import Observation, Outcome, RepeatScheduler, check_least, is_finite
from .recent import MIN_HISTORY, share_below
from .remarks import counted, parameters


@dataclass
class ReplayScheduler(RepeatScheduler):
    """Train on every batch once, and on hard batches again, `spacing` batches later.

    A batch is hard if its first-pass loss is above the `quantile` of the recent losses, after their trend is removed.
    After each new batch at most one earlier batch is trained on: of those that are due, the one with the highest loss.
    If more than `buffer_size` hard batches wait, the one with the lowest loss is discarded.

    Costs one pass per replay, and stores the inputs of `buffer_size` batches in memory and in each checkpoint. A
    resumed run needs the same number of processes, and checkpoints cannot be pushed, because they contain training
    data. At equal passes (measured, see docs/measure/effectiveness.md), perplexity is 2.9 % higher than the baseline's
    on fresh data. If there are only 20 batches, there is no evidence of a difference.

    Attributes:
        quantile: Quantile of the recent losses above which a batch is hard, in [0, 1). 0: all batches are hard.
        spacing: Number of batches between the two passes over a hard batch.
        buffer_size: Most batches that may wait.
        window: Number of recent losses to remember. No batch is hard before there are ten.
    """

    reason: ClassVar[str] = "once"
    wants = frozenset({"inputs"})

    quantile: float = 0.75
    spacing: int = 5
    buffer_size: int = 16
    window: int = 50
    history: deque[float] = field(init=False, repr=False)
    waiting: list[tuple[int, float]] = field(init=False, repr=False, default_factory=list)

    def __post_init__(self) -> None:
        if not 0 <= self.quantile < 1:
            raise ValueError(f"`quantile` must be at least 0 and below 1, got {self.quantile}.")
        check_least(self, spacing=1, buffer_size=1, window=MIN_HISTORY)
        self.history = deque(maxlen=self.window)

    def decide(self, observation: Observation) -> int:
        return 1

    def replay(self, observation: Observation) -> Sequence[int]:
        due = [(loss, batch) for batch, loss in self.waiting if batch + self.spacing <= observation.batch]
        return [max(due)[1]] if due else []

    def held(self) -> Sequence[int]:
        return [batch for batch, _ in self.waiting]

    def is_hard(self, loss: float) -> bool:
        if self.quantile == 0:
            return True
        return len(self.history) >= MIN_HISTORY and share_below(loss, self.history) >= self.quantile

    def evidence(self, observation: Observation) -> dict[str, float]:
        numbers: dict[str, float] = {"losses remembered": len(self.history), "batches waiting": len(self.waiting)}
        if self.history:
            numbers["share of them below"] = share_below(observation.loss, self.history)
        return numbers | {"quantile": self.quantile}

    def remark(self, outcomes: Sequence[Outcome]) -> str | None:
        if any(outcome.replayed for outcome in outcomes):
            return None
        came_back = f"replay came back to none of {counted(len(outcomes), 'batch', 'batches')}"
        if self.quantile and len(outcomes) <= MIN_HISTORY:
            return f"{came_back}: no batch is hard before it has seen {MIN_HISTORY} losses. Train on more batches."
        if self.waiting:
            return (
                f"{came_back}: the run ended before the first hard one was due, `spacing` = {self.spacing} batches "
                "later. Train on more batches, or set a smaller `spacing`."
            )
        return (
            f"{came_back}: no loss lay above {self.quantile:.0%} of the last {self.window}. A lower `quantile` comes "
            f"back to more: {parameters(quantile=round(self.quantile / 2, 3))}."
        )

    def observe(self, outcome: Outcome) -> None:
        replayed = {batch for batch, _ in outcome.replayed}
        self.waiting = [entry for entry in self.waiting if entry[0] not in replayed]
        if not is_finite(outcome) or outcome.skipped:
            return
        loss = outcome.observation.loss
        if self.is_hard(loss):
            self.waiting.append((outcome.observation.batch, loss))
            if len(self.waiting) > self.buffer_size:
                self.waiting.remove(min(self.waiting, key=lambda entry: entry[1]))
        self.history.append(loss)

    def state_dict(self) -> dict[str, Any]:
        return {"history": list(self.history), "waiting": self.waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = deque(state["history"], maxlen=self.window)
        self.waiting = [(batch, loss) for batch, loss in state["waiting"]]
