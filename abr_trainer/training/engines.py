"""What an engine must be made to forget: a batch that is left before its last backward, and its ranks at the end."""

from __future__ import annotations

import gc
from typing import Any

from accelerate import PartialState


def leave_ranks() -> None:
    """Leave the group of ranks before the process ends, or a rank may abort while it does.

    Call it where nothing refers to a trainer or a wrapped model any more. The reducer of DDP keeps the group, and if
    it is the last to do so the group ends under Python's lock, waiting for a thread that waits for the same lock
    (gloo; torch 2.13).
    """
    gc.collect()  # a trainer is part of a circle
    PartialState().destroy_process_group()


def forget_batch_of_deepspeed(engine: Any) -> None:
    """Drop what ZeRO has summed up of a batch: `engine.zero_grad()` does not reach it.

    Never `engine.step()`, which would update the weights with what is there. Written against DeepSpeed 0.19; the
    attributes are those that its own handling of an overflow resets.
    """
    optimizer = engine.optimizer
    optimizer.zero_grad(set_to_none=True)
    if hasattr(optimizer, "overflow"):
        optimizer.overflow = False  # of an earlier batch: it would keep the learning rate from ticking
    if engine.zero_optimization_stage() == 3:
        optimizer.empty_partition_cache()  # a forward without its backward leaves whole parameters behind
    elif hasattr(optimizer, "all_grad_tensors"):
        for gradients in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            for group in gradients:
                gradients[group] = None
        optimizer._release_preflattened_grad_buffers()
        optimizer._release_ipg_buffers()
        optimizer.micro_step_id = -1
        if optimizer.cpu_offload:
            optimizer._offload_accumulated_param_ids = set()
            optimizer.reset_cpu_buffers()
