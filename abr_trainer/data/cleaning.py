"""Copies of data files without some of their rows: what stays is as it was."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow.parquet as pq
from fsspec.compression import compr

from .readers import UTF8_BOM, check_file, format_of, holds_json_lines, member_of, open_bytes, read_cells

BYTES = "latin-1"
"""A letter for each byte: what is read and written by it stays as it was."""

CLOSING = re.compile(r'(?:[^"]|"")*+"')
"""The rest of a quoted cell, up to the quote that closes it."""

Piece = tuple[bool, str]
"""A part of a file, and whether it is a row; a header or an empty line of a table is none."""


def copy_without(path: Path, out: Path, numbers: Collection[int], counts_empty_lines: bool = True) -> int:
    """Write a copy of a file without the rows of these numbers, from 1, and return how many rows the file has.

    A row is a line of text or of JSON, a row of a table, an element of a JSON list. What stays is the same byte for
    byte, except in Parquet, of which the values stay, and at the end of a JSON list. A copy that fails leaves nothing
    behind.

    Args:
        counts_empty_lines: An empty line of JSON lines is a row.

    Raises:
        ValueError: The file cannot be read, has fewer rows, or `out` is of another format. The message names both.
    """
    try:
        form = check_file(str(path))
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    name = _member(path, out)
    written_as = format_of(name)
    if (written_as.reader, written_as.separator) != (form.reader, form.separator):
        raise ValueError(f"{out} must be named as {path.name} is, {form.suffix or 'without a suffix'}: it is a copy.")
    if form.reader == "parquet" and written_as.compression is not None:
        raise ValueError(f"{out}: Parquet is compressed inside, and is not read from another file. Name it .parquet.")
    draft = out.with_name(f".{os.getpid()}.{out.name}")  # the same suffix, by which it is read again
    try:
        if form.reader == "parquet":
            count = _copy_parquet(path, draft, numbers)
        else:
            count = _copy_text(path, draft, form.reader, name, numbers, counts_empty_lines)
        if numbers and max(numbers) > count:
            raise ValueError(f"{path} has {count:,} rows, and row {max(numbers):,} was dropped: it has changed since.")
        if form.reader == "csv":
            _check_cells(path, draft, numbers)
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)
    return count


def _member(path: Path, out: Path) -> str:
    """Return the name that tells the format of what is written: that of the file inside, for a .zip."""
    if out.suffix.lower() != ".zip":
        return str(out)
    return member_of(str(path)) if zipfile.is_zipfile(path) else out.stem


def texts_in(path: Path, numbers: Collection[int], counts_empty_lines: bool = True) -> dict[int, list[str]]:
    """Return the texts in these rows of a file, by number, as far as it has them: of JSON those that are values.

    Args:
        counts_empty_lines: See `copy_without`.
    """
    form = format_of(str(path))
    if form.reader == "parquet":
        return {number: list(_texts(row)) for number, row in _parquet_rows(path) if number in numbers}
    rows = (piece for is_row, piece in _pieces(path, form.reader, counts_empty_lines) if is_row)
    found = {number: piece for number, piece in enumerate(rows, 1) if number in numbers}
    texts = _texts_of_json if form.reader == "json" else lambda text: [text]
    return {number: texts(piece.encode(BYTES).decode(errors="replace")) for number, piece in found.items()}


def has_empty_lines(path: Path) -> bool:
    """Return whether a file of JSON lines has empty ones; False for another file."""
    return format_of(str(path)).reader == "json" and any(not is_row for is_row, _ in _pieces(path, "json", False))


def _texts_of_json(text: str) -> list[str]:
    """Return the texts in JSON; the whole if it is none."""
    try:
        return list(_texts(json.loads(text.removeprefix("\ufeff"))))
    except ValueError:
        return [text]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


# ---- Text, JSON and tables of text ----


def _copy_text(
    path: Path, draft: Path, reader: str, name: str, numbers: Collection[int], counts_empty_lines: bool
) -> int:
    count = 0
    with _created(draft, name) as copy:
        if _is_list(path, reader):
            segments = list(_list_segments(path))
            count = len(segments) - 2
            copy.write("".join(_without(segments, numbers)).encode(BYTES))
            return count
        for is_row, piece in _pieces(path, reader, counts_empty_lines):
            count += is_row
            if not is_row or count not in numbers:
                copy.write(piece.encode(BYTES))
    return count


def _is_list(path: Path, reader: str) -> bool:
    return reader == "json" and not holds_json_lines(str(path))


def _pieces(path: Path, reader: str, counts_empty_lines: bool) -> Iterator[Piece]:
    if _is_list(path, reader):
        yield from ((True, element) for element in list(_list_segments(path))[1:-1])
        return
    # With this it knows the same line breaks as the reader, and keeps them.
    with open_bytes(str(path)) as stream, io.TextIOWrapper(stream, BYTES, newline="") as lines:
        if reader == "csv":
            yield from _records(lines, format_of(str(path)).separator)
        else:
            yield from ((reader == "text" or counts_empty_lines or bool(line.strip()), line) for line in lines)


def _records(lines: Iterable[str], separator: str) -> Iterator[Piece]:
    """Put the lines of a table together to records, as pandas does: a quoted cell may hold line breaks."""
    record: list[str] = []
    is_open, has_header = False, False
    quote = re.compile(rf'(?:(?<={separator})|\A)"')
    for line in lines:
        start = line.removeprefix(UTF8_BOM.decode(BYTES)) if not has_header and not record else line
        is_open = _ends_in_quotes(start, is_open, quote)
        record.append(line)
        if not is_open:
            whole = "".join(record)
            is_blank = not start.strip(" \t".replace(separator, "") + "\r\n") and len(record) == 1
            yield has_header and not is_blank, whole
            has_header = has_header or not is_blank
            record = []
    if record:
        yield has_header, "".join(record)


def _ends_in_quotes(line: str, is_open: bool, opening: re.Pattern[str]) -> bool:
    """Tell whether a quoted cell goes on in the next line."""
    position = 0
    while True:
        if not is_open:
            found = opening.search(line, position)
            if found is None:
                return False
            position = found.end()
        closed = CLOSING.match(line, position)
        if closed is None:
            return True
        position, is_open = closed.end(), False


def _list_segments(path: Path) -> Iterator[str]:
    """Yield what stands before a JSON list, each element with the white space around it, and what stands behind.

    Raises:
        ValueError: The file holds something else.
    """
    with open_bytes(str(path)) as stream:
        text = stream.read().decode()
    decoder, space = json.JSONDecoder(), re.compile(r"[\ufeff \t\r\n]*")

    def skip(position: int) -> int:
        found = space.match(text, position)
        return found.end() if found else position

    at = skip(0)
    if text[at : at + 1] != "[":
        raise ValueError(f"{path} holds no JSON list of rows and no JSON lines: its rows cannot be told apart.")
    yield _as_bytes(text[: at + 1])
    start, end = at + 1, skip(at + 1)
    while text[end : end + 1] != "]":
        try:
            _, end = decoder.raw_decode(text, skip(start))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
        end = skip(end)
        if text[end : end + 1] not in (",", "]"):
            raise ValueError(f"{path} is no JSON: there is neither a comma nor a ] at character {end + 1:,}.")
        yield _as_bytes(text[start:end])
        start = end + 1
    yield _as_bytes(text[end:])


def _as_bytes(text: str) -> str:
    return text.encode().decode(BYTES)


def _without(segments: list[str], numbers: Collection[int]) -> Iterator[str]:
    """Yield the parts of a JSON list without some elements; white space before the ] stays."""
    before, *elements, behind = segments
    kept = [element for number, element in enumerate(elements, 1) if number not in numbers]
    yield before
    if kept:
        last = elements[-1]
        yield ",".join([*kept[:-1], kept[-1].rstrip() + last[len(last.rstrip()) :]])
    yield behind


def _check_cells(path: Path, draft: Path, numbers: Collection[int]) -> None:
    """Read a table and its copy again, and compare them.

    Raises:
        ValueError: The copy is not the table without these rows.
    """
    before, after = (_all_cells(each) for each in (path, draft))
    stay = (row for number, row in enumerate(before, 1) if number not in numbers)
    if any(row != copied for row, copied in itertools.zip_longest(stay, after)):
        raise ValueError(f"{path}: its rows cannot be told apart. Save it once more, with quotes around all cells.")


def _all_cells(path: Path) -> Iterator[tuple[Any, ...]]:
    for frame in read_cells(str(path), 10_000):
        yield from frame.fillna("").itertuples(index=False, name=None)


# ---- Parquet ----


def _copy_parquet(path: Path, draft: Path, numbers: Collection[int]) -> int:
    count = 0
    with pq.ParquetFile(path) as table:
        groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
        columns = [groups[0].column(i) for i in range(groups[0].num_columns)] if groups else []
        compression = {each.path_in_schema: each.compression.replace("UNCOMPRESSED", "NONE") for each in columns}
        with pq.ParquetWriter(draft, table.schema_arrow, compression=compression or "snappy") as copy:
            for i in range(table.num_row_groups):
                group = table.read_row_group(i)
                kept = [row for row in range(len(group)) if count + row + 1 not in numbers]
                count += len(group)
                if kept:
                    copy.write_table(group.take(kept))
    return count


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with pq.ParquetFile(path) as table:
        number = itertools.count(1)
        for batch in table.iter_batches():
            for row in batch.to_pylist():
                yield next(number), row


# ---- Files that are written ----


@contextlib.contextmanager
def _created(draft: Path, name: str) -> Iterator[IO[bytes]]:
    """Open a new file for what it is to hold, compressed as its name says.

    Args:
        name: Of the file in it, for a .zip.
    """
    compression = format_of(draft.name).compression
    with contextlib.ExitStack() as stack:
        raw: IO[bytes] = stack.enter_context(draft.open("xb"))
        if compression is None:
            yield raw
        elif compression == "zip":
            archive = stack.enter_context(zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED))
            yield stack.enter_context(archive.open(Path(name).name, "w"))
        else:
            opened: Callable[..., IO[bytes]] = compr[compression]
            yield stack.enter_context(opened(raw, mode="wb"))
