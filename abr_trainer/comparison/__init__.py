"""Compare rules with paired seeds, and report what the differences show. Needs neither torch nor transformers."""

from __future__ import annotations

from ..records.lazy import on_first_use

_HOMES = {
    "Arm": "arms",
    "Experiment": "experiment",
    "Run": "experiment",
    "RunFailed": "experiment",
    "SCORES": "scores",
    "Score": "scores",
    "collect": "collecting",
    "parse_arm": "arms",
    "prompt_arm": "arms",
    "write_comparison": "collecting",
}

__all__ = sorted(_HOMES)
__getattr__, __dir__ = on_first_use(__name__, _HOMES)
