"""Find the text column of a table, and check what its rows hold."""

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
"""Used in place of a column's name to mean all columns."""
TEXT_COLUMNS = ("text", "dialog", "content", "sentence")
NOT_TEXT = {
    *("author", "category", "checksum", "created", "date", "doc_id", "domain", "file", "filename", "hash", "id"),
    *("idx", "index", "key", "label", "lang", "language", "license", "md5", "meta", "metadata", "model", "name"),
    *("path", "role", "sha", "sha1", "sha256", "source", "split", "subset", "tag", "tags", "timestamp", "topic"),
    *("type", "uid", "uri", "url", "user", "uuid", "warc_id"),
}
"""Columns with these names hold metadata. They are used as text only if there is no other column."""
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
"""Columns that together form one example. A table may have other columns, too."""
EXAMPLES = 100
"""Number of rows to inspect when looking for the text column."""

WORDS = re.compile(r"\S\s+\S")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Place:
    """Turns the index of a row into its name for messages.

    Attributes:
        origin: The flag or file that the rows come from.
        files: If rows are lines, the files with these lines.
        first: Number of rows before the first one.
        of_hundred: Which rows of each hundred are used.
    """

    origin: str
    files: tuple[str, ...] = ()
    first: int = 0
    of_hundred: range = range(100)

    def __call__(self, index: int) -> str:
        return f"{self.number(index)} of {self.origin}"

    @property
    def source(self) -> str:
        """The file that the rows come from, or `origin` if it is not a file."""
        named = self.origin.partition(" ")[2]
        return named if self.origin.startswith("--") and Path(named).is_file() else self.origin

    def rows(self, indices: Sequence[int]) -> IntArray:
        """Return the numbers of these rows, from 1."""
        hundreds, rests = np.divmod(np.asarray(indices, dtype=np.int64), len(self.of_hundred))
        numbers: IntArray = self.first + hundreds * 100 + np.asarray(self.of_hundred)[rests] + 1
        return numbers

    def number(self, index: int) -> str:
        """Return which row or line it is, without the origin."""
        [number] = self.rows([index]).tolist()
        worker = get_worker_info()
        if len(self.files) != 1 and worker is not None and worker.num_workers > 1:  # workers share the files
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
    """The column to read, and where its rows come from.

    Attributes:
        name: The column, or the key of the JSON objects, that holds the text or the tokens.
        is_json: Each row is a line of JSON in a column `text`.
    """

    name: str
    place: Place
    is_json: bool = False

    def values(self, batch: dict[str, list[Any]], indices: Iterable[int]) -> list[Any]:
        """Return the values of the column; None for null, an empty list, an empty line, or a missing key.

        Raises:
            BadRow: A line is not a JSON object.
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
        """Return whether a raw value is a row, not an empty line."""
        return not self.is_json or bool(raw.strip())

    def where(self, index: int) -> Callable[[], str]:
        return partial(self.place, index)


def choose_every(rows: Iterable[Row], origin: str) -> str:
    """Choose all columns."""
    return EVERY


def choose_text_column(rows: Iterable[Row], origin: str, wanted: str | None = None, takes_tokens: bool = False) -> str:
    """Return the column that holds the text: the wanted one, a usual name, or the only one that can be text.

    Args:
        rows: The first rows. Keys may be missing.
        origin: The flag or file that the rows come from, for messages.
        wanted: `--text_column`.
        takes_tokens: Prefer a column `input_ids` of token ids to all others.

    Raises:
        ValueError: There is no such column, or more than one.
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
        raise ValueError(f"{origin} has no text column: its columns are {found}.")
    question = f"Which column of {origin} is the text? Choose with --text_column from"
    if candidates:
        raise ValueError(f"{question} {', '.join(candidates)}.")
    shown = ", ".join(f"{name} (as in {textwrap.shorten(str(values[name][0]), 40)!r})" for name in readable)
    raise ValueError(f"{question} {', '.join(readable)}. None looks like text: {shown}.")


