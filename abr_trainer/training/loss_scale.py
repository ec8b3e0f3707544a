"""What the losses mean that `training_step` returns: stock Trainer scales them differently from model to model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from .held import Call
from .targets import count_targets, first_target, label_use, trainer_counts_targets


@dataclass(frozen=True)
class LossScale:
    """How the losses of micro-batches make up the mean loss per target.

    Attributes:
        adds_up: Each loss is a share of the batch's mean, divided by all targets of the batch: their sum is the mean.
        factor: Otherwise each is the mean over its own micro-batch, times this.
    """

    adds_up: bool
    factor: float = 1.0


def has_own_loss(trainer: Any) -> bool:
    """Tell whether the loss is computed by somebody else's code, not by Trainer and the model."""
    return has_own_compute_loss(trainer) or trainer.compute_loss_func is not None


def has_own_compute_loss(trainer: Any) -> bool:
    """Tell whether `compute_loss` is not Trainer's, which makes one forward."""
    return type(trainer).compute_loss is not Trainer.compute_loss or "compute_loss" in vars(trainer)


def declares_scaled(trainer: Any) -> bool | None:
    """Return what the trainer's class declares, where this version of transformers asks it."""
    return trainer.loss_is_scaled_for_ga if hasattr(Trainer, "loss_is_scaled_for_ga") else None


def is_divided(trainer: Any, items: Any) -> bool:
    """Tell whether Trainer divides each loss by the number of micro-batches, before its backward."""
    declared = declares_scaled(trainer)
    if declared is not None:
        return not declared
    return not (trainer.model_accepts_loss_kwargs and items is not None) and trainer.compute_loss_func is None


def find_loss_scale(
    trainer: Any, model: Any, inputs: Any, items: Any, begin_sum: Callable[..., Callable[[], list[float]]] | None
) -> LossScale | None:
    """Return how losses are scaled; where that is not known, find out by telling `compute_loss` other target counts.

    That costs at most three forwards over one micro-batch, without dropout, and leaves torch's random state as it was.
    All ranks make the same calls and come to the same result.

    Args:
        inputs: A micro-batch.
        items: The number of targets in its batch, as Trainer passes it on; None where it counts none.
        begin_sum: Starts to sum numbers over ranks, and returns what waits for the sums. None forbids to find out.

    Returns:
        None where it is not known: no rank can tell by its micro-batch, because its loss is 0 or not finite.
    """
    if declares_scaled(trainer):
        return LossScale(adds_up=True)
    if items is None:
        return LossScale(adds_up=False)
    if not has_own_loss(trainer) and (label_use(trainer).calls_causal_loss or trainer.label_smoother is not None):
        return LossScale(adds_up=True)
    is_whole = trainer.args.world_size * trainer.args.gradient_accumulation_steps == 1
    if is_whole and trainer_counts_targets(trainer):
        return LossScale(adds_up=False)
    if begin_sum is None:
        return None

    device = trainer.args.device

    @torch.no_grad()
    def loss(number: Any) -> float:
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            prepared = trainer._prepare_inputs(copy.copy(inputs))
            return float(trainer.compute_loss(model, prepared, num_items_in_batch=number).mean())

    model.eval()
    told, doubled = loss(items), loss(items * 2)
    can_tell = told != 0 and math.isfinite(told) and math.isfinite(doubled)
    adds_up = can_tell and abs(told - doubled) > 1e-3 * abs(told)
    those_that_add_up, those_that_do_not = begin_sum(adds_up, can_tell and not adds_up)()
    if those_that_add_up or not those_that_do_not:
        return LossScale(adds_up=True) if those_that_add_up else None
    own = loss(None)
    (factors,) = begin_sum(told / own if can_tell else 0.0)()
    return LossScale(adds_up=False, factor=factors / those_that_do_not)


def weighted_loss(
    trainer: Any, scale: LossScale | None, losses: list[Tensor], calls: list[Call], items: Any
) -> tuple[Tensor, Tensor | int]:
    """Return the mean loss per target of this rank's micro-batches, times its weight in the mean over ranks, and that.

    Args:
        scale: None where it is not known: then the loss is what Trainer logs.
        losses: What `training_step` returned for each micro-batch.
        items: The number of targets in the batch, as Trainer passes it on.
    """
    means = torch.stack(losses)
    is_miscounted = scale is not None and scale.adds_up and items is not None and not trainer_counts_targets(trainer)
    if scale is None or (trainer.args.world_size * len(losses) == 1 and not is_miscounted):
        return means.sum(), 1
    if is_divided(trainer, items):
        means = means * len(losses)
    is_mean_of_all = trainer.args.average_tokens_across_devices or trainer.args.world_size == 1
    if scale.adds_up and not is_miscounted:
        return (means.sum(), 1) if items is None or is_mean_of_all else (means.sum() * items, items)
    first = first_target(trainer)
    counts = [call.kept.targets if call.kept else count_targets(call.inputs, first) for call in calls]
    targets = torch.stack([torch.as_tensor(count, device=means.device) for count in counts])
    if is_miscounted:
        share = trainer.args.world_size if is_mean_of_all else 1  # Trainer multiplies by the ranks that DDP averages
        return means.sum() * items / share, targets.sum()
    return (means * targets).sum() / scale.factor, targets.sum()
