"""What a rule may want to know of a pass beside its loss: how many target tokens it predicted right, and the norm of
its gradient.

Neither costs a forward or a backward: the one is read off the logits, the other off the gradients that are there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..perplexity.windows import IGNORE_INDEX

Hits = tuple[Tensor, Tensor]
"""Target tokens predicted right, and target tokens, of one micro-batch."""


@contextlib.contextmanager
def counting_hits(model: nn.Module, inputs: Any, shifts_labels: bool, hits: list[Hits]) -> Iterator[None]:
    """Add the hits of each forward of `model` in this context to `hits`; nothing where they cannot be seen.

    That is where there are no labels, or the model returns no logits for each of them, as with a fused loss.

    Args:
        inputs: The micro-batch, with `labels` of shape (rows, length), or with `shift_labels`.
        shifts_labels: The logits at a position predict the label of the next one.
    """
    is_mapping = isinstance(inputs, Mapping)
    shifted = is_mapping and "shift_labels" in inputs
    labels = inputs.get("shift_labels" if shifted else "labels") if is_mapping else None

    def count(_module: Any, _args: Any, output: Any) -> None:
        logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        if not isinstance(labels, Tensor) or not isinstance(logits, Tensor) or logits.shape[:-1] != labels.shape:
            return
        predicted, targets = logits.detach().argmax(dim=-1), labels.to(logits.device)
        if shifts_labels and not shifted:
            predicted, targets = predicted[..., :-1], targets[..., 1:]
        counted = targets != IGNORE_INDEX
        hits.append((((predicted == targets) & counted).sum(), counted.sum()))

    handle = model.register_forward_hook(count)
    try:
        yield
    finally:
        handle.remove()


def summed(hits: list[Hits]) -> list[Tensor]:
    """Return the sums over micro-batches, two numbers; none where nothing was counted."""
    return [sum(counts[1:], start=counts[0]) for counts in zip(*hits, strict=True)]


def accuracy_of(right: float, targets: float) -> float | None:
    """Return the share of targets predicted right, or None if there are none.

    >>> accuracy_of(3, 4)
    0.75
    """
    return right / targets if targets else None


def gradient_norm(model: nn.Module) -> Tensor:
    """Return the 2-norm of all gradients of the model, before clipping; times the loss scale if there is a scaler.

    Sharded gradients (FSDP2) are summed over ranks.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
