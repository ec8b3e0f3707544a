"""Which rows of a micro-batch count: judged on the losses of the first pass, without a forward of their own.

A row is dropped by leaving it out of the loss, between the logits and the loss: the other rows weigh what they would
have weighed. There are four places where a loss is made, and one way into each of them that Trainer or the model
offers: the model's `loss_function`, Trainer's `label_smoother`, the log-probabilities of TRL's fused head, and the
output of a model that computes its loss in its forward.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss, ForSequenceClassificationLoss

from ..perplexity.windows import IGNORE_INDEX
from .loss_scale import has_own_compute_loss
from .row_losses import KNOWN, RowLoss, arguments_of, nothing_of, of_rows, owners_of, summed_by_row
from .rows import Sieve
from .signals import watching
from .targets import base_model, forward_with_loss, names_in, unwrapped

CLOSE, EQUAL = 1e-3, 1e-5
"""Relative difference up to which a loss that we compute is that of the model: where we know which one it computes,
and where several come into question. Before training, a loss of shifted labels is nearly that of labels as they are.
"""


class RowsUnsupported(ValueError):
    """The losses of rows cannot be seen, or rows cannot be dropped, and why.

    Args:
        advice: What else to do than to leave the flag out.
    """

    def __init__(self, trainer: Any, reason: str, advice: str = "") -> None:
        drops = trainer.row_rule is not None
        flag, leave_out = ("--skip_rows", "Use --skip_rows none") if drops else ("--rank_rows", "Leave it out")
        fix = f"{advice}, or {leave_out[0].lower()}{leave_out[1:]}" if advice else leave_out
        super().__init__(f"{flag} does not work here: {reason}. {fix}.")


NO_LOGITS = (
    "the model returns no logits while it trains, as with a fused loss",
    'With Liger, give --liger_kernel_config \'{"fused_linear_cross_entropy": false, "cross_entropy": true}\'',
)


class Seam:
    """One way into the loss of a trainer."""

    def open(self, trainer: Any, model: Any, call: Any, sieve: Sieve) -> AbstractContextManager[None]:
        """Return a context in which the loss of a micro-batch is that of the rows that `sieve` keeps.

        Args:
            model: As `training_step` gets it.
            call: The micro-batch, as a `held.Call`.
        """
        raise NotImplementedError


class LossFunctionSeam(Seam):
    """The `loss_function` of a model of transformers, which the forward calls with logits and labels."""

    def __init__(self) -> None:
        self._base: tuple[weakref.ref[Any], Any] | None = None

    def _base_of(self, trainer: Any) -> Any:
        """Return the model that has the loss. To find it takes milliseconds, and is done once a model."""
        if self._base is None or self._base[0]() is not trainer.model:
            self._base = weakref.ref(trainer.model), base_model(trainer)
        return self._base[1]

    @contextlib.contextmanager
    def open(self, trainer: Any, model: Any, call: Any, sieve: Sieve) -> Iterator[None]:
        base = self._base_of(trainer)
        function: Callable[..., Tensor] = base.loss_function

        def of_kept_rows(*args: Any, **kwargs: Any) -> Tensor:
            given = arguments_of(function, args, kwargs)
            if given.get("labels") is None and given.get("shift_labels") is None:
                return function(*args, **kwargs)
            loss = _row_loss(function, given, call.inputs)
            kept = sieve.sift(partial(loss.by_row, given), loss.owners is not None)
            return function(*args, **kwargs) if kept is None else loss.of_kept(given, kept.keep, kept.share)

        shadowed = vars(base).get("_loss_function")
        base.loss_function = of_kept_rows
        try:
            yield
        finally:
            if shadowed is None:
                del base._loss_function
            else:
                base._loss_function = shadowed


class LabelSmootherSeam(Seam):
    """Trainer's label smoother, which is called with the outputs of the model and the labels."""

    @contextlib.contextmanager
    def open(self, trainer: Any, model: Any, call: Any, sieve: Sieve) -> Iterator[None]:
        smoother: Callable[..., Tensor] = trainer.label_smoother

        def of_kept_rows(outputs: Any, labels: Tensor, shift_labels: bool = False, **kwargs: Any) -> Tensor:
            if owners_of(call.inputs, labels) is not None:
                raise RowsUnsupported(trainer, "labels are smoothed over a padding-free or packed batch")
            logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]

            def by_row() -> tuple[Tensor, Tensor]:
                counted = (labels[:, 1:] if shift_labels else labels).ne(IGNORE_INDEX)
                rows = [
                    smoother({"logits": row[None].float()}, its[None], shift_labels, num_items_in_batch=1)
                    for row, its in zip(logits.detach(), labels, strict=True)
                ]
                return torch.stack(rows), counted[:, None].flatten(1).sum(1)

            kept = sieve.sift(by_row)
            if kept is None:
                return smoother(outputs, labels, shift_labels=shift_labels, **kwargs)
            if kwargs.get("num_items_in_batch") is None and not any(kept.keep):
                return nothing_of(logits)
            masked = labels.masked_fill(~of_rows(kept.keep, None, labels), IGNORE_INDEX)
            loss = smoother(outputs, masked, shift_labels=shift_labels, **kwargs)
            return loss * kept.share if kwargs.get("num_items_in_batch") is None else loss

        trainer.label_smoother = of_kept_rows
        try:
            yield
        finally:
            trainer.label_smoother = smoother


