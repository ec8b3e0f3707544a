"""What the losses mean that `training_step` returns: stock Trainer scales them differently from model to model."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from .perplexity import IGNORE_INDEX


@dataclass(frozen=True)
class LossScale:
    """How the losses of micro-batches make up the mean loss per target.

    Attributes:
        adds_up: Each loss is a share of the batch's mean, divided by all targets of the batch: their sum is the mean.
        factor: Otherwise each is the mean over its own micro-batch, times this.
    """

    adds_up: bool
    factor: float = 1.0


def known_loss_scale(trainer: Any) -> LossScale | None:
    """Return the scale where it needs no measurement: under Trainer's own `compute_loss`, where the number of targets
    reaches no loss at all, or surely the loss of a causal language model. None elsewhere.
    """
    if getattr(trainer, "loss_is_scaled_for_ga", None):
        return LossScale(adds_up=True)
    if type(trainer).compute_loss is not Trainer.compute_loss or trainer.compute_loss_func is not None:
        return None
    if not trainer.model_accepts_loss_kwargs:
        return LossScale(adds_up=False)
    return LossScale(adds_up=True) if trainer._loss_shifts_labels or trainer.label_smoother is not None else None


def measure_loss_scale(trainer: Any, model: Any, inputs: Any, items: Any) -> LossScale | None:
    """Find out what `compute_loss` does with the number of targets in the batch, by telling it others.

    Costs at most three forwards over one micro-batch, without dropout, and leaves the random state as it was.

    Args:
        inputs: A micro-batch.
        items: The number of targets in its batch, as Trainer passes it on.

    Returns:
        None where this micro-batch cannot tell, because its loss is 0 or not finite.
    """

    def loss(number: Any) -> float:
        prepared = trainer._prepare_inputs(copy.copy(inputs))
        return float(trainer.compute_loss(model, prepared, num_items_in_batch=number).mean())

    device = trainer.args.device
    with torch.no_grad(), torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        model.eval()
        told, doubled = loss(items), loss(items * 2)
        if told == 0 or not math.isfinite(told):
            return None
        if abs(told - doubled) > 1e-3 * abs(told):
            return LossScale(adds_up=True)
        return LossScale(adds_up=False, factor=told / loss(None))


def count_targets(inputs: Any, shifted: bool) -> Tensor | int:
    """Return the number of targets in a micro-batch; 1 where it names none.

    Args:
        shifted: Labels are those of the tokens themselves, so that the first in each row is never a target.
    """
    labels = inputs.get("shift_labels", inputs.get("labels")) if hasattr(inputs, "get") else None
    if not isinstance(labels, Tensor):
        return 1
    if shifted and "shift_labels" not in inputs:
        labels = labels[..., 1:]
    return labels.ne(IGNORE_INDEX).sum()
