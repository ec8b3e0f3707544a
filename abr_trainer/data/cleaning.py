"""Copy data files without some of their rows, and leave the other rows unchanged."""

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
"""Maps each byte to one character, so that reading and writing text changes no byte."""

CLOSING = re.compile(r'(?:[^"]|"")*+"')
"""The rest of a quoted cell, up to the quote that closes it."""

Piece = tuple[bool, str]
"""Whether a part of a file is a row (a header or an empty line of a table is not), and its text."""


def copy_without(path: Path, out: Path, numbers: Collection[int], counts_empty_lines: bool = True) -> int:
    """Write a copy of a file without the rows with these numbers (from 1), and return how many rows the file has.

    A row is a line of text, a line of JSON, a row of a table, or an element of a JSON list. The other rows are
    copied byte for byte, except that Parquet keeps only their values, and white space may change at the end of a
    JSON list. If the copy fails, no file is written.

    Args:
        counts_empty_lines: Count an empty line in a file of JSON lines as a row.

    Raises:
        ValueError: The file cannot be read or has fewer rows, or `out` has another format.
    """
    try:
        form = check_file(str(path))
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    name = _member(path, out)
    written_as = format_of(name)
    if (written_as.reader, written_as.separator) != (form.reader, form.separator):
        suffix = f"end in {form.suffix}" if form.suffix else "have no suffix"
        raise ValueError(f"{out} is a copy of {path.name}, so its name must {suffix}.")
    if form.reader == "parquet" and written_as.compression is not None:
        raise ValueError(f"{out}: a Parquet file cannot be read from a compressed file. Use the suffix .parquet.")
    draft = out.with_name(f".{os.getpid()}.{out.name}")  # with the same suffix, because it is read again
    try:
        if form.reader == "parquet":
            count = _copy_parquet(path, draft, numbers)
        else:
            count = _copy_text(path, draft, form.reader, name, numbers, counts_empty_lines)
        if numbers and max(numbers) > count:
            raise ValueError(f"{path} has changed: row {max(numbers):,} was dropped, but it has only {count:,} rows.")
        if form.reader == "csv":
            _check_cells(path, draft, numbers)
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)
    return count


def _member(path: Path, out: Path) -> str:
    """Return the name whose suffix gives the format to write; for a .zip, the name of the file inside it."""
    if out.suffix.lower() != ".zip":
        return str(out)
    return member_of(str(path)) if zipfile.is_zipfile(path) else out.stem


def texts_in(path: Path, numbers: Collection[int], counts_empty_lines: bool = True) -> dict[int, list[str]]:
    """Return the texts in these rows of a file, by row number. For JSON these are all string values, at any depth.

    Args:
        numbers: Numbers of rows, from 1. Rows that the file does not have are left out.
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
    """Return whether a file of JSON lines has empty lines; False for any other file."""
    return format_of(str(path)).reader == "json" and any(not is_row for is_row, _ in _pieces(path, "json", False))


def _texts_of_json(text: str) -> list[str]:
    """Return the strings in JSON; the text itself if it is not JSON."""
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
    # newline="" recognises the same line breaks as the reader, and keeps them.
    with open_bytes(str(path)) as stream, io.TextIOWrapper(stream, BYTES, newline="") as lines:
        if reader == "csv":
            yield from _records(lines, format_of(str(path)).separator)
        else:
            yield from ((reader == "text" or counts_empty_lines or bool(line.strip()), line) for line in lines)


def _records(lines: Iterable[str], separator: str) -> Iterator[Piece]:
    """Join the lines of a table into records, as pandas does: a quoted cell may contain line breaks."""
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
    """Tell whether a quoted cell continues on the next line."""
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
    """Yield the text before the elements of a JSON list, each element with its white space, and the text after them.

    Raises:
        ValueError: The file does not contain a JSON list.
    """
    with open_bytes(str(path)) as stream:
        text = stream.read().decode()
    decoder, space = json.JSONDecoder(), re.compile(r"[\ufeff \t\r\n]*")

    def skip(position: int) -> int:
        found = space.match(text, position)
        return found.end() if found else position

    at = skip(0)
    if text[at : at + 1] != "[":
        raise ValueError(f"{path} contains neither a JSON list of rows nor JSON lines.")
    yield _as_bytes(text[: at + 1])
    start, end = at + 1, skip(at + 1)
    while text[end : end + 1] != "]":
        try:
            _, end = decoder.raw_decode(text, skip(start))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        end = skip(end)
        if text[end : end + 1] not in (",", "]"):
            raise ValueError(f"{path} is not valid JSON: character {end + 1:,} must be a comma or a ].")
        yield _as_bytes(text[start:end])
        start = end + 1
    yield _as_bytes(text[end:])


def _as_bytes(text: str) -> str:
    return text.encode().decode(BYTES)


def _without(segments: list[str], numbers: Collection[int]) -> Iterator[str]:
    """Yield the parts of a JSON list without some elements; keep the white space before the ]."""
    before, *elements, behind = segments
    kept = [element for number, element in enumerate(elements, 1) if number not in numbers]
    yield before
    if kept:
        last = elements[-1]
        yield ",".join([*kept[:-1], kept[-1].rstrip() + last[len(last.rstrip()) :]])
    yield behind


def _check_cells(path: Path, draft: Path, numbers: Collection[int]) -> None:
    """Read a table and its copy, and compare their cells.

    Raises:
        ValueError: The copy is not the table without these rows.
    """
    before, after = (_all_cells(each) for each in (path, draft))
    stay = (row for number, row in enumerate(before, 1) if number not in numbers)
    if any(row != copied for row, copied in itertools.zip_longest(stay, after)):
        raise ValueError(f"{path}: cannot tell where its rows end. Save it again with quotes around all cells.")


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
    """Open a new file for writing, compressed according to its name.

    Args:
        name: Name of the file inside it, if it is a .zip.
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
