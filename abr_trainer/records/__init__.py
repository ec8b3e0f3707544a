"""The files of a run and how to read them; flags, errors, provenance. Needs neither torch nor transformers."""

from __future__ import annotations

from .lazy import on_first_use

_HOMES = {
    "given_flags": "flags",
    "last_complete_checkpoint": "files",
    "one_line_errors": "errors",
    "read_json": "files",
    "read_lines": "files",
    "versions_and_machine": "provenance",
    "write_whole": "files",
}

__all__ = sorted(_HOMES)
__getattr__, __dir__ = on_first_use(__name__, _HOMES)
