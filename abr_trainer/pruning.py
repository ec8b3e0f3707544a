"""Sparse models: how much of a model is zero, and where."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

MATRICES = (nn.Linear, nn.Embedding, Conv1D)
"""Layers whose weights are counted; quantised layers are kinds of these."""

ADAPTER = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")


def matrices(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield each matrix of the base model with its name, once: quantised ones as the values that they stand for.

    An adapter's own matrices are left out. 8-bit weights are yielded as integers: a zero may be a rounded value.
    """
    seen: set[int] = set()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, MATRICES) or weight is None or id(weight) in seen:
            continue
        parts = [part for part in name.split(".") if part != "base_layer"]
        if set(parts) & set(ADAPTER):
            continue
        seen.add(id(weight))
        if isinstance(module, Linear4bit) and weight.quant_state is not None:
            yield ".".join(parts), dequantize_4bit(weight.data, weight.quant_state)
        else:
            yield ".".join(parts), weight.data


@torch.no_grad()
def nonzero_shares(model: nn.Module) -> dict[str, float]:
    """Return the share of weights that are not zero for each kind of layer, by its name in a block, and for `all`.

    >>> model = nn.ModuleDict({"q_proj": nn.Linear(2, 2), "v_proj": nn.Linear(2, 2)})
    >>> _ = nn.init.constant_(model["q_proj"].weight, 1.0), nn.init.eye_(model["v_proj"].weight)
    >>> nonzero_shares(model)
    {'q_proj': 1.0, 'v_proj': 0.5, 'all': 0.75}
    """
    counts: dict[str, list[int]] = {}
    for name, weight in matrices(model):
        count = counts.setdefault(name.rpartition(".")[2], [0, 0])
        count[0] += int(torch.count_nonzero(weight))
        count[1] += weight.numel()
    every = [sum(column) for column in zip(*counts.values(), strict=True)] or [0, 1]
    return {kind: nonzero / total for kind, (nonzero, total) in (counts | {"all": every}).items()}
