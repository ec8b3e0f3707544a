"""Measure the perplexity of a model on a text, by any published definition."""

from __future__ import annotations

from ..records.lazy import on_first_use

_HOMES = {
    "DEFINITIONS": "definitions",
    "Definition": "definitions",
    "Measurement": "measurement",
    "TokenPerplexity": "windows",
    "Window": "windows",
    "causal_nll": "windows",
    "find_definition": "definitions",
    "measure": "measurement",
    "perplexity_of": "windows",
    "sliding_windows": "windows",
    "window_nlls": "windows",
}

__all__ = sorted(_HOMES)
__getattr__, __dir__ = on_first_use(__name__, _HOMES)
