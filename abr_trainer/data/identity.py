"""Where the rows of a data set come from: a source, and the rows of it that they were made of.

It stands in a column of whole numbers, `abr_source`, which goes through whatever is done with a data set, on disk or
streamed, and which no model gets. The names of the sources stand in the description of the data set.
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
"""Of a number in that column: 53 bits, what a float holds exactly."""

OPEN_SPAN = (1 << SPAN_BITS) - 1
"""Stands for rows of which it is not known which is the last."""

UNKNOWN = -1
"""Says nothing: there are more sources or rows than the bits have room for."""

_NAMES, _ARE_BLOCKS = "abr_sources", "abr_blocks"


def rows_of(source: int, rows: Any) -> IntArray:
    """Return the numbers for single rows of a source.

    Args:
        source: Which one it is, from 0.
        rows: Their numbers, from 1; 0 for a row that is not known.
    """
    rows = np.asarray(rows, dtype=np.int64)
    fits = (rows < 1 << ROW_BITS) & (source < 1 << SOURCE_BITS)
    return np.where(fits, (source << ROW_BITS | rows) << SPAN_BITS, UNKNOWN)


def from_to(numbers: IntArray, first: IntArray, last: IntArray) -> IntArray:
    """Return the numbers for what reaches from one row to another.

    Where rows between them are not of the data set, or they are of two sources, only the first row is named.

    Args:
        numbers: Those of all rows.
        first, last: Positions of the rows.

    >>> names, numbers = ["a.txt", "b.txt"], np.concatenate([rows_of(0, [8, 9]), rows_of(1, [1, 2, 3])])
    >>> [located(names, number) for number in from_to(numbers, np.array([2, 1]), np.array([4, 2]))]
    [{'source': 'b.txt', 'first_row': 1, 'last_row': 3}, {'source': 'a.txt', 'first_row': 9}]
    """
    begins, ends = numbers[first] >> SPAN_BITS, numbers[last] >> SPAN_BITS
    is_whole = (ends - begins == last - first) & (last - first < OPEN_SPAN)
    spans = np.where(is_whole, last - first, OPEN_SPAN)
    return np.where(numbers[first] < 0, UNKNOWN, numbers[first] | spans)


def in_source(numbers: IntArray, offset: int) -> IntArray:
    """Return the numbers where the sources come after `offset` others."""
    sources = (numbers >> (ROW_BITS + SPAN_BITS)) + offset
    moved = numbers + (offset << (ROW_BITS + SPAN_BITS))
    return np.where((numbers < 0) | (sources >= 1 << SOURCE_BITS), UNKNOWN, moved)


def located(names: Sequence[str], number: int) -> dict[str, Any]:
    """Return what a number of the column says: `source`, `first_row` and `last_row`, as far as they are known."""
    begin, span = divmod(int(number), 1 << SPAN_BITS)
    source, row = divmod(begin, 1 << ROW_BITS)
    if number < 0 or source >= len(names):
        return {}
    if row == 0:
        return {"source": names[source]}
    return {"source": names[source], "first_row": row} | ({} if span == OPEN_SPAN else {"last_row": row + span})


def with_rows(dataset: Any, source: int = 0) -> Any:
    """Return a `datasets.Dataset` with the column, for one whose rows are those of one source, in order."""
    return dataset.add_column(SOURCE_COLUMN, rows_of(source, np.arange(1, len(dataset) + 1)))


def name_sources(dataset: Any, names: Sequence[str], are_blocks: bool = False) -> Any:
    """Write down what the sources of a data set of `datasets` are called, and return it.

    Args:
        names: Paths of files, of which the last part is kept where that tells them apart, or what else names rows.
        are_blocks: Its rows are blocks of tokens, which begin and end anywhere in rows of the sources.
    """
    short = [Path(name).name if Path(name).is_file() else re.sub(r"--\w+ ", "", name) for name in names]
    told = short if len(set(short)) == len(names) else list(names)
    dataset.info.description = json.dumps({_NAMES: told, _ARE_BLOCKS: are_blocks})
    return dataset


def sources_of(dataset: Any) -> list[str]:
    """Return the names of the sources of a data set; none where nobody has written them down."""
    names: list[str] = _description(dataset).get(_NAMES, [])
    return names


def are_blocks(dataset: Any) -> bool:
    """Tell whether the rows of a data set are known to be blocks, see `name_sources`."""
    return bool(_description(dataset).get(_ARE_BLOCKS))


def _description(dataset: Any) -> dict[str, Any]:
    try:
        found = json.loads(dataset.info.description)
    except (AttributeError, TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
