"""Adaptive batch repetition in the trainers of other libraries."""

from __future__ import annotations

from ..records.lazy import on_first_use

_HOMES = {
    "ABRSFTConfig": "trl",
    "ABRSFTTrainer": "trl",
}

__all__ = sorted(_HOMES)
__getattr__, __dir__ = on_first_use(__name__, _HOMES)
