"""Tell whether a name that a run was given is a path or an id on the Hub, also from another directory later."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..records.files import read_json, write_whole

LOCAL_NAMES = "_push_names.json"
"""Removed with the other `_push*` files when the run is overwritten."""


def remember_local_names(run: Path, names: Iterable[str | None]) -> None:
    """Store in a run which of these names are paths now, and which paths."""
    found = {name: str(Path(name).resolve()) for name in names if name and Path(name).exists()}
    write_whole(run / LOCAL_NAMES, json.dumps({**(read_json(run / LOCAL_NAMES) or {}), **found}, indent=1) + "\n")


def local_path(name: str, run: Path | None = None) -> Path | None:
    """Return the path that a name had when the run was trained; None if it was not a path.

    If the run has not stored it, look in the current directory and in all directories above the run.
    """
    known = None if run is None else read_json(run / LOCAL_NAMES)
    if known is not None:
        return Path(known[name]) if name in known else None
    places = [Path(), *([] if run is None else run.absolute().parents)]
    return next((path for place in places if (path := place / name).exists()), None)


def is_id(name: str) -> bool:
    """Tell whether a name is a valid id of a repository on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_on_the_hub(name: str, run: Path | None = None) -> bool:
    """Tell whether a name that a run was given is an id on the Hub. Without `run`, the name is given now."""
    return is_id(name) and local_path(name, run) is None
