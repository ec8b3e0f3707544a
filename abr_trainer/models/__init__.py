"""Load and quantise base models, attach and merge adapters, and prune."""

from __future__ import annotations

from ..records.lazy import on_first_use

_HOMES = {
    "LoadArguments": "arguments",
    "ModelArguments": "arguments",
    "load_adapter": "adapters",
    "load_config": "loading",
    "load_model": "loading",
    "load_tokenizer": "loading",
    "merge_adapter": "merging",
    "prune": "pruning",
    "read_adapter": "adapters",
    "sparsity_report": "pruning",
}

__all__ = sorted(_HOMES)
__getattr__, __dir__ = on_first_use(__name__, _HOMES)
