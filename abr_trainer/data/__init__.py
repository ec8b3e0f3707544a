"""From data sets and files to blocks of tokens."""

from __future__ import annotations

from ..records.lazy import on_first_use

_HOMES = {
    "CORPORA": "corpora",
    "Corpus": "corpora",
    "DataArguments": "arguments",
    "TASKS": "tasks",
    "Task": "tasks",
    "TextArguments": "arguments",
    "find_corpus": "corpora",
    "load_blocks": "blocks",
    "load_texts": "sources",
    "parse_mix": "corpora",
}

__all__ = sorted(_HOMES)
__getattr__, __dir__ = on_first_use(__name__, _HOMES)
