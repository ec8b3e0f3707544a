"""Name the device that results are computed on."""

from __future__ import annotations

from typing import Any

import torch

from ..records.provenance import versions_and_machine


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the type of any other device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def provenance_of(device: torch.device, processes: int) -> dict[str, Any]:
    """Return the `versions_and_machine` of this process."""
    return versions_and_machine(device_name(device), torch.get_num_threads(), processes)
