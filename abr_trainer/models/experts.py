"""Find the experts and routers of a mixture of experts, and how the experts are stored."""

from __future__ import annotations

from torch import nn

ROUTERS = ("gate", "router", "shared_expert_gate")
"""Names of modules that are routers."""

HAS_INPUTS_FIRST = {"Llama4TextExperts": True, "JetMoeParallelExperts": False, "LongcatFlashExperts": False}
"""Whether experts are stored as `(experts, inputs, outputs)`, for classes of transformers without `is_transposed`."""


def has_inputs_first(module: nn.Module) -> bool | None:
    """Tell whether a module stores experts as `(experts, inputs, outputs)`; None if it has none or it is not known."""
    stated: bool | None = getattr(module, "is_transposed", HAS_INPUTS_FIRST.get(type(module).__name__))
    return stated


def holds_stack(module: nn.Module) -> bool:
    return any(each.dim() == 3 for each in module.parameters(recurse=False)) and has_inputs_first(module) is not None


def is_router(name: str) -> bool:
    """Tell whether a module or parameter of a mixture of experts is a router or part of one."""
    return not set(ROUTERS).isdisjoint(name.split("."))


def linear_routers(model: nn.Module) -> list[str]:
    """Return the names of the linear layers that are routers, if the model has stacks of experts.

    An adapter cannot wrap some of them, because they return more than a linear layer does.
    """
    if not any(holds_stack(module) for module in model.modules()):
        return []
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and is_router(name)]


def layers_beside_experts(model: nn.Module, head: nn.Module | None) -> set[str] | None:
    """Return the last names of the linear layers outside blocks of experts, without the head: those of the attention.

    None if the model has no stacks of experts.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    blocks = tuple(f"{name.rpartition('.')[0]}." for name, module in model.named_modules() if holds_stack(module))
    if not blocks:
        return None
    inside = {name.rpartition(".")[2] for name in linear if name.startswith(blocks)}
    return {name.rpartition(".")[2] for name, module in linear.items() if module is not head} - inside
