"""Which column of a table is the text, and what a row of it may hold."""

from __future__ import annotations

import json
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info

from ..records.errors import BadRow
from .identity import IntArray
from .readers import count_lines

TOKENS = "input_ids"
EVERY = ""
"""Stands for all columns of a row, where others stand for one of them."""
TEXT_COLUMNS = ("text", "dialog", "content", "sentence")
NOT_TEXT = {
    *("author", "category", "checksum", "created", "date", "doc_id", "domain", "file", "filename", "hash", "id"),
    *("idx", "index", "key", "label", "lang", "language", "license", "md5", "meta", "metadata", "model", "name"),
    *("path", "role", "sha", "sha1", "sha256", "source", "split", "subset", "tag", "tags", "timestamp", "topic"),
    *("type", "uid", "uri", "url", "user", "uuid", "warc_id"),
}
"""Columns of these names say what a text is, and are none, unless there is no other column."""
MESSAGES = (("role", "content"), ("from", "value"))
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "chosen", "rejected"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("query", "response"),
)
"""Columns that are parts of one example; more may stand beside them."""
EXAMPLES = 100
"""Rows that are looked at to find the column."""

WORDS = re.compile(r"\S\s+\S")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a row lies, by its index, for messages.

    Attributes:
        origin: What named the rows.
        files: The files whose lines the rows are, if they are lines.
        first: How many rows lie before the first.
        of_hundred: Which rows of each hundred there are.
    """

    origin: str
    files: tuple[str, ...] = ()
    first: int = 0
    of_hundred: range = range(100)

    def __call__(self, index: int) -> str:
        return f"{self.number(index)} of {self.origin}"

    @property
    def source(self) -> str:
        """The file that the rows come from, if it is one, or what else named them."""
        named = self.origin.partition(" ")[2]
        return named if self.origin.startswith("--") and Path(named).is_file() else self.origin

    def rows(self, indices: Sequence[int]) -> IntArray:
        """Return which rows these are, from 1."""
        hundreds, rests = np.divmod(np.asarray(indices, dtype=np.int64), len(self.of_hundred))
        numbers: IntArray = self.first + hundreds * 100 + np.asarray(self.of_hundred)[rests] + 1
        return numbers

    def number(self, index: int) -> str:
        """Return which row or line it is, without what named it."""
        [number] = self.rows([index]).tolist()
        worker = get_worker_info()
        if len(self.files) != 1 and worker is not None and worker.num_workers > 1:  # they share the files
            return f"row {number} of those that worker {worker.id} reads"
        if not self.files or self.origin.endswith(self.files[0]):
            return f"{'line' if self.files else 'row'} {number}"
        for path in self.files:
            lines = count_lines(path)
            if number <= lines:
                break
            number -= lines
        return f"line {number} of {Path(path).name}"


@dataclass(frozen=True)
class Column:
    """What to take from a row, and where the row lies.

    Attributes:
        name: The column, or the field of the JSON, that holds the text or the tokens.
        is_json: A row is a line of JSON, in a column `text`.
    """

    name: str
    place: Place
    is_json: bool = False

    def values(self, batch: dict[str, list[Any]], indices: Iterable[int]) -> list[Any]:
        """Return what rows hold; None for null, an empty list, an empty line, and where there is no such field.

        Raises:
            BadRow: A line is no JSON object.
        """
        values = (
            batch[self.name]
            if not self.is_json
            else [
                parse_line(line, self.where(index)).get(self.name)
                for line, index in zip(batch["text"], indices, strict=True)
            ]
        )
        return [None if value == [] else value for value in values]

    def is_row(self, raw: Any) -> bool:
        """Return whether something as it was read is a row, and no empty line."""
        return not self.is_json or bool(raw.strip())

    def where(self, index: int) -> Callable[[], str]:
        return partial(self.place, index)


def choose_every(rows: Iterable[Row], origin: str) -> str:
    """Choose all columns."""
    return EVERY


def choose_text_column(rows: Iterable[Row], origin: str, wanted: str | None = None, takes_tokens: bool = False) -> str:
    """Return the column that holds the text: the wanted one, a usual name, or the only one that can be text.

    Args:
        rows: The first of them. Keys may be missing.
        origin: What named the rows, for messages.
        wanted: `--text_column`.
        takes_tokens: A column `input_ids` of token ids comes before all others.

    Raises:
        ValueError: There is no such column, or it cannot be told which one it is.
    """
    columns: dict[str, list[Any]] = {}
    for row in rows:
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    values = {name: [value for value in column if value is not None] for name, column in columns.items()}
    names = ", ".join(columns)
    if not columns:
        raise ValueError(f"{origin} is empty.")
    if takes_tokens and wanted in (None, TOKENS) and _why_not_text(values.get(TOKENS, [])) == "lists of int":
        return TOKENS
    if wanted is not None:
        if wanted not in columns:
            raise ValueError(f"--text_column {wanted} is not in {origin}. Its columns are {names}.")
        what = _why_not_text(values[wanted])
        if what is not None:
            more = _shape_of_examples({wanted: values[wanted]}) or f"Its columns are {names}."
            raise ValueError(f"--text_column {wanted} of {origin} holds {what}, not text. {more}")
        return wanted
    readable = [name for name, column in values.items() if column and not _why_not_text(column)]
    for name in TEXT_COLUMNS:
        if name in readable:
            return name
    shape = _shape_of_examples(values)
    if shape is not None:
        raise ValueError(f"{origin} is not plain text: its columns are {names}, and {shape}")
    candidates = [name for name in readable if _can_be_text(name, values[name])]
    if len(candidates) == 1 or len(columns) == len(readable) == 1:
        return (candidates or readable)[0]
    if not readable:
        found = ", ".join(f"{name} ({_why_not_text(column) or 'null'})" for name, column in values.items())
        raise ValueError(f"{origin} has no column of text: its columns are {found}.")
    question = f"Which column of {origin} is the text? Choose with --text_column from"
    if candidates:
        raise ValueError(f"{question} {', '.join(candidates)}.")
    shown = ", ".join(f"{name} (as in {textwrap.shorten(str(values[name][0]), 40)!r})" for name in readable)
    raise ValueError(f"{question} {', '.join(readable)}. None looks like text: {shown}.")


def _why_not_text(values: Sequence[Any]) -> str | None:
    """Return what a column holds where most of it is neither text nor turns; a few other rows are found when read."""
    kinds = Counter(map(_kind_of, values))
    most = max(kinds, key=lambda kind: kinds[kind], default=None)
    return most if kinds[None] * 2 <= len(values) else None


def _kind_of(value: Any) -> str | None:
    """Return what something is that is neither text nor turns."""
    if isinstance(value, list):
        kinds = Counter(_kind_of(each) for each in value if each is not None)
        others = [kind for kind in kinds if kind is not None]
        return f"lists of {others[0]}" if others and kinds[None] * 2 <= kinds.total() else None
    return None if isinstance(value, str) else type(value).__name__


def keys_of_objects(column: Sequence[Any]) -> list[str]:
    """Return the keys of the first object in the lists of a column: the two of a message, if it has them."""
    lists = (value for value in column if isinstance(value, list))
    first = next((each for value in lists for each in value if isinstance(each, dict)), {})
    return next((list(pair) for pair in MESSAGES if set(pair) <= set(first)), list(first))


def _shape_of_examples(values: Mapping[str, Sequence[Any]]) -> str | None:
    """Say which columns are chats, or parts of one example, and what reads them; None where there are none."""
    takes = "--text_column takes a column of text, or of turns that are texts."
    reads = f"abr sft learns from them. {takes}"
    for name, column in values.items():
        keys = keys_of_objects(column)
        if tuple(keys) in MESSAGES:
            return f"{name} holds messages with {' and '.join(keys)}. {reads}"
        if keys:
            return f"{name} holds lists of objects with {', '.join(keys)}. {takes}"
    pair = next((pair for pair in PAIRS if set(pair) <= set(values)), None)
    if pair is None:
        return None
    if "chosen" in pair:
        reads = f"Trainers of TRL learn from them, in Python. {takes}"
    return f"{' and '.join(pair)} are the parts of one example. {reads}"


def _can_be_text(name: str, values: Sequence[Any]) -> bool:
    """Tell prose from identifiers, labels and links, by name and by what stands there."""
    if name.lower() in NOT_TEXT or name.lower().endswith(("_id", "_url", "_hash", "_label", "_type")):
        return False
    texts = [turn for value in values for turn in (value if isinstance(value, list) else [value]) if turn]
    few_kinds = len(texts) >= 20 and len(set(texts)) * 10 <= len(texts) and max(map(len, texts)) < 20
    return not few_kinds and any(WORDS.search(text) or _is_unspaced_prose(text) for text in texts)


def _is_unspaced_prose(text: str) -> bool:
    """Whether a text without spaces can be a sentence, as in Chinese or Thai."""
    return len(text) >= 8 and sum(not character.isascii() for character in text) * 2 > len(text)


def parse_line(line: str, where: Callable[[], str]) -> dict[str, Any]:
    """Return the object in a line of JSON; an empty one for an empty line.

    Args:
        where: Says which line it is.

    Raises:
        BadRow: It is no JSON object.
    """
    if not line.strip():
        return {}
    try:
        row = json.loads(line)
    except ValueError as error:
        what = (
            f"{error.msg.removesuffix(' at')} at character {error.pos + 1}"
            if isinstance(error, json.JSONDecodeError)
            else str(error)
        )
        raise BadRow(f"{where()} cannot be read as JSON: {what}.") from error
    if not isinstance(row, dict):
        raise BadRow(f"{where()} holds {shortly(row)}, where a JSON object must be.")
    return row


def as_text(value: Any, where: Callable[[], str] = str) -> str:
    r"""Return a text as it is, and the turns of a dialogue on a line each.

    Args:
        where: Says which row it is.

    Raises:
        BadRow: It is neither.

    >>> as_text(["Hello . ", "Hi ."])
    'Hello .\nHi .'
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise BadRow(f"{where()} holds {shortly(value)}, where text or a list of turns must be.")
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, str):
            raise BadRow(f"{where()} holds {shortly(turn)} as turn {number}, where text must be.")
    return "\n".join(turn.strip() for turn in value)


