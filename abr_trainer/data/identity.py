"""Record which source, and which of its rows, each row of a data set was made from.

A column of integers, `abr_source`, records this. It survives all operations on a data set, on disk or streamed, and is
not passed to the model. The names of the sources are in the description of the data set.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

SOURCE_COLUMN = "abr_source"

SOURCE_BITS, ROW_BITS, SPAN_BITS = 11, 29, 13
"""Bits of a number in that column. They add up to 53, the integers that a float represents exactly."""

OPEN_SPAN = (1 << SPAN_BITS) - 1
"""Span that means that the last row is not known."""

UNKNOWN = -1
"""Number that means that source and row are not known: there are too many of them for the bits."""

_NAMES, _ARE_BLOCKS = "abr_sources", "abr_blocks"


def rows_of(source: int, rows: Any) -> IntArray:
    """Return the numbers for single rows of a source.

    Args:
        source: Index of the source, from 0.
        rows: Row numbers, from 1; 0 if a row is not known.
    """
    rows = np.asarray(rows, dtype=np.int64)
    fits = (rows < 1 << ROW_BITS) & (source < 1 << SOURCE_BITS)
    return np.where(fits, (source << ROW_BITS | rows) << SPAN_BITS, UNKNOWN)


def from_to(numbers: IntArray, first: IntArray, last: IntArray) -> IntArray:
    """Return the numbers for spans from one row to another.

    If a span crosses two sources, or rows between are not in the data set, only its first row is recorded.

    Args:
        numbers: Numbers of all rows.
        first, last: Positions of the first and last row of each span.

    >>> names, numbers = ["a.txt", "b.txt"], np.concatenate([rows_of(0, [8, 9]), rows_of(1, [1, 2, 3])])
    >>> [located(names, number) for number in from_to(numbers, np.array([2, 1]), np.array([4, 2]))]
    [{'source': 'b.txt', 'first_row': 1, 'last_row': 3}, {'source': 'a.txt', 'first_row': 9}]
    """
    begins, ends = numbers[first] >> SPAN_BITS, numbers[last] >> SPAN_BITS
    is_whole = (ends - begins == last - first) & (last - first < OPEN_SPAN)
    spans = np.where(is_whole, last - first, OPEN_SPAN)
    return np.where(numbers[first] < 0, UNKNOWN, numbers[first] | spans)


def in_source(numbers: IntArray, offset: int) -> IntArray:
    """Return the numbers with `offset` added to the index of the source."""
    sources = (numbers >> (ROW_BITS + SPAN_BITS)) + offset
    moved = numbers + (offset << (ROW_BITS + SPAN_BITS))
    return np.where((numbers < 0) | (sources >= 1 << SOURCE_BITS), UNKNOWN, moved)


def located(names: Sequence[str], number: int) -> dict[str, Any]:
    """Decode a number of the column: `source`, `first_row` and `last_row`, as far as they are known."""
    begin, span = divmod(int(number), 1 << SPAN_BITS)
    source, row = divmod(begin, 1 << ROW_BITS)
    if number < 0 or source >= len(names):
        return {}
    if row == 0:
        return {"source": names[source]}
    return {"source": names[source], "first_row": row} | ({} if span == OPEN_SPAN else {"last_row": row + span})


def with_rows(dataset: Any, source: int = 0) -> Any:
    """Add the column to a `datasets.Dataset` that holds all rows of one source, in order."""
    return dataset.add_column(SOURCE_COLUMN, rows_of(source, np.arange(1, len(dataset) + 1)))


def name_sources(dataset: Any, names: Sequence[str], are_blocks: bool = False) -> Any:
    """Store the names of the sources in the description of a `datasets` data set, and return the data set.

    Args:
        names: Paths of files, or other names. Paths are shortened to file names if these are unique.
        are_blocks: Rows are blocks of tokens, which may begin and end anywhere in a row of a source.
    """
    short = [Path(name).name if Path(name).is_file() else re.sub(r"--\w+ ", "", name) for name in names]
    told = short if len(set(short)) == len(names) else list(names)
    dataset.info.description = json.dumps({_NAMES: told, _ARE_BLOCKS: are_blocks})
    return dataset


def sources_of(dataset: Any) -> list[str]:
    """Return the names of the sources of a data set; an empty list if none are stored."""
    names: list[str] = _description(dataset).get(_NAMES, [])
    return names


def are_blocks(dataset: Any) -> bool:
    """Tell whether the rows of a data set are recorded as blocks, see `name_sources`."""
    return bool(_description(dataset).get(_ARE_BLOCKS))


def _description(dataset: Any) -> dict[str, Any]:
    try:
        found = json.loads(dataset.info.description)
    except (AttributeError, TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
