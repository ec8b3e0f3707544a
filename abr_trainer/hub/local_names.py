"""Which names that a run was given are paths, wherever they are seen from later, and which are ids on the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..records.files import read_json, write_whole

LOCAL_NAMES = "_push_names.json"
"""Goes with the run where that is overwritten, as all that begins like this."""


def remember_local_names(run: Path, names: Iterable[str | None]) -> None:
    """Write down in a run which of these names are paths now, and which paths."""
    found = {name: str(Path(name).resolve()) for name in names if name and Path(name).exists()}
    write_whole(run / LOCAL_NAMES, json.dumps({**(read_json(run / LOCAL_NAMES) or {}), **found}, indent=1) + "\n")


def local_path(name: str, run: Path | None = None) -> Path | None:
    """Return where a name was found when the run was trained; None if it is no path.

    Of a run that has not written it down, it is looked for from here and from all directories above the run.
    """
    known = None if run is None else read_json(run / LOCAL_NAMES)
    if known is not None:
        return Path(known[name]) if name in known else None
    places = [Path(), *([] if run is None else run.absolute().parents)]
    return next((path for place in places if (path := place / name).exists()), None)


def is_id(name: str) -> bool:
    """Tell whether a repository on the Hub could go by this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_on_the_hub(name: str, run: Path | None = None) -> bool:
    """Tell whether a name that a run was given, or is given now, is an id on the Hub."""
    return is_id(name) and local_path(name, run) is None