def as_tokens(value: Any, where: Callable[[], str]) -> list[int]:
    """Return token ids as they are.

    Args:
        where: Says which row it is.

    Raises:
        BadRow: They are something else.
    """
    if not isinstance(value, list):
        raise BadRow(f"{where()} holds {shortly(value)}, where a list of token ids must be.")
    for position, token in enumerate(value, 1):
        if type(token) is not int:
            raise BadRow(f"{where()} holds {shortly(token)} as token {position}, where a token id must be.")
    return value


def check_tokens(ids: np.ndarray, vocabulary: int, where: Callable[[], str]) -> None:
    """Look whether all ids of a row are those of tokens.

    Args:
        vocabulary: How many ids there are.
        where: Says which row it is.

    Raises:
        BadRow: One is not.
    """
    if len(ids) == 0 or (ids.dtype.kind in "iu" and ids.min() >= 0 and ids.max() < vocabulary):
        return
    for position, token in enumerate(ids.tolist(), 1):  # null is None, or NaN
        if token is None or token != token or not 0 <= token < vocabulary:
            found = "null" if token is None or token != token else f"the token id {token:.0f}"
            raise BadRow(f"{where()} holds {found} as token {position}; the model has ids from 0 to {vocabulary - 1}.")


def shortly(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"the number {value}"
    kind = {type(None): "null", dict: "an object", list: "a list"}.get(type(value))
    return kind or textwrap.shorten(repr(value), 60, placeholder="...")
