"""How much memory a process and its GPU use."""

from __future__ import annotations

import sys

import psutil
import torch

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]


def memory_in_use() -> dict[str, int]:
    """Return the bytes that the process holds, and those allocated on its GPU, if it has one."""
    found = {"process": psutil.Process().memory_info().rss}
    return found | ({"gpu": torch.cuda.memory_allocated()} if torch.cuda.is_available() else {})


def memory_peaks() -> dict[str, int]:
    """Return the most bytes that the process has held, and that were allocated on its GPU."""
    if resource is None:
        found = {"process": int(getattr(psutil.Process().memory_info(), "peak_wset", 0))}
    else:
        found = {
            "process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        }
    return found | ({"gpu": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {})


def memory_of_batch(device: torch.device) -> int:
    """Return the bytes that the trace gives for a batch: on a GPU the most allocated so far, elsewhere what the
    process holds.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
