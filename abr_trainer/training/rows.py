"""Which rows of a micro-batch count, and which rows a seam to its loss shall keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Judge = Callable[[Sequence[float], Sequence[int], bool], "Judged"]
"""Decides on rows, by their mean losses per target, their numbers of targets, and whether they are documents of one
row of a tensor.
"""


class KeptRows(NamedTuple):
    """Which rows of a micro-batch are trained on, in all passes over it.

    Attributes:
        keep: For each row of its inputs.
        share: Targets of these rows, as a share of all targets that the micro-batch came with.
        targets: All targets that it came with.
    """

    keep: list[bool]
    share: float
    targets: int

    @property
    def are_all(self) -> bool:
        """Whether they are all rows that the micro-batch came with, broken ones that were taken out among them."""
        return all(self.keep) and self.share == 1.0


@dataclass
class Judged:
    """The rows of a micro-batch as they came, after the first pass.

    Attributes:
        losses: Mean loss per target, in nats; NaN for a row without targets.
        targets: Their numbers of targets.
        keep: Whether they are trained on.
        are_documents: Several of them lie in one row of a tensor.
    """

    losses: list[float]
    targets: list[int]
    keep: list[bool]
    are_documents: bool

    @property
    def broken(self) -> list[bool]:
        """Which rows have a loss that is not finite: masked or not, their activations poison every gradient."""
        pairs = zip(self.losses, self.targets, strict=True)
        return [targets > 0 and not math.isfinite(loss) for loss, targets in pairs]

    def kept(self) -> KeptRows | None:
        """Return what all passes over the micro-batch shall keep; None if nothing was judged."""
        if not self.losses:
            return None
        of_kept = sum(targets for targets, keep in zip(self.targets, self.keep, strict=True) if keep)
        total = sum(self.targets)
        return KeptRows(self.keep, of_kept / total if total else 1.0, total)


class Sieve:
    """Keeps some rows of one micro-batch: those that it is told, or those that are decided on when they are seen."""

    def __init__(self, judge: Judge, kept: KeptRows | None = None) -> None:
        self._judge = judge
        self._kept = kept

    def sift(self, by_row: Callable[[], tuple[Tensor, Tensor]], are_documents: bool = False) -> KeptRows | None:
        """Return which rows count; None if all do.

        Args:
            by_row: Returns the loss of each row, summed over its targets, and the number of its targets.
            are_documents: Several rows lie in one row of a tensor.
        """
        if self._kept is None:
            totals, numbers = by_row()
            sums, targets = torch.stack([totals, numbers.to(totals.dtype)]).tolist()
            counts = [int(count) for count in targets]
            means = [total / count if count else math.nan for total, count in zip(sums, counts, strict=True)]
            self._kept = self._judge(means, counts, are_documents).kept()
        return None if self._kept is None or self._kept.are_all else self._kept

    def cannot_tell(self) -> None:
        """Note that this micro-batch does not tell what its rows lose."""
        self._judge([], [], False)