class OutputSeam(Seam):
    """What the forward returns: the log-probabilities of TRL's fused head, or logits and a loss made of them."""

    def __init__(self) -> None:
        self._loss: tuple[Callable[..., Tensor], bool] | None = None

    @contextlib.contextmanager
    def open(self, trainer: Any, model: Any, call: Any, sieve: Sieve) -> Iterator[None]:
        def of_kept_rows(output: Any, given: Mapping[str, Any]) -> Any:
            if not isinstance(output, Mapping):
                return None
            if isinstance(output.get("log_probs"), Tensor):
                return _keep_log_probs(output, given.get("labels"), call.inputs, call.items_in_batch, sieve)
            labels, logits = given.get("labels"), output.get("logits")
            if isinstance(labels, Tensor) and isinstance(logits, Tensor) and output.get("loss") is not None:
                return self._keep(trainer, output, labels, call, sieve)
            return None

        with watching(model, of_kept_rows):
            yield

    def _keep(self, trainer: Any, output: Any, labels: Tensor, call: Any, sieve: Sieve) -> Any:
        base = base_model(trainer)
        given = _arguments(output["logits"], labels, base.config, call.items_in_batch)
        if self._loss is None:
            loss = output["loss"].detach()
            tells = bool(loss) and bool(loss.isfinite())
            found = _losses_like(base, given, loss if tells else None)
            if not found:
                raise RowsUnsupported(trainer, "the loss of this model is not a sum over the targets of its rows")
            if len(found) > 1:
                sieve.cannot_tell()  # which of the losses it is: this number does not say
                return output
            self._loss = found[0] if tells else None
        function, counts_items = self._loss or found[0]
        if not counts_items:
            given["num_items_in_batch"] = None
        loss = _row_loss(function, given, call.inputs)
        kept = sieve.sift(partial(loss.by_row, given), loss.owners is not None)
        if kept is not None:
            output["loss"] = loss.of_kept(given, kept.keep, kept.share).to(output["loss"].dtype)
        return output


def _keep_log_probs(output: Any, labels: Any, inputs: Any, items: Any, sieve: Sieve) -> Any:
    """Take the rows that do not count out of what TRL makes its loss and its metrics of."""
    mask = output["label_mask"]
    owners = owners_of(inputs, labels)
    owners = None if owners is None else owners[:, -mask.shape[1] :]
    kept = sieve.sift(
        lambda: (summed_by_row(-output["log_probs"].detach(), owners), summed_by_row(mask, owners)),
        owners is not None,
    )
    if kept is None:
        return output
    flags = of_rows(kept.keep, owners, mask)
    share = 1.0 if items is not None else kept.share
    for name in ("log_probs", "label_mask", "entropy", "is_top1"):
        if isinstance(output.get(name), Tensor):
            output[name] = output[name].masked_fill(~flags, 0)
    if share != 1.0:
        output["log_probs"] = output["log_probs"] * share
    return output


