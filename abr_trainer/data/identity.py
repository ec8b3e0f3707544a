"""Where the rows of a training set come from."""

from __future__ import annotations

from typing import Any

SOURCE_COLUMN = "abr_source"
"""A column that says where each row of a data set comes from, as `Sources` packs it. No model gets it."""


def source_of(dataset: Any, index: int) -> dict[str, Any]:
    """Return where a row of a data set comes from; nothing where that is not known."""
    return {}
