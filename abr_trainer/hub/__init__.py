"""Push runs to the Hub: repository, model card, pushes in the background."""

from __future__ import annotations

from ..records.lazy import on_first_use

_HOMES = {
    "HubMixin": "pushing",
    "PushError": "repository",
    "Target": "repository",
    "fetch_checkpoint": "repository",
    "write_card": "card",
}

__all__ = sorted(_HOMES)
__getattr__, __dir__ = on_first_use(__name__, _HOMES)
