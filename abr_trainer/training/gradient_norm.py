"""The norm of the gradient of a batch, before it is clipped."""

from __future__ import annotations

from torch import Tensor, nn


def gradient_norm(model: nn.Module) -> Tensor:
    """Return the 2-norm of all gradients of the model as they are: times the loss scale, if there is a scaler.

    Sharded gradients (FSDP2) are summed up over ranks.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
