"""Token-exact perplexity: exp of the mean negative log-likelihood over every target token, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

IGNORE_INDEX = -100


def causal_nll(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed negative log-likelihood of each row, in nats, and its number of target tokens.

    One row is upcast at a time, so that bf16 logits cost no second copy of the whole batch.

    Args:
        logits: `(batch, length, vocabulary)`; position i predicts label i+1. Positions before the labels are left out.
        labels: `(batch, length)`, -100 where there is no target.

    Returns:
        Two tensors of shape `(batch,)`: float64 and int64.
    """
    logits = logits[:, -labels.shape[1] :]  # prompt tuning puts virtual tokens before the labelled ones
    targets = labels[:, 1:]
    rows = [
        torch.nn.functional.cross_entropy(
            row_logits[:-1].float(), row_targets, ignore_index=IGNORE_INDEX, reduction="none"
        ).sum(dtype=torch.float64 if logits.device.type != "mps" else torch.float32)
        for row_logits, row_targets in zip(logits, targets, strict=True)
    ]
    return torch.stack(rows), targets.ne(IGNORE_INDEX).sum(dim=1)


class TokenPerplexity:
    """Sum up what `causal_nll` returns, batch by batch.

    >>> total = TokenPerplexity()
    >>> total.add(torch.tensor([4.0, 2.0]), torch.tensor([2, 1]))
    >>> total.tokens, round(total.perplexity, 4)
    (3, 7.3891)
    """

    def __init__(self) -> None:
        self.nll = 0.0
        self.tokens = 0

    def add(self, nll: Tensor, tokens: Tensor) -> None:
        self.nll += math.fsum(nll.tolist()) if torch.isfinite(nll).all() else math.nan
        self.tokens += int(tokens.sum())

    @property
    def perplexity(self) -> float:
        """The perplexity so far; not a number when a token's likelihood was not finite, or there was none."""
        return perplexity_of(self.nll / self.tokens) if self.tokens else math.nan


def perplexity_of(loss: float) -> float:
    """Return `exp(loss)`, infinite where that overflows.

    >>> perplexity_of(0.0), perplexity_of(1e4)
    (1.0, inf)
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