def _row_loss(function: Any, given: Mapping[str, Any], inputs: Any) -> RowLoss:
    if function is ForSequenceClassificationLoss:
        return RowLoss(function)
    labels = given["labels"] if given.get("shift_labels") is None else given["shift_labels"]
    return RowLoss(function, owners_of(inputs, labels))


def _arguments(logits: Tensor, labels: Tensor, config: Any, items: Any) -> dict[str, Any]:
    return {
        "logits": logits,
        "pooled_logits": logits,
        "labels": labels,
        "config": copy.copy(config),
        "vocab_size": logits.shape[-1],
        "num_items_in_batch": items,
    }


Found = tuple[Callable[..., Tensor], bool]
"""A loss of transformers, and whether it was divided by the targets of the whole batch."""


def _losses_like(base: Any, given: Mapping[str, Any], loss: Tensor | None) -> list[Found]:
    """Return which losses of transformers a model may have computed: mostly one, or none.

    Args:
        given: What these losses take, by name.
        loss: What the model has returned; None if it does not tell.
    """
    forward = forward_with_loss(base)
    if loss is None:
        return _candidates(base, forward, given)
    with torch.no_grad():
        return [
            (function, counts_items)
            for function, counts_items in _candidates(base, forward, given)
            if torch.isclose(
                function(
                    **{**given, "num_items_in_batch": given["num_items_in_batch"] if counts_items else None}
                ).float(),
                loss.float(),
                rtol=CLOSE if "loss_function" in names_in(forward) or loss.dtype != torch.float32 else EQUAL,
                atol=0.0,
            )
        ]


def _candidates(base: Any, forward: Any, given: Mapping[str, Any]) -> list[Found]:
    logits, labels = given["logits"], given["labels"]
    if logits.dim() == 2 and len(logits) == len(labels):
        fits = logits.shape[1] == getattr(base.config, "num_labels", None)
        return [(ForSequenceClassificationLoss, False)] if fits else []
    if logits.dim() != 3 or logits.shape[:2] != labels.shape:
        return []
    if "loss_function" in names_in(forward):  # of a compiled model
        function = base.loss_function
        return [(function, given["num_items_in_batch"] is not None)] if function in KNOWN else []
    # A forward that computes the loss itself gets the number of targets if it asks for it by name.
    asks = "num_items_in_batch" in inspect.signature(forward).parameters and given["num_items_in_batch"] is not None
    of_transformers = (getattr(forward, "__module__", None) or "").startswith("transformers.")
    functions = (ForMaskedLMLoss,) if of_transformers else (ForMaskedLMLoss, ForCausalLMLoss)
    return [(function, asks) for function in functions]


def find_seam(trainer: Any) -> Seam:
    """Return the way into the loss of a trainer.

    Raises:
        RowsUnsupported: There is none.
    """
    if trainer.compute_loss_func is not None:
        raise RowsUnsupported(trainer, "`compute_loss_func` computes the loss, and cannot be told which rows count")
    by_trl = trainer.compute_loss.__module__ == "trl.trainer.sft_trainer"
    if has_own_compute_loss(trainer) and not by_trl:
        raise RowsUnsupported(trainer, f"{type(trainer).__name__} computes the loss itself, in `compute_loss`")
    if trainer.args.use_liger_kernel and (trainer.args.liger_kernel_config or {}).get(
        "fused_linear_cross_entropy", True
    ):
        raise RowsUnsupported(trainer, *NO_LOGITS)
    if trainer.label_smoother is not None:
        return LabelSmootherSeam()
    if by_trl:
        return OutputSeam()
    base = base_model(trainer)
    is_compiled = trainer.args.torch_compile or hasattr(unwrapped(trainer), "_orig_mod")
    if isinstance(base, PreTrainedModel) and "loss_function" in names_in(forward_with_loss(base)) and not is_compiled:
        if base.loss_function not in KNOWN:
            name = getattr(base.loss_function, "__name__", base.loss_function)
            raise RowsUnsupported(trainer, f"the loss of the model, {name}, is not known to be a sum over rows")
        return LossFunctionSeam()
    return OutputSeam()
