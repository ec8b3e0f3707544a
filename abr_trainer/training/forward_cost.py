"""What a forward of a model costs: in FLOPs, and as a share of a pass."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import nn

from .ledger import forward_share


def forward_share_of(model: nn.Module, recomputes: bool) -> Fraction:
    """Return `forward_share` for a model; its base is frozen if less than half of its weights are trained.

    Args:
        recomputes: Whether the backward recomputes activations.
    """
    sizes = parameter_sizes(model)
    trainable = sum(size for parameter, size in sizes.items() if parameter.requires_grad)
    return forward_share(2 * trainable < sum(sizes.values()), recomputes)


def parameter_sizes(model: nn.Module) -> dict[nn.Parameter, int]:
    # ZeRO-3 leaves nothing of a parameter in its place but the size.
    return {each: getattr(each, "ds_numel", each.numel()) for each in model.parameters()}


def forward_flops_per_token(trainer: Any) -> float:
    """Return the FLOPs of a forward over one token."""
    model = trainer.model
    if any(hasattr(parameter, "ds_numel") for parameter in model.parameters()):
        tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
        return 2.0 * sum(size for parameter, size in parameter_sizes(model).items() if parameter not in tables)
    # Trainer's estimate for a forward-backward with all weights trainable is 6 a parameter and token, and linear in
    # the tokens. A forward is a third of it.
    token = {getattr(model, "main_input_name", "input_ids"): torch.zeros((1, 1), dtype=torch.long)}
    flops: float = trainer.floating_point_ops(token) / 3
    return flops
