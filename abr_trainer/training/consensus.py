"""Numbers summed over ranks: the one place where ranks exchange what rules decide on."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainingArguments

from ..schedulers import ConstantScheduler
from .held import Call
from .loss_scale import LossScale, find_loss_scale, has_own_loss, weighted_loss
from .targets import trainer_counts_targets

Read = Callable[[], list[float]]
"""Waits for the numbers that were asked for, and returns them."""


class Consensus:
    """Sums and means over ranks. All ranks must make the same calls in the same order.

    Attributes:
        loss_scale: How the losses of micro-batches make up the mean per target; None as long as it is not known.
    """

    def __init__(self, args: TrainingArguments, accelerator: Accelerator) -> None:
        self._args = args
        self._accelerator = accelerator
        self.loss_scale: LossScale | None = None

    def begin_sum(self, *scalars: Tensor | float) -> Read:
        """Start to sum numbers over ranks, in rank order.

        Returns:
            A function that waits for the sums: the one place where the host waits for the device.
        """
        device = self._args.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        full = functools.partial(torch.full, (), dtype=dtype, device=device)  # does not wait, as `torch.tensor` would
        row = torch.stack([each.to(device, dtype) if isinstance(each, Tensor) else full(each) for each in scalars])
        rows = self._accelerator.gather(row[None]) if self._args.world_size > 1 else row[None]
        arrived: Any = None
        if device.type == "cuda":
            rows = rows.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()

        def sums() -> list[float]:
            if arrived is not None:
                arrived.synchronize()  # waits for the copy, not for what was launched after it
            return [sum(column) for column in zip(*rows.tolist(), strict=True)]

        return sums

    def begin_mean(self, trainer: Any, calls: list[Call], losses: list[Tensor], *others: Tensor | float) -> Read:
        """Start to average the loss of a pass over ranks.

        Args:
            calls: The micro-batches of this rank.
            losses: What `training_step` returned for each of them.
            others: More numbers of this rank.

        Returns:
            A function that waits for the mean loss per target of the pass, and the sum of each other number.
        """
        inputs, items = [call.inputs for call in calls], calls[0].items_in_batch
        loss, weight = weighted_loss(trainer, self.loss_scale, losses, inputs, items)
        read = self.begin_sum(loss, weight, *others)

        def mean_and_sums() -> list[float]:
            total, weights, *sums = read()
            return [total / weights if weights else math.nan, *sums]

        return mean_and_sums

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
