"""Token-exact perplexity: exp of the mean negative log-likelihood over every target token, in float64."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..models.unwrapping import without_adapter

IntArray = npt.NDArray[np.int64]
IGNORE_INDEX = -100


def causal_nll(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed negative log-likelihood of each row, in nats, and its number of target tokens.

    One row is upcast at a time, so that bf16 logits need no fp32 copy of the full batch.

    Args:
        logits: `(batch, length, vocabulary)`; position i predicts label i+1. Extra positions before the labels are
            left out.
        labels: `(batch, length)`, -100 for no target.

    Returns:
        Two tensors of shape `(batch,)`: float64 and int64.
    """
    logits = logits[:, -labels.shape[1] :]  # prompt tuning puts virtual tokens before the labelled ones
    return target_nll(logits[:, :-1], labels[:, 1:])


def target_nll(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same as `causal_nll` for logits that are aligned with the targets.

    Args:
        logits: `(batch, length, vocabulary)`; position i predicts target i.
        targets: `(batch, length)`, -100 for no target.
    """
    rows = [
        torch.nn.functional.cross_entropy(
            row_logits.float(), row_targets, ignore_index=IGNORE_INDEX, reduction="none"
        ).sum(dtype=torch.float64 if logits.device.type != "mps" else torch.float32)
        for row_logits, row_targets in zip(logits, targets, strict=True)
    ]
    return torch.stack(rows), targets.ne(IGNORE_INDEX).sum(dim=1)


class TokenPerplexity:
    """Sum up the results of `causal_nll` over batches.

    >>> total = TokenPerplexity()
    >>> total.add(torch.tensor([4.0, 2.0]), torch.tensor([2, 1]))
    >>> total.tokens, round(total.perplexity, 4)
    (3, 7.3891)
    """

    def __init__(self) -> None:
        self.nll = 0.0
        self.tokens = 0
        self.rows = 0
        self.non_finite = 0

    def add(self, nll: Tensor, tokens: Tensor) -> None:
        non_finite = int((~torch.isfinite(nll)).sum())
        self.nll += math.nan if non_finite else math.fsum(nll.tolist())
        self.tokens += int(tokens.sum())
        self.rows += len(nll)
        self.non_finite += non_finite

    @property
    def perplexity(self) -> float:
        """The perplexity so far; NaN if there are no tokens, or if the likelihood of one is NaN or infinite."""
        return perplexity_of(self.nll / self.tokens) if self.tokens else math.nan


def perplexity_of(loss: float) -> float:
    """Return `exp(loss)`, or infinity if that overflows.

    >>> perplexity_of(0.0), perplexity_of(1e4)
    (1.0, inf)
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens that a model sees at once. The last ones are targets.

    Attributes:
        ids: A view of the tokens of the text, or separate tokens.
        targets: Number of last tokens that count; less than `len(ids)`, because the first token has no prediction.
        weight: Weight of the mean over these targets in the mean over windows.
        document: Index of the window's document, for definitions that need full documents.
    """

    ids: Sequence[int] | IntArray
    targets: int
    weight: float
    document: int | None = None


def sliding_windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield `(begin, end, scored)` spans. If they overlap, every token after the first is scored exactly once.

    The first token of a span is never scored, so with `stride` equal to `window` one token per span is left out. Spans
    without a token to score are left out.

    >>> list(sliding_windows(length=10, window=6, stride=3))
    [(0, 6, 5), (3, 9, 3), (6, 10, 1)]
    >>> list(sliding_windows(length=13, window=6, stride=6))
    [(0, 6, 5), (6, 12, 5)]
    """
    done = 0
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        scored = min(end - done, end - begin - 1)
        if scored > 0:
            yield begin, end, scored
        if end == length:
            return
        done = end


@torch.no_grad()  # not inference_mode: during a run, engines keep tensors that are created here
def window_nlls(
    model: torch.nn.Module, windows: Sequence[Window], batch_size: int, progress: Callable[[int], Any] | None = None
) -> list[float]:
    """Return the summed negative log-likelihood of the targets of each window, in nats, in float64.

    The longest windows come first, so that a batch that does not fit into memory fails at once. If the model supports
    it, logits are computed only for targets; they are never stored. The model's training mode is restored.

    Args:
        model: A causal language model on its device, which takes `input_ids` and `attention_mask`.
        batch_size: Windows per batch.
        progress: Called after each batch with its number of windows.
    """
    device = next(model.parameters()).device
    trims = "logits_to_keep" in inspect.signature(without_adapter(model).forward).parameters
    order = sorted(range(len(windows)), key=lambda index: -len(windows[index].ids))
    was_training = model.training
    model.eval()
    nlls = [math.nan] * len(windows)
    try:
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = [windows[index] for index in indices]
            found, _ = target_nll(*_logits_and_targets(model, batch, device, trims))
            for index, nll in zip(indices, found.tolist(), strict=True):
                nlls[index] = nll
            if progress is not None:
                progress(len(batch))
    finally:
        model.train(was_training)
    return nlls


def _logits_and_targets(
    model: torch.nn.Module, batch: list[Window], device: torch.device, trims: bool
) -> tuple[Tensor, Tensor]:
    """Return logits and the targets that they predict, -100 for no target. The last token is not used as input."""
    longest = max(len(window.ids) for window in batch) - 1
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    seen = torch.zeros_like(ids)
    targets = torch.full_like(ids, IGNORE_INDEX)
    for row, window in enumerate(batch):
        end = len(window.ids) - 1
        ids[row, :end] = torch.as_tensor(window.ids[:-1])
        seen[row, :end] = 1
        targets[row, end - window.targets : end] = torch.as_tensor(window.ids[-window.targets :])
    options: dict[str, Any] = {}
    if not bool(seen.all()):
        options["attention_mask"] = seen.to(device)
    elif trims:
        kept = max(window.targets for window in batch)
        options["logits_to_keep"], targets = kept, targets[:, -kept:]
    logits = model(input_ids=ids.to(device), use_cache=False, **options).logits
    return logits[:, -targets.shape[1] :], targets.to(logits.device)
