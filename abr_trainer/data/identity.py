"""Where the rows of a training set come from."""

from __future__ import annotations

SOURCE_COLUMN = "abr_source"
"""A column that says where each row of a data set comes from, as `Sources` packs it. No model gets it."""
