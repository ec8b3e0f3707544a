"""Which labels a loss counts: the targets of a batch."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..models.unwrapping import without_adapter
from ..perplexity.windows import IGNORE_INDEX

CAUSAL_MODELS = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


# ---- What the model does with labels ----


def unwrapped(trainer: Any) -> Any:
    """Return the model of a trainer, out of what accelerate and torch.compile put around it, its adapter included."""
    return trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)


def base_model(trainer: Any) -> Any:
    base = without_adapter(unwrapped(trainer))
    return getattr(base, "_orig_mod", base)  # compiled before the adapter was put around it


def is_causal_model(model: Any) -> bool:
    """Tell whether transformers lists the class of a model, or one of its bases, as a causal language model."""
    return any(base.__name__ in CAUSAL_MODELS for base in type(model).__mro__)


def forward_with_loss(model: Any) -> Any:
    """Return the forward that makes the loss: one that calls that of its base class leaves it to the base class."""
    found: Any = None
    for base in type(model).__mro__:
        if "forward" in vars(base):
            found = inspect.unwrap(vars(base)["forward"])
            if "super" not in names_in(found):
                return found
    return found


def names_in(function: Any) -> tuple[str, ...]:
    names: tuple[str, ...] = getattr(getattr(function, "__code__", None), "co_names", ())
    return names


@dataclass(frozen=True)
class LabelUse:
    """What a model does with labels.

    Attributes:
        calls_causal_loss: It calls the causal loss of transformers, which shifts labels and takes their number.
            Trainer goes by the name of the class instead. That leaves out GPT-2 and others, whose name says nothing,
            and includes decoders such as Bart's, whose loss takes labels as they are.
        shifts: Its loss is that of a causal language model: the output at a position is compared with the label of the
            next. A model from outside transformers that computes its loss itself is taken for what Trainer takes it
            for.
        first: Position of the first label in a row that can be a target. It is 1 where labels are shifted: nothing
            predicts the first token. But virtual tokens before it do.
    """

    calls_causal_loss: bool
    shifts: bool
    first: int


def label_use(trainer: Any) -> LabelUse:
    """Return what the model of a trainer does with labels. Looking takes milliseconds, and is done once a model."""
    known = vars(trainer).get("_label_use")
    if known is None or known[0]() is not trainer.model:
        known = trainer._label_use = weakref.ref(trainer.model), _look(trainer)
    use: LabelUse = known[1]
    return use


def unsloth_counts_targets() -> bool:
    """Tell whether Unsloth has put its own count of targets into Trainer, and its losses into models."""
    return getattr(Trainer.get_batch_samples, "__name__", "") == "_unsloth_get_batch_samples"


def _look(trainer: Any) -> LabelUse:
    model, by_name = base_model(trainer), bool(trainer._loss_shifts_labels)
    forward = forward_with_loss(model)
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    is_causal = is_causal_model(model) and not is_encoder_decoder
    by_name = by_name or (is_causal and unsloth_counts_targets())
    if "loss_function" in names_in(forward):
        calls_causal_loss = shifts = by_name or (is_causal and model.loss_function is ForCausalLMLoss)
    else:
        calls_causal_loss = False
        shifts = by_name and not (getattr(forward, "__module__", None) or "").startswith("transformers.")
    return LabelUse(calls_causal_loss, shifts, first=int(shifts and not _prepends_tokens(unwrapped(trainer))))


def _prepends_tokens(model: Any) -> bool:
    """Tell whether an adapter puts virtual tokens before those of the text."""
    adapter = getattr(model, "active_peft_config", None)
    is_of_cache = getattr(adapter, "peft_type", None) in ("PREFIX_TUNING", "CARTRIDGE")
    return bool(getattr(adapter, "is_prompt_learning", False)) and not is_of_cache


def shifts_labels(trainer: Any) -> bool:
    return label_use(trainer).shifts


def first_target(trainer: Any) -> int:
    return label_use(trainer).first


def trainer_counts_targets(trainer: Any) -> bool:
    """Tell whether the number of labels by which Trainer divides the loss is that of the targets."""
    return unsloth_counts_targets() or first_target(trainer) == int(trainer._loss_shifts_labels)


# ---- The targets of a micro-batch ----


def count_targets(inputs: Any, first: int) -> Tensor | int:
    """Return the number of targets in a micro-batch; 1 where it names none.

    Args:
        first: Position of the first label in a row that can be a target.
    """
    counted = _counted(inputs, first)
    return 1 if counted is None else counted.sum()


def tally(
    micro_batches: Sequence[Any], first: int, label_names: Sequence[str]
) -> tuple[Tensor | int, Tensor | int, int]:
    """Return the targets of these micro-batches, their rows without any, and their rows.

    Args:
        first: Position of the first label in a row that can be a target.
        label_names: What labels are called. Others than `labels` are taken for a target, whatever they say.
    """
    targets: Tensor | int = 0
    empty: Tensor | int = 0
    rows = 0
    for inputs in micro_batches:
        counted = _counted(inputs, first)
        if counted is None or not counted.dim() or any(name in inputs for name in label_names if name != "labels"):
            targets = targets + 1
        else:
            of_rows = counted[:, None].flatten(1).sum(1)
            targets = targets + of_rows.sum()
            empty = empty + of_rows.eq(0).sum()
            rows += len(counted)
    return targets, empty, rows


def _counted(inputs: Any, first: int) -> Tensor | None:
    """Return which labels of a micro-batch are targets; None where it has no labels by that name."""
    if not isinstance(inputs, Mapping):
        return None
    labels = inputs.get("shift_labels", inputs.get("labels"))
    if not isinstance(labels, Tensor):
        return None
    if first and labels.dim() and "shift_labels" not in inputs:
        labels = labels[..., first:]
    return torch.ones_like(labels, dtype=torch.bool) if labels.is_floating_point() else labels.ne(IGNORE_INDEX)
