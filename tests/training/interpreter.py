"""The laws of a run as a loop of its own: plain torch over the same batches, with counts of its own.

It knows nothing of `Trainer` or of `abr_trainer`. What it says a run must do follows from a plan and the laws:

- A pass over a batch sums the losses of its kept rows and divides by the targets of all rows.
- A skip leaves weights and optimizer as they were. It costs what its forwards and all its backwards but one cost.
- A broken row is found in the first pass, which is then made once more without it.
- A pass costs 1. A forward costs a third of it, because all weights are trained.
- No pass begins that the budget has no room for.
- The learning rate ticks once a batch, or with the passes that are spent if there is a budget.
- The log holds first-pass losses, and leaves out those that are not finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

LENGTH = 6
"""Tokens of a row."""

FORWARD = Fraction(1, 3)
"""What a forward costs, as a share of a pass."""

IGNORED = -100


@dataclass(frozen=True)
class Plan:
    """What a run is given, and what happens in it.

    Attributes:
        targets: For each row of the data, how many of its last tokens are targets, less than `LENGTH`.
        micro_batch: Rows in a micro-batch.
        accumulation: Micro-batches in a batch.
        decisions: Repeats by batch; the last entry holds for all later batches.
        dropped: Rows that the row rule drops, as batch and position; None for a run without a row rule.
        broken: What is NaN, as batch, position and number of the pass over that batch, from 0.
        budget: `max_passes`.
        most_skips: `max_consecutive_skips`.
    """

    targets: tuple[int, ...]
    micro_batch: int = 2
    accumulation: int = 1
    epochs: int = 1
    decisions: tuple[int, ...] = (1,)
    dropped: frozenset[tuple[int, int]] | None = None
    broken: frozenset[tuple[int, int, int]] = frozenset()
    budget: int | None = None
    schedule: str = "linear"
    warmup: int = 0
    max_grad_norm: float = 1.0
    logging_steps: int = 1
    most_skips: int = 1000

    @property
    def batch(self) -> int:
        """Rows in a batch."""
        return self.micro_batch * self.accumulation

    def rows_of(self, batch: int) -> range:
        """Return which rows of the data a batch has, by its index since training began."""
        begin = batch % self.batches_in_epoch * self.batch
        return range(begin, min(begin + self.batch, len(self.targets)))

    @property
    def batches_in_epoch(self) -> int:
        return -(-len(self.targets) // self.batch)

    def micro_batches_of(self, batch: int) -> list[range]:
        rows = self.rows_of(batch)
        return [rows[i : i + self.micro_batch] for i in range(0, len(rows), self.micro_batch)]

    def factor(self, spent: float, most: float) -> float:
        """Return the learning rate at a time on the clock of the schedule, as a share of the highest."""
        if self.schedule == "constant":
            return 1.0
        if spent < self.warmup:
            return spent / self.warmup
        share = (spent - self.warmup) / max(1, most - self.warmup)
        return max(0.0, (1 + math.cos(math.pi * share)) / 2 if self.schedule == "cosine" else 1 - share)


def data_of(plan: Plan, vocabulary: int) -> list[dict[str, Tensor]]:
    """Return the rows of a plan. The first token of a row is its number, by which a hook can break it."""
    generator = torch.Generator().manual_seed(len(plan.targets))
    rows = []
    for number, targets in enumerate(plan.targets):
        tokens = torch.randint(0, vocabulary, (LENGTH,), generator=generator)
        tokens[0] = number
        labels = tokens.clone()
        labels[: LENGTH - targets] = IGNORED
        rows.append({"input_ids": tokens, "labels": labels})
    return rows


@dataclass
class Counts:
    """What a run has spent, as the ledger names it."""

    batches: int = 0
    skips: int = 0
    forwards: int = 0
    backwards: int = 0
    passes: Fraction = Fraction(0)
    updates: int = 0
    tokens: int = 0
    rows: int = 0
    rows_dropped: int = 0


@dataclass(frozen=True)
class Done:
    """What became of a batch.

    Attributes:
        learning_rate: Of the first update on it.
        last_rate: Of the last one, which is logged; of a skipped batch the one that it would have had.
    """

    loss: float
    repeats: int
    losses: tuple[float, ...]
    reason: str
    rows: int
    rows_dropped: int
    progress: float
    learning_rate: float
    last_rate: float


@dataclass
class Told:
    """What a run must have done.

    Attributes:
        rates: The learning rate of each update.
        log: What was logged, every `logging_steps` batches.
        stopped: The run ended because too many batches in a row were skipped.
    """

    model: Any
    counts: Counts = field(default_factory=Counts)
    done: list[Done] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    log: list[dict[str, float]] = field(default_factory=list)
    stopped: bool = False

    @property
    def mean_loss(self) -> float:
        return mean([batch.loss for batch in self.done if math.isfinite(batch.loss)])


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


class Interpreter:
    """Carries out one plan."""

    def __init__(self, plan: Plan, model: Any, learning_rate: float, weight_decay: float) -> None:
        self.plan = plan
        self.told = Told(model.train())
        self.data = data_of(plan, model.config.vocab_size)
        self.learning_rate = learning_rate
        decayed: dict[bool, list[Tensor]] = {True: [], False: []}
        for name, parameter in model.named_parameters():
            decayed["norm" not in name].append(parameter)
        groups = [{"params": each, "weight_decay": weight_decay * decays} for decays, each in decayed.items()]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate)
        self.most: float = plan.epochs * plan.batches_in_epoch if plan.budget is None else plan.budget

    @property
    def left(self) -> float:
        """Whole passes that may still begin."""
        return math.inf if self.plan.budget is None else math.floor(self.plan.budget - self.told.counts.passes)

    def run(self) -> Told:
        plan, told = self.plan, self.told
        skipped_in_a_row = 0
        for batch in self._batches():
            done = self._one(batch)
            told.done.append(done)
            counts = told.counts
            counts.batches += 1
            counts.skips += done.repeats == 0
            counts.updates += done.repeats
            counts.rows += done.rows
            counts.rows_dropped += done.rows_dropped
            if counts.batches % plan.logging_steps == 0:
                self._log()
            skipped_in_a_row = 0 if done.repeats else skipped_in_a_row + 1
            if skipped_in_a_row >= plan.most_skips:
                told.stopped = True
                break
        return told

    def _batches(self) -> Iterator[int]:
        batch = 0
        while self.left >= 1 if self.plan.budget is not None else batch < self.most:
            yield batch
            batch += 1

    def _log(self) -> None:
        told = self.told
        window = told.done[-self.plan.logging_steps :]
        told.log.append(
            {
                "loss": mean([batch.loss for batch in window if math.isfinite(batch.loss)]),
                "repeats": mean([batch.repeats for batch in window]),
                "skipped": mean([batch.repeats == 0 for batch in window]),
                "passes": float(told.counts.passes),
                "updates": told.counts.updates,
                "rows_dropped": sum(batch.rows_dropped for batch in window),
                "learning_rate": window[-1].last_rate,
            }
        )

    def _rate(self, batches: int) -> float:
        spent = batches if self.plan.budget is None else self.told.counts.passes if self.left >= 1 else self.most
        return self.learning_rate * self.plan.factor(float(spent), self.most)

    # ---- One batch ----

    def _one(self, batch: int) -> Done:
        plan, rate = self.plan, self._rate(batch)
        rows = plan.rows_of(batch)
        judged = [row for row in rows if plan.targets[row]] if plan.dropped is not None else []
        broken = {row for row in rows if self._is_broken(batch, row, 0)}
        dropped = {row for row in judged if row in broken or (batch, row - rows.start) in (plan.dropped or ())}
        numbers: dict[str, Any] = {"rows": len(judged), "rows_dropped": len(dropped), "learning_rate": rate}
        numbers["progress"] = self._progress(batch)

        def skip(loss: float, reason: str) -> Done:
            self.optimizer.zero_grad()
            return Done(loss, 0, (loss,), reason, last_rate=rate, **numbers)

        losses = self._pass(batch, 0, set(rows), set(rows))
        total = sum(plan.targets[row] for row in rows)
        kept = set(rows) - dropped
        there = set(rows)
        if not total:
            self._charge(batch, rows, is_skipped=True)
            return skip(math.nan, "no targets")
        if 2 * len(dropped) > len(judged):
            self._charge(batch, rows, is_skipped=True)
            finite = [row for row in judged if row not in broken]
            targets = sum(plan.targets[row] for row in finite)
            return skip(sum(losses[row] for row in finite) / targets if targets else math.nan, "rows")
        if broken and plan.dropped is None:
            self._charge(batch, rows, is_skipped=True)
            return skip(math.nan, "non-finite")
        number = 0
        if broken:
            self._charge(batch, rows, is_skipped=True)
            numbers["progress"] = self._progress(batch)
            if self.left < 1:
                return skip(math.nan, "no room")
            number, there = 1, there - broken
        first = self._kept_loss(batch, number, there, kept)
        asked = plan.decisions[min(batch, len(plan.decisions) - 1)]
        repeats, reason = (int(self.left), "budget") if asked > self.left else (asked, "scheduler")
        if not math.isfinite(first):
            repeats, reason = 0, "non-finite"
        self._charge(batch, there, is_skipped=repeats == 0)
        if repeats == 0:
            return skip(first, reason)
        made = [first]
        while True:
            self._update(rate)
            if len(made) == repeats:
                break
            if plan.budget is not None:
                rate = self._rate(batch)
            made.append(self._kept_loss(batch, number + len(made), there, kept))
            self._charge(batch, there)
            if not math.isfinite(made[-1]):
                self.optimizer.zero_grad()
                repeats, reason = len(made) - 1, "non-finite"
                break
        return Done(first, repeats, tuple(made), reason, last_rate=rate, **numbers)

    def _progress(self, batch: int) -> float:
        """Return the share of the run that is spent."""
        return float(Fraction(batch if self.plan.budget is None else self.told.counts.passes) / Fraction(self.most))

    def _is_broken(self, batch: int, row: int, number: int) -> bool:
        return (batch, row - self.plan.rows_of(batch).start, number) in self.plan.broken

    def _charge(self, batch: int, there: Any, is_skipped: bool = False) -> None:
        counts, found = (
            self.told.counts,
            [[r for r in part if r in there] for part in self.plan.micro_batches_of(batch)],
        )
        parts, spare = len(found), next(filter(None, found))  # which is passed over where no row is left
        counts.forwards += parts
        counts.backwards += parts - is_skipped
        counts.passes += 1 - (1 - FORWARD) * Fraction(int(is_skipped), parts)
        counts.tokens += LENGTH * sum(len(part or spare) for part in found)

    def _kept_loss(self, batch: int, number: int, there: set[int], kept: set[int]) -> float:
        """Make a pass, leave its gradient, and return the mean loss of the kept rows, per target."""
        losses = self._pass(batch, number, there, kept)
        targets = sum(self.plan.targets[row] for row in kept)
        return sum(losses[row] for row in kept) / targets

    def _pass(self, batch: int, number: int, there: set[int], kept: set[int]) -> dict[int, float]:
        """Make forward and backward over the rows that are there, and return the summed loss of each.

        The gradient is that of the kept rows, divided by the targets of all rows of the batch. It replaces that of an
        earlier pass.
        """
        plan, losses = self.plan, {}
        total = sum(plan.targets[row] for row in plan.rows_of(batch))
        self.optimizer.zero_grad()
        for part in plan.micro_batches_of(batch):
            rows = [row for row in part if row in there]
            if not rows or not total:
                losses |= dict.fromkeys(rows, 0.0)
                continue
            ids = torch.stack([self.data[row]["input_ids"] for row in rows])
            labels = torch.stack([self.data[row]["labels"] for row in rows])
            is_kept = torch.tensor([[row in kept] for row in rows])
            masked = labels.masked_fill(~is_kept, IGNORED)
            output = self.told.model(input_ids=ids, labels=masked, num_items_in_batch=torch.tensor(total))
            output.loss.backward()
            each = torch.nn.functional.cross_entropy(
                output.logits[:, :-1].detach().transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none"
            ).sum(1)
            for row, loss in zip(rows, each.tolist(), strict=True):
                losses[row] = math.nan if self._is_broken(batch, row, number) else loss
        return losses

    def _update(self, rate: float) -> None:
        self.told.rates.append(rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.plan.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.told.model.parameters(), self.plan.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
