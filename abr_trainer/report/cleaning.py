"""Which rows of a file a run has dropped, and which of them can go."""

from __future__ import annotations

import glob
import itertools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..records.commands import PROGRAM
from ..records.files import PROVENANCE, read_json
from ..records.shapes import RUN
from .rows import RunRow, broken_rows, read_drops
from .text import printable

INPUTS = ("train_file", "primer_file", "dataset_name", "dataset_mix")
"""Flags that name what a run reads rows from."""

WORD = re.compile(r"[^\W\u2e80-\ud7ff]+|[\u2e80-\ud7ff]")
"""In Chinese and Japanese a letter counts as a word."""

TELLING = 3
"""Pairs of words by which a text is known again."""


@dataclass
class Removal:
    """What runs have dropped, as far as it concerns one file.

    Attributes:
        whole: Rows to remove, from 1.
        partly: Rows of which a dropped block holds only a part, or perhaps only a part: they stay. By row, how many
            dropped blocks hold something of it.
        highest: The highest loss of these blocks, by row; infinite if one is not finite.
        has_blocks: Whether what was dropped are blocks of tokens.
        elsewhere: How many dropped rows are of other files or data sets, by name; "" for those of unknown place.
        texts: Rows to remove, each with the beginning of its text, where a run knew it and it says enough.
        count_empty_lines: Whether an empty line of JSON lines is a row for these runs; both if they differ.
    """

    whole: set[int] = field(default_factory=set)
    partly: Counter[int] = field(default_factory=Counter)
    highest: dict[int, float] = field(default_factory=dict)
    has_blocks: bool = False
    elsewhere: Counter[str] = field(default_factory=Counter)
    texts: list[tuple[int, str]] = field(default_factory=list)
    count_empty_lines: set[bool] = field(default_factory=set)


def rows_to_remove(directories: Sequence[Path], file: Path) -> Removal:
    """Return which rows of a file some runs have dropped.

    A row of a training set can be a block of tokens, which begins and ends within rows of its file. Of rows like these
    only those are removed that lie between the first and the last row of blocks in a row which were all dropped.

    Raises:
        ValueError: None of the runs has read the file, or a run has read another one of that name.
    """
    removal = Removal()
    known: set[str] = set()
    for directory in directories:
        provenance = read_json(directory / PROVENANCE, RUN) or {}
        rows = broken_rows(directory)
        named, inputs = (
            {row.source for row in rows if row.source is not None},
            _inputs(provenance.get("arguments", {})),
        )
        known |= named | inputs
        source = _source_of(file, named, directory)
        of_file: list[RunRow] = []
        for row in rows:
            if source is not None and row.source == source and row.first_row is not None:
                of_file.append(row)
            else:
                removal.elsewhere[row.source or ""] += 1
        texts: list[tuple[int, str]] = []
        if any(row.is_block or not row.is_one_row for row in of_file):
            removal.count_empty_lines.add(True)
            removal.has_blocks = True
            whole, touched = _inside_blocks(of_file)
            for block in of_file:
                loss = math.inf if block.loss is None else block.loss
                for number in _rows_of(block):
                    removal.highest[number] = max(loss, removal.highest.get(number, -math.inf))
        else:
            removal.count_empty_lines |= _count_empty_lines(provenance.get("argv", ())) if of_file else set()
            whole, touched = {row.first_row for row in of_file if row.first_row is not None}, Counter()
            decoded = {drop.get("text") for drop in read_drops(directory)}
            known_texts = ((row.first_row, row.text) for row in of_file if row.text in decoded)
            texts = [(number, text) for number, text in known_texts if number is not None and _tells(text)]
        other = _other_than(file, source, inputs)
        if other is not None and not texts:
            raise ValueError(
                f"{directory} has read {other}, and nothing shows that {file} holds the same. Give {other}."
            )
        removal.texts += texts
        removal.whole |= whole
        removal.partly += touched
    for row_number in removal.whole:
        del removal.partly[row_number]
    if not removal.whole and not removal.partly and not any(_is_named(file, name) for name in known):
        runs = "these runs" if len(directories) > 1 else str(directories[0])
        names = ", ".join(printable(name) for name in sorted(known)) or "unknown: no dropped row has a known place"
        raise ValueError(f"{file} is none of the sources of {runs}. They are {names}.")
    return removal


def _count_empty_lines(argv: Sequence[str]) -> set[bool]:
    """Return whether a command counts the empty lines of JSON lines; both if it is not known."""
    return {argv[:2] != [PROGRAM, "classify"]} if argv else {True, False}


def _inputs(arguments: Mapping[str, Any]) -> set[str]:
    """Return the files and data sets that flags name."""
    named = {flag: str(arguments[flag]) for flag in INPUTS if arguments.get(flag)}
    mixed = (part.rpartition("=")[0] or part for part in named.pop("dataset_mix", "").split(",") if part)
    return {*named.values(), *mixed}


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


def _other_than(file: Path, source: str | None, inputs: Iterable[str]) -> Path | None:
    """Return the file of the same name that a run has read, if it is still there and is another one.

    Args:
        source: What the run calls it: the last part of its path, or all of it where that was needed.
        inputs: What the flags of the run name.
    """
    read: list[Path] = []
    for path in map(Path, [source] if source is not None and Path(source).name != source else inputs):
        read += path.rglob(glob.escape(file.name)) if path.is_dir() else [path] if _is_named(file, str(path)) else []
    there = sorted(path for path in read if path.is_file())
    return there[0] if there and not any(path.samefile(file) for path in there) else None


def _rows_of(block: RunRow) -> range:
    """Return the rows of the file that a block is known to hold something of."""
    first = block.first_row or 0
    return range(first, (block.last_row or first) + 1)


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
        rows = _rows_of(block)
        first, last = rows[0], rows[-1]
        touched.update(rows)
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


def doubtful_row(rows: Mapping[int, Sequence[str]], texts: Iterable[tuple[int, str]]) -> tuple[int, str] | None:
    """Return the first row that does not hold in a file what a run has read there, with that text; None if all do.

    A tokenizer may change case, accents and spaces. A template adds to a text, a row has more than is learnt, and a
    run keeps the beginning alone. So pairs of words are compared, without those that are in all texts, and half of the
    shorter one must be in the other.

    Args:
        rows: What stands in the file, by number: the texts that a row has.
        texts: Numbers of rows, and their texts as the run has decoded them.
    """
    compared = [(number, text, _pairs(text)) for number, text in sorted(texts)]
    common = set.intersection(*(of_run for *_, of_run in compared)) if len(compared) > 1 else set()
    for number, text, of_run in compared:
        of_file = set().union(*map(_pairs, rows.get(number, ())))
        if len(of_run - common) >= TELLING:
            of_run, of_file = of_run - common, of_file - common
        if not of_file or 2 * len(of_run & of_file) < min(len(of_run), len(of_file)):
            return number, text
    return None


def _tells(text: str) -> bool:
    """Return whether a text says enough to be known again."""
    return len(_pairs(text)) >= TELLING


def _pairs(text: str) -> set[tuple[str, str]]:
    letters = unicodedata.normalize("NFKD", text.casefold())
    words = WORD.findall("".join(letter for letter in letters if not unicodedata.combining(letter)))
    return {pair for pair in itertools.pairwise(words) if "unk" not in pair}  # a tokenizer writes it for what it lacks