def _why_not_text(values: Sequence[Any]) -> str | None:
    """Return the type of a column's values if most are neither text nor turns; else None. Reading checks each row."""
    kinds = Counter(map(_kind_of, values))
    most = max(kinds, key=lambda kind: kinds[kind], default=None)
    return most if kinds[None] * 2 <= len(values) else None


def _kind_of(value: Any) -> str | None:
    """Return the type of a value that is neither text nor turns; None for text or turns."""
    if isinstance(value, list):
        kinds = Counter(_kind_of(each) for each in value if each is not None)
        others = [kind for kind in kinds if kind is not None]
        return f"lists of {others[0]}" if others and kinds[None] * 2 <= kinds.total() else None
    return None if isinstance(value, str) else type(value).__name__


def keys_of_objects(column: Sequence[Any]) -> list[str]:
    """Return the keys of the first object in a column of lists; only the two keys of a message, if it has them."""
    lists = (value for value in column if isinstance(value, list))
    first = next((each for value in lists for each in value if isinstance(each, dict)), {})
    return next((list(pair) for pair in MESSAGES if set(pair) <= set(first)), list(first))


def _shape_of_examples(values: Mapping[str, Sequence[Any]]) -> str | None:
    """Return a hint if columns hold chats or parts of one example: which, and what to do. None if there are none."""
    takes = "--text_column takes a column of text, or of lists of texts."
    reads = f"abr sft trains on them. {takes}"
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
        reads = f"TRL's trainers can train on them, in Python. {takes}"
    return f"{' and '.join(pair)} are the parts of one example. {reads}"


def _can_be_text(name: str, values: Sequence[Any]) -> bool:
    """Tell prose from identifiers, labels and links by the column's name and values."""
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
        where: Returns the name of the line for messages.

    Raises:
        BadRow: The line is not a JSON object.
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
        raise BadRow(f"{where()} has {shortly(row)}. It must be a JSON object.")
    return row


def as_text(value: Any, where: Callable[[], str] = str) -> str:
    r"""Return a text unchanged; join the turns of a dialogue with line breaks.

    Args:
        where: Returns the name of the row for messages.

    Raises:
        BadRow: The value is neither.

    >>> as_text(["Hello . ", "Hi ."])
    'Hello .\nHi .'
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise BadRow(f"{where()} has {shortly(value)}. It must be text or a list of turns.")
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, str):
            raise BadRow(f"{where()} has {shortly(turn)} as turn {number}. It must be text.")
    return "\n".join(turn.strip() for turn in value)


def as_tokens(value: Any, where: Callable[[], str]) -> list[int]:
    """Return a value unchanged if it is a list of token ids.

    Args:
        where: Returns the name of the row for messages.

    Raises:
        BadRow: It is not.
    """
    if not isinstance(value, list):
        raise BadRow(f"{where()} has {shortly(value)}. It must be a list of token ids.")
    for position, token in enumerate(value, 1):
        if type(token) is not int:
            raise BadRow(f"{where()} has {shortly(token)} as token {position}. It must be a token id.")
    return value


def check_tokens(ids: np.ndarray, vocabulary: int, where: Callable[[], str]) -> None:
    """Check that all token ids of a row are in the vocabulary.

    Args:
        vocabulary: Size of the vocabulary.
        where: Returns the name of the row for messages.

    Raises:
        BadRow: One is not.
    """
    if len(ids) == 0 or (ids.dtype.kind in "iu" and ids.min() >= 0 and ids.max() < vocabulary):
        return
    for position, token in enumerate(ids.tolist(), 1):  # null is None, or NaN
        if token is None or token != token or not 0 <= token < vocabulary:
            found = "null" if token is None or token != token else f"the token id {token:.0f}"
            raise BadRow(f"{where()} has {found} as token {position}; the model has ids from 0 to {vocabulary - 1}.")


def shortly(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"the number {value}"
    kind = {type(None): "null", dict: "an object", list: "a list"}.get(type(value))
    return kind or textwrap.shorten(repr(value), 60, placeholder="...")
