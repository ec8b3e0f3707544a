"""What a rule may want to know of a pass beside its loss: how many target tokens it predicted right, and the norm of
its gradient.

Neither costs a forward or a backward: the one is read from what the model returns, the other from the gradients that
are there. Where the accuracy cannot be read, a rule that wants it is refused before the first update.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..perplexity.windows import IGNORE_INDEX
from .targets import LabelUse

Hits = tuple[Tensor, Tensor]
"""Target tokens predicted right, and target tokens, of one micro-batch."""


class NoAccuracy(ValueError):
    """The token accuracy that a rule wants cannot be seen; the message says why, and what to do."""


@contextlib.contextmanager
def watching(model: nn.Module, look: Callable[[Any, Mapping[str, Any]], Any]) -> Iterator[None]:
    """Call `look` with the output of each forward of `model` in this context, and what it was given by name.

    What `look` returns takes the place of the output, if it is not None.
    """
    compiled = getattr(model, "_compiled_call_impl", None)
    if compiled is None:
        handle = model.register_forward_hook(lambda _, __, given, output: look(output, given), with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
        return

    # `model.compile()` compiles hooks too, those of its first call for good: so we look at what the call returns.
    def call(*args: Any, **kwargs: Any) -> Any:
        output = compiled(*args, **kwargs)
        replaced = look(output, kwargs)
        return output if replaced is None else replaced

    model._compiled_call_impl = call
    try:
        yield
    finally:
        model._compiled_call_impl = compiled


@contextlib.contextmanager
def counting_hits(
    model: nn.Module, inputs: Any, use: LabelUse, hits: list[Hits], counts: Callable[[Tensor], Tensor] | None = None
) -> Iterator[Callable[[Any], bool]]:
    """Add the hits of a micro-batch to `hits`, as the first forward of `model` in this context tells them that can.

    Args:
        inputs: The micro-batch, with `labels` of shape (rows, length), or with `shift_labels`.
        use: What the model does with labels.
        counts: Leaves of labels those of rows that are kept, once that is decided; without it all count.

    Yields:
        A function to call when all forwards are made; what it is given does not matter. It returns True, or raises
        NoAccuracy if none of the forwards could tell.
    """
    problems: list[str] = []
    known = len(hits)

    def look(output: Any, _: Any) -> None:
        if len(hits) == known:
            try:
                hits.append(hits_in(output, inputs, use, counts))
            except NoAccuracy as problem:
                problems.append(str(problem))

    def check(_: Any) -> bool:
        if len(hits) > known:
            return True
        why = problems[-1] if problems else "the loss is computed without a forward of the model."
        raise NoAccuracy(f"The --repeat_scheduler looks at the token accuracy, but {why} Or use another rule.")

    with watching(model, look):
        yield check


def hits_in(output: Any, inputs: Any, use: LabelUse, counts: Callable[[Tensor], Tensor] | None = None) -> Hits:
    """Return how many targets a forward predicts right, and how many there are.

    Raises:
        NoAccuracy: It does not say; the message is the reason, without the rule that wants to know.
    """
    is_mapping = isinstance(inputs, Mapping)
    shifted = is_mapping and "shift_labels" in inputs
    labels = inputs.get("shift_labels" if shifted else "labels") if is_mapping else None
    if not isinstance(labels, Tensor):
        raise NoAccuracy("the batches have no labels.")
    if labels.is_floating_point():
        raise NoAccuracy("the labels are numbers to be approached, not classes to be predicted.")
    right, mask = _field(output, "is_top1"), _field(output, "label_mask")  # TRL's fused head, which makes no logits
    if isinstance(right, Tensor) and isinstance(mask, Tensor):
        return right.sum(), mask.sum()
    logits = _field(output, "logits")
    if not isinstance(logits, Tensor):
        raise NoAccuracy(f"the model returns a loss without logits. {_how_to_get_logits(output)}")
    predicted = logits.detach().argmax(dim=-1)
    targets = (labels if counts is None else counts(labels)).to(logits.device)
    virtual = predicted.shape[-1] - targets.shape[-1] if predicted.dim() == targets.dim() == 2 else 0
    if use.shifts and not use.first and virtual > 0:  # tokens of an adapter before those of the text
        predicted = predicted[:, virtual - 1 : -1]
    elif predicted.shape != targets.shape:
        shapes = f"logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)}"
        raise NoAccuracy(f"the model returns {shapes}: not one prediction for each label.")
    elif use.shifts and not shifted:
        predicted, targets = predicted[..., :-1], targets[..., 1:]
    counted = targets != IGNORE_INDEX
    return ((predicted == targets) & counted).sum(), counted.sum()


def _field(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _how_to_get_logits(output: Any) -> str:
    if "UNSLOTH_IS_PRESENT" in os.environ:
        return "With Unsloth, set UNSLOTH_RETURN_LOGITS=1 in the environment."
    if type(output).__module__.startswith("liger_kernel"):
        kept = '{"fused_linear_cross_entropy": false, "cross_entropy": true}'
        return f"With Liger, --liger_kernel_config '{kept}' keeps them."
    return "Switch off the fused loss, or let `forward` return an output with `logits`."


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
