"""Losses of transformers as sums over rows: the loss of each row, and the loss of some rows only."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.loss.loss_utils import (
    ForCausalLMLoss,
    ForMaskedLMLoss,
    ForSequenceClassificationLoss,
    ForTokenClassification,
)

from ..perplexity.windows import IGNORE_INDEX

LOGITS_AT_A_TIME = 2**25
"""How many logits are turned into losses of rows at once: 128 MiB in fp32."""


# ---- Rows ----


def owners_of(inputs: Any, labels: Tensor) -> Tensor | None:
    """Return which row each label belongs to, where several documents lie in one row of a tensor; else None.

    Documents are told apart by `position_ids` that start again at 0, by `seq_idx`, or by `cu_seq_lens_q`, as the
    collators for padding-free and packed batches give them.

    Args:
        labels: Of shape (rows of the tensor, length).

    Returns:
        Numbers from 0, without gaps, of the shape of `labels`.
    """
    if not isinstance(inputs, Mapping) or labels.dim() != 2:
        return None
    positions, index, ends = (inputs.get(name) for name in ("position_ids", "seq_idx", "cu_seq_lens_q"))
    if isinstance(positions, Tensor) and positions.shape == labels.shape:
        starts = positions == 0
        if not bool((starts.sum(1) > 1).any()):
            return None
        starts[:, 0] = True
    elif isinstance(index, Tensor) and index.shape == labels.shape:
        starts = torch.ones_like(labels, dtype=torch.bool)
        starts[:, 1:] = index[:, 1:] != index[:, :-1]
    elif isinstance(ends, Tensor) and len(labels) == 1:
        starts = torch.zeros_like(labels, dtype=torch.bool)
        starts[0, ends[ends < labels.shape[1]].long()] = True
        starts[:, 0] = True
    else:
        return None
    return starts.flatten().cumsum(0).view_as(labels) - 1


def summed_by_row(values: Tensor, owners: Tensor | None) -> Tensor:
    """Return sums over rows, in float64 where the device has it.

    Args:
        values: Of shape (rows of the tensor, length).
        owners: As from `owners_of`, of the same shape.
    """
    values = values if values.device.type == "mps" else values.double()
    if owners is None:
        return values.sum(1)
    rows = int(owners.max()) + 1
    return values.new_zeros(rows).index_add_(0, owners.flatten(), values.flatten())


def of_rows(flags: list[bool], owners: Tensor | None, like: Tensor) -> Tensor:
    """Return flags of rows as flags of labels, to be broadcast against `like`, whose first dimension is rows."""
    by_row = torch.tensor(flags, device=like.device)
    return by_row.view(-1, *[1] * (like.dim() - 1)) if owners is None else by_row[owners.to(like.device)]


# ---- Losses ----


@dataclass(frozen=True)
class RowLoss:
    """A loss that is a sum over rows, divided by a number of targets.

    Attributes:
        function: A loss of transformers; see `KNOWN`.
        owners: As from `owners_of`, for the labels; None where each row of the tensor is one.
    """

    function: Callable[..., Tensor]
    owners: Tensor | None = None

    def by_row(self, given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the loss of each row, summed over its targets, and the number of its targets; without gradient.

        Args:
            given: The arguments of `function`, by name.
        """
        with torch.no_grad():
            if self.function is ForSequenceClassificationLoss:
                if given["config"].problem_type is None:
                    self._call(given)  # finds the kind of problem, and writes it there
                return _of_sequences(given)
            logits, labels, owners = given["logits"], self._aligned(given), self._aligned_owners(given)
            labels, owners = labels.to(logits.device), None if owners is None else owners.to(logits.device)
            tokens = max(1, LOGITS_AT_A_TIME // logits.shape[-1])
            parts = zip(torch.split(logits.flatten(0, 1), tokens), torch.split(labels.flatten(), tokens), strict=True)
            losses = [F.cross_entropy(part.float(), targets, reduction="none") for part, targets in parts]
            by_token = torch.cat(losses).view(labels.shape)
            return summed_by_row(by_token, owners), summed_by_row(labels.ne(IGNORE_INDEX), owners)

    def of_kept(self, given: Mapping[str, Any], keep: list[bool], share: float) -> Tensor:
        """Return the loss of some rows, in which each weighs as it does in the loss of all.

        Args:
            given: The arguments of `function`, by name.
            keep: Which rows.
            share: Targets of these rows, as a share of all targets of the call.
        """
        given = dict(given)
        is_mean = given.get("num_items_in_batch") is None
        logits: Tensor = given["logits" if self.function is not ForSequenceClassificationLoss else "pooled_logits"]
        if not any(keep) and (is_mean or self.function is ForSequenceClassificationLoss):
            return nothing_of(logits)
        if self.function is ForSequenceClassificationLoss:
            chosen = torch.tensor(keep, device=logits.device)
            labels: Tensor = given["labels"]
            given |= {"pooled_logits": logits[chosen], "labels": labels[chosen.to(labels.device)]}
            if given["config"].problem_type != "single_label_classification":
                is_mean = True  # these take no number of targets
            return self._call(given) * share if is_mean else self._call(given)
        name = "labels" if given.get("shift_labels") is None else "shift_labels"
        owners = self._aligned_owners(given) if name == "shift_labels" else self.owners
        given[name] = given[name].masked_fill(~of_rows(keep, owners, given[name]), IGNORE_INDEX)
        loss = self._call(given)
        return loss * share if is_mean else loss

    def _call(self, given: Mapping[str, Any]) -> Tensor:
        loss: Tensor = self.function(**given)
        return loss

    def _aligned(self, given: Mapping[str, Any]) -> Tensor:
        """Return for each logit the label that it predicts."""
        if self.function is not ForCausalLMLoss:
            labels: Tensor = given["labels"]
            return labels.view(labels.shape[0], -1)
        shifted = given.get("shift_labels")
        return shifted if shifted is not None else F.pad(given["labels"], (0, 1), value=IGNORE_INDEX)[..., 1:]

    def _aligned_owners(self, given: Mapping[str, Any]) -> Tensor | None:
        if self.owners is None or self.function is not ForCausalLMLoss:
            return self.owners
        return torch.cat([self.owners[:, 1:], self.owners[:, -1:]], dim=1)


KNOWN = (ForCausalLMLoss, ForMaskedLMLoss, ForTokenClassification, ForSequenceClassificationLoss)
"""Losses that are sums over rows."""


def nothing_of(logits: Tensor) -> Tensor:
    """Return a loss of 0 with a gradient of 0, whatever the logits are."""
    return logits.nan_to_num(0.0, 0.0, 0.0).sum() * 0.0


def _of_sequences(given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the loss of each sequence and its targets: a class, numbers, or several labels."""
    logits, labels, kind = given["pooled_logits"], given["labels"], given["config"].problem_type
    labels = labels.to(logits.device)
    if kind == "single_label_classification":
        labels = labels.view(-1)
        losses = F.cross_entropy(logits.view(len(labels), -1).float(), labels, reduction="none")
        return losses, labels.ne(IGNORE_INDEX).long()
    predicted = logits.float().reshape(len(labels), -1)
    wanted = labels.float().reshape(len(labels), -1)
    error = F.mse_loss if kind == "regression" else F.binary_cross_entropy_with_logits
    return error(predicted, wanted, reduction="none").sum(1), torch.full_like(wanted[:, 0], wanted.shape[1]).long()


def arguments_of(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name, those that the function takes as `**kwargs` among them."""
    signature = _signature_of(function)
    bound = signature.bind(*args, **kwargs)
    others = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
    given = dict(bound.arguments)
    return given if others is None else {**given, **given.pop(others, {})}


@functools.cache
def _signature_of(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)
