"""Which rows of a run are dropped: a row rule asked batch by batch, on each rank about its own rows."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.identity import UNKNOWN
from ..perplexity.windows import IGNORE_INDEX
from ..schedulers import Row, RowRule
from ..schedulers.base import BadDecision
from .dropped_rows import DroppedRow, tokens_of_rows
from .held import Call
from .ranking import RowRanking
from .row_losses import of_rows, owners_of
from .row_seams import NO_LOGITS, RowsUnsupported, Seam, find_seam
from .rows import Judged, KeptRows, Sieve


@dataclass(frozen=True)
class BatchRows:
    """The rows of a batch, over all ranks, by position.

    Attributes:
        losses: Mean loss per target of the first pass, in nats; not finite where the row is broken.
        targets: 0 where there is no such row, or nothing to judge it by.
        keep: Whether it is trained on.
        indices: In the training set, or `UNKNOWN`.
        micro_batches: The number of its micro-batch, over all ranks.
        of_a_rank: Positions that each rank has.
    """

    losses: list[float]
    targets: list[int]
    keep: list[bool]
    indices: list[int]
    micro_batches: list[int]
    of_a_rank: int

    @functools.cached_property
    def judged(self) -> list[int]:
        return [i for i, targets in enumerate(self.targets) if targets]

    @functools.cached_property
    def dropped(self) -> list[int]:
        return [i for i in self.judged if not self.keep[i]]

    @property
    def has_broken(self) -> bool:
        return any(not math.isfinite(self.losses[i]) for i in self.judged)

    @property
    def most_are_dropped(self) -> bool:
        return 2 * len(self.dropped) > len(self.judged)

    @property
    def share(self) -> float:
        """Targets of the kept rows, as a share of all."""
        total = sum(self.targets)
        return sum(self.targets[i] for i in self.judged if self.keep[i]) / total if total else 1.0

    @property
    def mean_loss(self) -> float:
        """Mean loss per target of all rows that have a finite one, dropped or not; NaN if there are none."""
        finite = [i for i in self.judged if math.isfinite(self.losses[i])]
        targets = sum(self.targets[i] for i in finite)
        return sum(self.losses[i] * self.targets[i] for i in finite) / targets if targets else math.nan


class RowGate:
    """Asks the rule about the rows of each micro-batch while its first pass goes on.

    Attributes:
        rule: Decides; None if rows are only looked at.
        judged: The rows of this batch on this rank, by micro-batch.
        indices: Of these rows in the training set, or `UNKNOWN`.
        ranking: Of all rows; None if nobody asks for it.
        longest: The most rows that a rank has in a batch, but where documents are packed into rows.
    """

    def __init__(
        self, rule: RowRule | None, seam: Seam, rank: int, ranks: int, longest: int, ranking: RowRanking | None = None
    ) -> None:
        self.rule = rule
        self.ranking = ranking
        self.judged: list[Judged] = []
        self.indices: list[int] = []
        self.longest = longest
        self._judges: list[RowRule | None] = []
        self._seam = seam
        self._rank, self._ranks = rank, ranks
        self._batch = 0
        self._asks = True

    def begin(self, batch: int, asks: bool) -> None:
        """Begin a batch.

        Args:
            batch: Its index.
            asks: Whether to ask the rule; if not, only rows whose loss is not finite are dropped.
        """
        self.judged, self._judges = [], []
        self._batch, self._asks = batch, asks

    def watching(self, trainer: Any, model: Any, call: Call, judges: bool) -> AbstractContextManager[Any]:
        """Return a context in which the loss of a micro-batch is that of the rows that are kept.

        Args:
            judges: Whether this is its first pass: then the rule is asked.
        """
        if not judges and (call.kept is None or call.kept.are_all):
            return contextlib.nullcontext()
        sieve = Sieve(self._judge, None if judges else call.kept)
        return self._seam.open(trainer, model, call, sieve)

    def counting(self, call: Call, judges: bool) -> Callable[[Tensor], Tensor]:
        """Return what masks the labels of dropped rows, once a forward has shown which these are.

        Under label smoothing that is only known after the first forward: then all rows count.
        """
        judged = len(self.judged)

        def masked(labels: Tensor) -> Tensor:
            keep = call.kept.keep if call.kept is not None else []
            if judges:
                keep = self.judged[judged].keep if len(self.judged) > judged else []
            if not keep or all(keep):
                return labels
            owners = owners_of(call.inputs, labels)
            return labels.masked_fill(~of_rows(keep, owners, labels), IGNORE_INDEX)

        return masked

    def _judge(self, losses: Sequence[float], targets: Sequence[int], are_documents: bool) -> Judged:
        first = self._rank * self.longest + sum(len(each.losses) for each in self.judged)
        pairs = zip(losses, targets, strict=True)
        number = self._over_all_ranks(len(self.judged))
        rows = [Row(loss, count, self._batch, first + i, number) for i, (loss, count) in enumerate(pairs)]
        judge = None
        if self.rule is not None and self._asks:
            judge = self.rule.beside([row for row in rows if row.targets and math.isfinite(row.loss)])
        self._judges.append(judge)
        judged = Judged(list(losses), list(targets), [self._keeps(judge, row) for row in rows], are_documents)
        self.judged.append(judged)
        return judged

    def _over_all_ranks(self, micro_batch: int) -> int:
        """Return the number of a micro-batch of this rank among those of the batch."""
        return micro_batch * self._ranks + self._rank

    def _keeps(self, judge: RowRule | None, row: Row) -> bool:
        if not row.targets or self.rule is None:
            return True
        if judge is None or not math.isfinite(row.loss):
            return math.isfinite(row.loss)
        keeps = judge.decide(row)
        if not isinstance(keeps, bool | np.bool_):
            raise BadDecision(self.rule, "decide", keeps, "True to train on the row, or False to drop it")
        return bool(keeps)

    def check_judged(self, trainer: Any, calls: Sequence[Call]) -> None:
        """Check that the losses of all rows were seen.

        Raises:
            RowsUnsupported: They were not.
        """
        if len(self.judged) != len(calls):
            inputs = calls[0].inputs
            if not isinstance(inputs, Mapping) or "labels" not in inputs:
                raise RowsUnsupported(trainer, 'the batches have no "labels"')
            raise RowsUnsupported(trainer, *NO_LOGITS)

    def lists(self, indices: Sequence[Tensor | None]) -> list[list[float]]:
        """Return what ranks tell each other of their rows: losses, targets, whether they are kept, indices, and the
        number of their micro-batch.

        Args:
            indices: Of the rows of each micro-batch in the training set, where they are known.
        """
        self.indices = []
        for known, of in zip(indices, self.judged, strict=True):
            fits = known is not None and len(known) == len(of.losses)
            self.indices += known.tolist() if known is not None and fits else [UNKNOWN] * len(of.losses)
        losses, targets, keep = (
            [float(value) for each in self.judged for value in getattr(each, name)]
            for name in ("losses", "targets", "keep")
        )
        numbers = [float(self._over_all_ranks(i)) for i, each in enumerate(self.judged) for _ in each.losses]
        return [losses, targets, keep, [float(index) for index in self.indices], numbers]

    def describe_dropped(self, calls: Sequence[Call], rows: BatchRows) -> list[DroppedRow]:
        """Return the dropped rows of this rank.

        Args:
            calls: Its micro-batches as they arrived.
            rows: Those of all ranks.
        """
        dropped: list[DroppedRow] = []
        first, number = self._rank * rows.of_a_rank, 0
        parts = zip(calls, self.judged, self._judges, strict=True)
        for micro_batch, (call, judged, judge) in enumerate(parts):
            tokens = [] if all(judged.keep) else tokens_of_rows(call.inputs, len(judged.keep))
            for i, (loss, targets, keep) in enumerate(zip(judged.losses, judged.targets, judged.keep, strict=True)):
                if not keep:
                    row = Row(loss, targets, self._batch, first + number, self._over_all_ranks(micro_batch))
                    limit = judge.evidence(row).get("limit") if judge is not None and math.isfinite(loss) else None
                    dropped.append(DroppedRow(row.position, self.indices[number], loss, limit, targets, tokens[i]))
                number += 1
        return dropped

    def observe(self, rows: BatchRows) -> None:
        """Show the rows of a finished batch to the rule and the ranking."""
        if self.ranking is not None:
            judged = rows.judged
            columns = ([column[i] for i in judged] for column in (rows.indices, rows.losses, rows.targets))
            indices, losses, targets = map(np.asarray, columns)
            self.ranking.note(self._batch + 1, indices, losses, targets)
        if self.rule is None:
            return
        finite = [i for i in rows.judged if math.isfinite(rows.losses[i])]
        seen = [Row(rows.losses[i], rows.targets[i], self._batch, i, rows.micro_batches[i]) for i in finite]
        self.rule.observe(seen, [rows.keep[i] for i in finite])


def row_gate(trainer: Any, rule: RowRule | None) -> RowGate:
    """Return what asks a rule about the rows of a trainer.

    Raises:
        RowsUnsupported: No rows can be dropped there.
    """
    args = trainer.args
    ranking = RowRanking.of(trainer)
    longest = trainer._train_batch_size * args.gradient_accumulation_steps
    return RowGate(rule, find_seam(trainer), args.process_index, args.world_size, longest, ranking)


def batch_rows(lists: list[list[float]], ranks: int) -> BatchRows:
    """Return the rows of a batch from what all ranks have told of theirs."""
    losses, targets, keep, indices, numbers = lists
    counts, flags = [int(n) for n in targets], [bool(k) for k in keep]
    places = [int(i) for i in indices]
    return BatchRows(losses, counts, flags, places, [int(number) for number in numbers], len(losses) // ranks)


def without_broken(calls: Sequence[Call], judged: Sequence[Judged]) -> list[Call] | None:
    """Return the micro-batches of this rank without their broken rows, which would poison the gradient of the others.

    A micro-batch that has no other row is replaced by one that has, of which no row counts.

    Returns:
        None where that is impossible: no row is left, or rows cannot be told apart in the inputs.
    """
    cured = [_cured(call, of) for call, of in zip(calls, judged, strict=True)]
    spare = next((call for call in cured if call is not None and call.kept is not None), None)
    whole: list[Call] = []
    for call, before, of in zip(cured, calls, judged, strict=True):
        if call is None:
            if spare is None or spare.kept is None or of.are_documents or not all(of.broken):
                return None
            nothing = KeptRows([False] * len(spare.kept.keep), 0.0, sum(of.targets))
            call = before._replace(inputs=spare.inputs, kept=nothing)
        whole.append(call)
    return whole


def _cured(call: Call, judged: Judged) -> Call | None:
    kept, stay = judged.kept(), [not broken for broken in judged.broken]
    if kept is None or all(stay):
        return call._replace(kept=kept)
    if judged.are_documents or not any(stay) or not isinstance(call.inputs, Mapping):
        return None
    inputs = {}
    for name, value in call.inputs.items():
        if isinstance(value, Tensor) and value.dim():
            if len(value) != len(stay):
                return None
            value = value[torch.tensor(stay, device=value.device)]
        elif isinstance(value, list | tuple) and len(value) == len(stay):
            value = [each for each, stays in zip(value, stay, strict=True) if stays]
        inputs[name] = value
    keep = [keep for keep, stays in zip(judged.keep, stay, strict=True) if stays]
    return call._replace(inputs=inputs, kept=kept._replace(keep=keep))
