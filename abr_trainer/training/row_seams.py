"""Which rows of a micro-batch count: judged on the losses of the first pass, without a forward of their own.

A row is dropped by leaving it out of the loss, between the logits and the loss: the other rows weigh what they would
have weighed. There are four places where a loss is made, and one way into each of them that Trainer or the model
offers: the model's `loss_function`, Trainer's `label_smoother`, the log-probabilities of TRL's fused head, and the
output of a model that computes its loss in its forward.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss, ForSequenceClassificationLoss

from ..perplexity.windows import IGNORE_INDEX
from .row_losses import KNOWN, RowLoss, arguments_of, nothing_of, of_rows, owners_of, summed_by_row
from .rows import Sieve
from .signals import watching
from .targets import base_model, forward_with_loss, names_in, unwrapped

CLOSE = 1e-3
"""Relative difference up to which a loss that we compute is taken for that of the model."""


class RowsUnsupported(ValueError):
    """Rows cannot be dropped here, and why."""

    def __init__(self, reason: str, advice: str = "Use --skip_rows none.") -> None:
        super().__init__(f"--skip_rows does not work here: {reason}. {advice}")


NO_LOGITS = (
    "the model returns no logits while it trains, as with a fused loss",
    'With Liger, give --liger_kernel_config \'{"fused_linear_cross_entropy": false, "cross_entropy": true}\'; else '
    "use --skip_rows none.",
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

    @contextlib.contextmanager
    def open(self, trainer: Any, model: Any, call: Any, sieve: Sieve) -> Iterator[None]:
        base = base_model(trainer)
        function: Callable[..., Tensor] = base.loss_function

        def of_kept_rows(*args: Any, **kwargs: Any) -> Tensor:
            given = arguments_of(function, args, kwargs)
            if given.get("labels") is None and given.get("shift_labels") is None:
                return function(*args, **kwargs)
            loss = _row_loss(function, given, call.inputs)
            if function is ForSequenceClassificationLoss and given["config"].problem_type is None:
                function(*args, **kwargs)  # finds the kind of problem, and writes it there
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
                raise RowsUnsupported("label smoothing over a padding-free or packed batch")
            logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]

            def by_row() -> tuple[Tensor, Tensor]:
                targets = (labels[:, 1:] if shift_labels else labels).ne(IGNORE_INDEX).flatten(1).sum(1)
                rows = [
                    smoother({"logits": row[None].float()}, its[None], shift_labels, num_items_in_batch=1)
                    for row, its in zip(logits.detach(), labels, strict=True)
                ]
                return torch.stack(rows), targets

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
                return self._keep(base_model(trainer).config, output, labels, call, sieve)
            return None

        with watching(model, of_kept_rows):
            yield

    def _keep(self, config: Any, output: Any, labels: Tensor, call: Any, sieve: Sieve) -> Any:
        given = _arguments(output["logits"], labels, config, call.items_in_batch)
        if self._loss is None:
            loss = output["loss"].detach()
            if not loss or not loss.isfinite():
                sieve.cannot_tell()  # which of the losses it is: this number does not say
                return output
            self._loss = _find_loss(given, loss)
        if self._loss is None:
            raise RowsUnsupported("the loss of this model is not a sum over the targets of its rows")
        function, counts_items = self._loss
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


def _find_loss(given: Mapping[str, Any], loss: Tensor) -> tuple[Callable[..., Tensor], bool] | None:
    """Return which loss of transformers a model has computed, and whether it was divided by the targets of the batch.

    Args:
        given: What these losses take, by name.
        loss: What the model has returned.
    """
    logits, labels = given["logits"], given["labels"]
    by_token = logits.dim() == 3 and logits.shape[:2] == labels.shape
    candidates = (ForMaskedLMLoss, ForCausalLMLoss) if by_token else (ForSequenceClassificationLoss,)
    if not by_token and (logits.dim() != 2 or len(logits) != len(labels)):
        return None
    with torch.no_grad():
        for function in candidates:
            for items in (given["num_items_in_batch"], None):
                found = function(**{**given, "num_items_in_batch": items})
                if torch.isclose(found.float(), loss.float(), rtol=CLOSE, atol=0.0):
                    return function, items is not None
    return None


def find_seam(trainer: Any) -> Seam:
    """Return the way into the loss of a trainer.

    Raises:
        RowsUnsupported: There is none.
    """
    if trainer.compute_loss_func is not None:
        raise RowsUnsupported("`compute_loss_func` computes the loss, and cannot be told which rows count")
    computes = type(trainer).compute_loss
    by_trl = computes.__module__ == "trl.trainer.sft_trainer"
    if computes is not Trainer.compute_loss and not by_trl:
        raise RowsUnsupported(f"{type(trainer).__name__} computes the loss itself, in `compute_loss`")
    if trainer.args.use_liger_kernel and (trainer.args.liger_kernel_config or {}).get(
        "fused_linear_cross_entropy", True
    ):
        raise RowsUnsupported(*NO_LOGITS)
    if trainer.label_smoother is not None:
        return LabelSmootherSeam()
    if by_trl:
        return OutputSeam()
    base = base_model(trainer)
    is_compiled = trainer.args.torch_compile or hasattr(unwrapped(trainer), "_orig_mod")
    if isinstance(base, PreTrainedModel) and "loss_function" in names_in(forward_with_loss(base)) and not is_compiled:
        if base.loss_function not in KNOWN:
            raise RowsUnsupported(f"the loss of the model, {base.loss_function}, is not known to be a sum over rows")
        return LossFunctionSeam()
    return OutputSeam()
