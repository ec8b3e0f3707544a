"""Numbers summed over ranks: the one place where ranks exchange what rules decide on."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainingArguments

from ..schedulers import ConstantScheduler
from .budget import Budget
from .held import Call
from .loss_scale import LossScale, find_loss_scale, has_own_loss, weighted_loss
from .targets import trainer_counts_targets

Read = Callable[[], list[float]]
"""Waits for the numbers that were asked for, and returns them."""


class Agreed(NamedTuple):
    """What all ranks know of a pass.

    Attributes:
        mean: Mean loss per target.
        sums: Of the other numbers.
        greatest: The greatest of each number that was asked for so, over ranks.
        lists: Each list, of all ranks in rank order. Of several ranks, each is filled up with zeros to one length.
    """

    mean: float
    sums: list[float]
    greatest: list[float]
    lists: list[list[float]]


class Consensus:
    """Sums and means over ranks. All ranks must make the same calls in the same order.

    Args:
        budget: What the run may spend. Each mean brings its seconds up to date, if these are bounded.

    Attributes:
        loss_scale: How the losses of micro-batches make up the mean per target; None as long as it is not known.
    """

    def __init__(self, args: TrainingArguments, accelerator: Accelerator, budget: Budget) -> None:
        self._args = args
        self._budget = budget
        self._accelerator = accelerator
        self.loss_scale: LossScale | None = None

    def begin_sum(self, *scalars: Tensor | float) -> Read:
        """Start to sum numbers over ranks, in rank order.

        Returns:
            A function that waits for the sums: the one place where the host waits for the device.
        """
        read = self._begin_gather(scalars)
        return lambda: [sum(column) for column in zip(*read(), strict=True)]

    def each(self, number: int) -> list[int]:
        """Return a whole number of each rank, in rank order."""
        return [int(row[0]) for row in self._begin_gather([float(number)])()]

    def refuse_different_lengths(self, batches: int) -> None:
        """Refuse training sets of which ranks expect different numbers of batches: some would wait for the others.

        Raises:
            ValueError: They do, on all ranks.
        """
        if len(set(expected := self.each(batches))) > 1:
            raise ValueError(
                f"The ranks would train on {', '.join(map(str, expected))} batches, which must be as many on each. "
                "Give each rank as many rows, or set --max_steps to the least of them."
            )

    def begin_mean(
        self,
        trainer: Any,
        calls: list[Call],
        losses: list[Tensor],
        *others: Tensor | float,
        greatest: Sequence[float] = (),
        lists: Sequence[Sequence[float]] = (),
        longest: int = 0,
    ) -> Callable[[], Agreed]:
        """Start to average the loss of a pass over ranks.

        Args:
            calls: The micro-batches of this rank.
            losses: What `training_step` returned for each of them.
            others: More numbers of this rank, to be summed.
            greatest: Numbers of this rank of which the greatest counts.
            lists: Lists of numbers of this rank: as many lists on each rank, and of one length on a rank.
            longest: So long a list travels with the others. If a rank has a longer one, all ranks exchange once more.

        Returns:
            A function that waits for what all ranks have given.
        """
        loss, weight = weighted_loss(trainer, self.loss_scale, losses, calls, calls[0].items_in_batch)
        length = len(lists[0]) if lists else 0
        seconds = self._budget.measured(trainer._batch)
        signals = () if trainer._preemption is None else trainer._preemption.measured()
        largest = (*greatest, *seconds, *signals)
        scalars = (loss, weight, *others, *largest, length)
        end = len(scalars) - 1 - len(largest)
        read = self._begin_gather(scalars, _padded(lists, longest) if self._args.world_size > 1 else ())

        def agreed() -> Agreed:
            of_ranks = read()
            total, weights, *sums = (sum(row[i] for row in of_ranks) for i in range(end))
            most = [max(row[i] for row in of_ranks) for i in range(end, end + len(largest))]
            most, others = most[: len(greatest)], most[len(greatest) :]
            self._budget.agree(others[: len(seconds)])
            if signals:
                trainer._preemption.agree(others[-1])
            mean = total / weights if weights else math.nan
            if self._args.world_size == 1:
                return Agreed(mean, sums, most, [list(each) for each in lists])
            size, padded = longest, [row[len(scalars) :] for row in of_ranks]
            if (needed := int(max(row[len(scalars) - 1] for row in of_ranks))) > longest:
                size, padded = needed, self._begin_gather((), _padded(lists, needed))()
            joined = [[n for row in padded for n in row[i * size : (i + 1) * size]] for i in range(len(lists))]
            return Agreed(mean, sums, most, joined)

        return agreed

    def _begin_gather(
        self, scalars: Sequence[Tensor | float], numbers: Sequence[float] = ()
    ) -> Callable[[], list[list[float]]]:
        """Start to exchange numbers, as many on each rank; return a function that waits for those of all ranks."""
        device = self._args.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        full = functools.partial(torch.full, (), dtype=dtype, device=device)  # does not wait, as `torch.tensor` would
        parts = [each.to(device, dtype) if isinstance(each, Tensor) else full(each) for each in scalars]
        row = torch.stack(parts) if parts else torch.empty(0, dtype=dtype, device=device)
        if numbers:
            row = torch.cat([row, torch.tensor(numbers, dtype=dtype, device=device)])
        rows = self._accelerator.gather(row[None]) if self._args.world_size > 1 else row[None]
        arrived: Any = None
        if device.type == "cuda":
            rows = rows.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()

        def of_ranks() -> list[list[float]]:
            if arrived is not None:
                arrived.synchronize()  # waits for the copy, not for what was launched after it
            each: list[list[float]] = rows.tolist()
            return each

        return of_ranks

    def find_loss_scale(self, trainer: Any, model: nn.Module, call: Call) -> None:
        """Find out what the losses of this run mean, by a micro-batch."""
        # A baseline is plain training and needs no exact loss. A custom `compute_loss` may count its calls.
        rule = trainer.repeat_scheduler
        is_baseline = isinstance(rule, ConstantScheduler) and rule.repeats == 1
        is_right = trainer_counts_targets(trainer) or not trainer._loss_is_of_tokens
        begin_sum = None if is_baseline and has_own_loss(trainer) and is_right else self.begin_sum
        self.loss_scale = find_loss_scale(trainer, model, call.inputs, call.items_in_batch, begin_sum)

    def gather_lists(self, items: list[Any]) -> list[Any]:
        """Return the items of all ranks, in rank order."""
        gathered: list[Any] = gather_object(items) if self._args.world_size > 1 else items
        return gathered


def _padded(lists: Sequence[Sequence[float]], size: int) -> list[float]:
    """Return the first `size` numbers of each list, one after the other, filled up with zeros."""
    return [number for each in lists for number in (*each[:size], *[0.0] * (size - len(each)))]
