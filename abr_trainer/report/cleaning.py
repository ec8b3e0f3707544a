"""Which rows of a file a run has dropped, and which of them can go."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..records.commands import PROGRAM
from ..records.files import PROVENANCE, read_json
from .rows import RunRow, broken_rows
from .text import printable

INPUTS = ("train_file", "primer_file", "dataset_name", "dataset_mix")
"""Flags that name what a run reads rows from."""


@dataclass
class Removal:
    """What runs have dropped, as far as it concerns one file.

    Attributes:
        whole: Rows to remove, from 1.
        partly: Rows of which a dropped block holds only a part, or perhaps only a part: they stay. By row, how many
            dropped blocks hold something of it.
        elsewhere: How many dropped rows are of other files or data sets, by name; "" for those of unknown place.
        texts: The beginning of rows to remove, where a run knew it.
        counts_empty_lines: An empty line of JSON lines is a row, as it is for `abr train`.
    """

    whole: set[int] = field(default_factory=set)
    partly: Counter[int] = field(default_factory=Counter)
    elsewhere: Counter[str] = field(default_factory=Counter)
    texts: dict[int, str] = field(default_factory=dict)
    counts_empty_lines: bool = False


def rows_to_remove(directories: Sequence[Path], file: Path) -> Removal:
    """Return which rows of a file some runs have dropped.

    A row of a training set can be a block of tokens, which begins and ends within rows of its file. Of rows like these
    only those are removed that lie between the first and the last row of blocks in a row which were all dropped.

    Raises:
        ValueError: None of the runs has read the file.
    """
    removal = Removal()
    known: set[str] = set()
    for directory in directories:
        arguments, is_of_blocks = _how_it_read(directory)
        rows = broken_rows(directory)
        named = {row.source for row in rows if row.source is not None}
        known |= named | _inputs(arguments)
        source = _source_of(file, named, directory)
        of_file: list[RunRow] = []
        for row in rows:
            if source is not None and row.source == source and row.first_row is not None:
                of_file.append(row)
            else:
                removal.elsewhere[row.source or ""] += 1
        if is_of_blocks or not all(row.is_one_row for row in of_file):
            removal.counts_empty_lines = True
            whole, touched = _inside_blocks(of_file)
        else:
            whole, touched = {row.first_row for row in of_file if row.first_row is not None}, Counter()
            removal.texts |= {row.first_row: row.text for row in of_file if row.first_row is not None}
        removal.whole |= whole
        removal.partly += touched
    for row_number in removal.whole:
        del removal.partly[row_number]
    if not removal.whole and not removal.partly and not any(_is_named(file, name) for name in known):
        runs = "these runs" if len(directories) > 1 else str(directories[0])
        names = ", ".join(printable(name) for name in sorted(known)) or "unknown: no dropped row has a known place"
        raise ValueError(f"{file} is none of the sources of {runs}. They are {names}.")
    return removal


def _how_it_read(directory: Path) -> tuple[Mapping[str, Any], bool]:
    """Return the arguments of a run, and whether its rows are blocks of tokens for sure."""
    provenance = read_json(directory / PROVENANCE) or {"arguments": {}, "argv": []}
    begins = [*provenance["argv"], "", ""][:2]
    return provenance["arguments"], begins == [PROGRAM, "train"] or begins[0].endswith("run_clm_abr.py")


def _inputs(arguments: Mapping[str, Any]) -> set[str]:
    """Return the files and data sets that flags name."""
    named = {str(arguments[flag]) for flag in INPUTS if arguments.get(flag)}
    return {part.rpartition("=")[0] or part for name in named for part in name.split(",")}


def _is_named(file: Path, name: str) -> bool:
    return Path(name).name == file.name


def _source_of(file: Path, named: Collection[str], directory: Path) -> str | None:
    """Return what a run calls a file.

    Raises:
        ValueError: It has read several files of that name, and it cannot be told which one this is.
    """
    alike = sorted(name for name in named if _is_named(file, name))
    same = [name for name in alike if Path(name).exists() and Path(name).samefile(file)]
    if same or len(alike) == 1:
        return (same or alike)[0]
    if alike:
        raise ValueError(f"{directory} has read several files {file.name}: {', '.join(alike)}. Give one of these.")
    return None


def _inside_blocks(blocks: Iterable[RunRow]) -> tuple[set[int], Counter[int]]:
    """Return the rows that lie in dropped blocks entirely, and how many blocks hold something of each row.

    Where a block begins and ends within its first and its last row is not known. Two blocks of which one goes on where
    the other ends have nothing between them.
    """
    whole: set[int] = set()
    touched: Counter[int] = Counter()
    before: RunRow | None = None
    start = 0
    for block in sorted(blocks, key=lambda block: -1 if block.index is None else block.index):
        first = block.first_row or 0
        last = block.last_row or first
        touched.update(range(first, last + 1))
        goes_on = (
            before is not None
            and None not in (before.index, block.index)
            and block.index == (before.index or 0) + 1
            and before.last_row in (first, first - 1)
        )
        start = start if goes_on else first + 1
        whole.update(range(start, last))
        before = block
    return whole, touched


def doubtful_row(rows: Mapping[int, str], texts: Mapping[int, str]) -> int | None:
    """Return the first row of a file that does not hold what a run has read there; None if all do.

    A tokenizer may change case and spaces, and a template adds to a text: so pairs of words are compared, and two in
    three must be there.

    Args:
        rows: As they stand in the file, by number.
        texts: As the run has decoded them.
    """
    for number, text in sorted(texts.items()):
        of_run, of_file = _pairs(text), _pairs(rows.get(number, ""))
        if len(of_run) >= 3 and 3 * len(of_run & of_file) < 2 * len(of_run):
            return number
    return None


def _pairs(text: str) -> set[tuple[str, str]]:
    words = re.findall(r"\w+", text.casefold())
    return set(itertools.pairwise(words))
