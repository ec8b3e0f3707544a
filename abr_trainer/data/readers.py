"""Read the rows of a file: find its format and compression, and report errors in one line."""

from __future__ import annotations

import contextlib
import csv
import glob
import io
import json
import logging
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.packaged_modules.text.text import Text, TextConfig
from fsspec.compression import compr

from .. import __version__
from ..records.errors import BadRow, one_line
from .identity import SOURCE_COLUMN, rows_of

TABLES = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
"""Reader for each suffix. A file with any other suffix is text, one row per line."""
COMPRESSIONS = {
    ".gz": "gzip",
    ".gzip": "gzip",
    ".bz2": "bz2",
    ".xz": "xz",
    ".zst": "zstd",
    ".zstd": "zstd",
    ".lz4": "lz4",
    ".zip": "zip",
}
PACKAGES = {"zstd": "zstandard", "lz4": "lz4"}
"""Packages that `fsspec` needs for compressions that the standard library lacks."""
DECOMPRESSING = (zlib.error, lzma.LZMAError)
"""Errors of decompressors that are no other errors."""
BINARY = {
    b"\x1f\x8b": "gzip: name it .gz",
    b"BZh": "bzip2: name it .bz2",
    b"\xfd7zXZ\0": "xz: name it .xz",
    b"\x28\xb5\x2f\xfd": "zstd: name it .zst",
    b"\x04\x22\x4d\x18": "lz4: name it .lz4",
    b"PK\x03\x04": "a ZIP archive, as are .docx, .xlsx and .odt: save it as text",
    b"%PDF": "PDF: save it as text",
    b"PAR1": "Parquet: name it .parquet",
    b"ARROW1": "Arrow: give the directory that save_to_disk wrote as --dataset_name",
    b"\xff\xfe": "UTF-16: save it as UTF-8",
    b"\xfe\xff": "UTF-16: save it as UTF-8",
}
"""First bytes of files that are not text, and what to do with such a file."""
SEPARATORS = {",": re.compile(r"[;\t|]"), "\t": re.compile(r"[;,|]")}
"""Characters that some files use between cells instead of the separator that their name stands for."""
HEAD = 1 << 16
"""Number of bytes to inspect before a file is read."""
UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Format:
    """How to read a file.

    Attributes:
        reader: "text", "json", "csv" or "parquet".
        suffix: The suffix that decides the reader, with its dot, in lower case, without that of the compression.
        compression: Name of the compression in `fsspec`.
    """

    reader: str
    suffix: str
    compression: str | None = None

    @property
    def separator(self) -> str:
        return "\t" if self.suffix == ".tsv" else ","


def format_of(path: str) -> Format:
    """Return how to read a file, by its name; for a .zip by the name of the file inside it.

    >>> format_of("rows.JSONL.gz")
    Format(reader='json', suffix='.jsonl', compression='gzip')
    >>> format_of("wiki.train.tokens").reader
    'text'
    """
    whole = Path(path)
    compression = COMPRESSIONS.get(whole.suffix.lower())
    names = [whole if compression is None else whole.with_suffix("")]
    if compression == "zip" and zipfile.is_zipfile(path):
        names = [*map(Path, _members(path)[:1]), *names]
    suffixes = [name.suffix.lower() for name in names]
    suffix = next((each for each in suffixes if each in TABLES), suffixes[0])
    return Format(TABLES.get(suffix, "text"), suffix, compression)


def _members(path: str) -> list[str]:
    """Return the names of the files in a .zip, without hidden files."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
    return [name for name in names if not Path(name).name.startswith((".", "__"))]


def member_of(path: str) -> str:
    """Return the name of the file inside a .zip that we read."""
    return _members(path)[0]


@contextlib.contextmanager
def open_bytes(path: str) -> Iterator[IO[bytes]]:
    """Open a file and decompress it if necessary."""
    compression = format_of(path).compression
    with contextlib.ExitStack() as stack:
        if compression == "zip":
            archive = stack.enter_context(zipfile.ZipFile(path))
            yield stack.enter_context(archive.open(member_of(path)))
            return
        raw: IO[bytes] = stack.enter_context(open(path, "rb"))
        yield raw if compression is None else stack.enter_context(compr[compression](raw, mode="rb"))


def check_file(path: str) -> Format:
    """Check the first bytes of a file, and return how to read it.

    Raises:
        ValueError: It is empty or has another format than its name says. The message continues after the file's name.
    """
    form = format_of(path)
    if Path(path).stat().st_size == 0:
        raise ValueError("is empty.")
    if form.reader == "parquet":
        if form.compression is not None:
            raise ValueError("is a compressed Parquet file, which cannot be read. Decompress it.")
        return form
    if form.compression not in (None, "zip", *compr):
        package = PACKAGES.get(str(form.compression), form.compression)
        raise ValueError(f"is compressed with {form.compression}, which needs a package: pip install {package}")
    if form.compression == "zip" and zipfile.is_zipfile(path) and len(_members(path)) != 1:
        raise ValueError(f"holds {len(_members(path))} files, but must hold one. Unpack it.")
    try:
        with open_bytes(path) as stream:
            head = stream.read(HEAD)
    except Exception as error:  # each decompressor raises errors of its own
        raise ValueError(f"cannot be read: {one_line(error)}") from error
    if not head:
        raise ValueError("is empty.")
    for begin, what in BINARY.items():
        if head.startswith(begin):
            raise ValueError(f"is not text but {what}.")
    if b"\0" in head:
        raise ValueError("is not text but binary data: it contains zero bytes.")
    return form


def what_is_wrong(paths: Sequence[str], error: Exception) -> str:
    """Explain in one line an error from a reader of these files, with the line or row where it occurred."""
    if isinstance(error, BadRow):
        return str(error)
    cells = re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", str(error))
    if cells:
        columns, line, found = cells.groups()
        return f"line {line} has {found} cells, but the header has {columns}. Quote cells that contain the separator."
    quote = re.search(r"EOF inside string starting at row (\d+)", str(error))
    if quote:
        return f"row {quote[1]} has a quote that is not closed."
    if found := next(filter(None, map(find_bad_object, paths)), None):
        return found
    if isinstance(error, ValueError):  # a byte that is not UTF-8 may be the cause
        texts = (path for path in paths if format_of(path).reader != "parquet")
        return next(filter(None, map(find_bad_bytes, texts)), one_line(error))
    return one_line(error)


def find_bad_object(path: str) -> str | None:
    """Describe what is wrong with a file of one JSON value, which must be a list of objects; None if nothing is."""
    if format_of(path).suffix != ".json" or holds_json_lines(path):
        return None
    try:
        with open_bytes(path) as stream:
            rows = json.loads(stream.read().decode("utf-8-sig"))
    except UnicodeDecodeError:
        return None  # which is described elsewhere
    except json.JSONDecodeError as error:
        return f"line {error.lineno}, character {error.colno}: {error.msg}."
    except RecursionError:
        return "its values are nested too deeply."
    if not isinstance(rows, list):
        return "it must contain a list of rows, or one row per line."
    number = next((number for number, row in enumerate(rows, 1) if not isinstance(row, dict)), None)
    return None if number is None else f"row {number} is {rows[number - 1]!r:.60}. It must be a JSON object."


def find_bad_bytes(path: str) -> str | None:
    """Describe the first line of a file that is not UTF-8; None if there is none. Reads the file up to that line."""
    with open_bytes(path) as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                byte = f"0x{line[error.start]:02x}"
                return f"line {number} of {Path(path).name} has {byte}, which is not UTF-8. Save it as UTF-8."
    return None


def count_lines(path: str) -> int:
    """Return the number of lines in a file. Reads all of it."""
    with open_bytes(path) as stream:
        return sum(1 for _ in stream)


def holds_json_lines(path: str) -> bool:
    """Return whether a file has a JSON value per line, rather than one value over several lines."""
    with open_bytes(path) as stream:
        first = next((line for line in stream if line.removeprefix(UTF8_BOM).strip()), b"").removeprefix(UTF8_BOM)
    if first.lstrip().startswith(b"["):
        return False
    if format_of(path).suffix != ".json":
        return True
    try:
        json.loads(first)
    except ValueError:
        return False
    return True


def read_cells(path: str, rows: int) -> Iterator[pd.DataFrame]:
    """Read a .csv or .tsv in chunks of `rows` rows, with all cells as text.

    Raises:
        ValueError: It cannot be read, for example because a row has more or fewer cells than the header.
    """
    separator, is_checked = format_of(path).separator, False
    _refuse_columns_that_stand_twice(path)
    with (
        open_bytes(path) as stream,
        pd.read_csv(stream, sep=separator, dtype=object, keep_default_na=False, chunksize=rows) as frames,
    ):
        for frame in frames:
            # If row 1 is too long, pandas uses the first cells of all rows as the index.
            if not isinstance(frame.index, pd.RangeIndex):
                raise BadRow("row 1 has more cells than the header. Quote cells that contain the separator.")
            if len(frame.columns) == 1 and (found := SEPARATORS[separator].search(str(frame.columns[0]))):
                wanted, other = ("commas", ".tsv") if separator == "," else ("tabs", ".csv")
                raise BadRow(
                    f"its header has only one column, {str(frame.columns[0])!r}. Separate cells with {wanted}, not "
                    f"{found[0]!r}; if they are separated with {'tabs' if wanted == 'commas' else 'commas'}, name "
                    f"the file {other}."
                )
            # A short row ends with an empty cell for pandas, too.
            if not is_checked and len(frame.columns) > 1 and (frame.iloc[:, -1] == "").any():
                _refuse_short_rows(path)
                is_checked = True
            yield frame


def _records(path: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a .csv or .tsv that are not blank, the header first, each with the line on which it ends."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        with open_bytes(path) as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
            lines = csv.reader(text, delimiter=format_of(path).separator)
            yield from ((lines.line_num, cells) for cells in lines if cells)
    except csv.Error as error:
        raise BadRow(f"it cannot be read: {error}.") from error
    finally:
        csv.field_size_limit(limit)


def _refuse_columns_that_stand_twice(path: str) -> None:
    """Refuse a table with two columns of a name: pandas would rename the second.

    Raises:
        BadRow: There are such columns.
    """
    _, header = next(_records(path), (0, []))
    if twice := next((name for name in header if name and header.count(name) > 1), None):
        raise BadRow(f"its header has the column {twice!r} twice. Remove or rename one.")


def _refuse_short_rows(path: str) -> None:
    """Refuse a table of which a row has fewer cells than the header: pandas would take the others to be empty.

    Raises:
        BadRow: There is such a row, as where a cell has a line break and is not quoted.
    """
    records = _records(path)
    _, header = next(records, (0, []))
    short = next(((line, len(cells)) for line, cells in records if len(cells) < len(header)), None)
    if short:
        line, count = short
        what = f"line {line} has {count} cell{'s' * (count > 1)}, but the header has {len(header)}"
        raise BadRow(f"{what}. Quote cells that contain a line break, and give empty cells their separators.")


Tables = Iterator[tuple[tuple[int, int], pa.Table]]


class _OneLine:
    """Turn a reader's errors into one line, also in the middle of a stream."""

    def _generate_tables(self, *args: Any, **options: Any) -> Tables:
        try:
            for key, table in super()._generate_tables(*args, **options):  # type: ignore[misc]
                table.validate(full=True)  # finds text that is not UTF-8 now, not when it is used
                yield key, table
        except BadRow:
            raise
        except (ValueError, TypeError, AttributeError, OSError, EOFError, RuntimeError, *DECOMPRESSING) as error:
            paths = options.get("base_files") or options["files"]
            raise BadRow(what_is_wrong(paths, error)) from error


@dataclass
class RowConfig(TextConfig):
    """How to read rows.

    Attributes:
        column: The column to read.
        is_numbered: Record in `SOURCE_COLUMN` which row of which file each row is, also if workers share the files.
    """

    column: str = "text"
    is_numbered: bool = False


class _Rows(Text):
    """Rows with one column."""

    BUILDER_CONFIG_CLASS = RowConfig

    def _table(self, rows: Any, path: str, first: int) -> pa.Table:
        """Return rows of a file as a table.

        Args:
            first: Number of rows of the file before them.
        """
        columns = {self.config.column: rows}
        if self.config.is_numbered:
            file = self.config.data_files["train"].index(path)
            columns[SOURCE_COLUMN] = rows_of(file, np.arange(first + 1, first + len(rows) + 1))
        return pa.table(columns)


class _Lines(_Rows):
    """Each row is a line, including its line break."""

    def _generate_tables(self, base_files: list[str], files_iterables: Any) -> Tables:
        for shard, path in enumerate(base_files):
            with open_bytes(path) as stream, io.TextIOWrapper(stream, "utf-8-sig") as text:
                batch = count = 0
                while lines := text.readlines(self.config.chunksize):
                    yield (shard, batch), self._table(lines, path, count)
                    batch, count = batch + 1, count + len(lines)


class _Cells(_Rows):
    """Each row is one cell of a table; the other cells are ignored."""

    def _generate_tables(self, base_files: list[str], files_iterables: Any) -> Tables:
        column = self.config.column
        for shard, path in enumerate(base_files):
            try:
                count = 0
                for batch, frame in enumerate(read_cells(path, 10_000)):
                    if column not in frame:
                        raise BadRow(f"there is no column {column}.")
                    cells = pa.array(frame[column], pa.string(), from_pandas=True)
                    yield (shard, batch), self._table(cells, path, count)
                    count += len(cells)
            except ValueError as error:
                of_many = "" if len(base_files) == 1 else f"{Path(path).name}: "
                raise BadRow(of_many + what_is_wrong([path], error)) from error


class LineReader(_OneLine, _Lines):
    """Reads text, one row per line."""


class CellReader(_OneLine, _Cells):
    """Reads one column of .csv and .tsv files."""


class JsonReader(_OneLine, Json):
    """Reads JSON."""


class CsvReader(_OneLine, Csv):
    """Reads .csv and .tsv files."""


class ParquetReader(_OneLine, Parquet):
    """Reads Parquet."""


READERS = {"text": LineReader, "json": JsonReader, "csv": CsvReader, "parquet": ParquetReader, "cell": CellReader}


def read_files(reader: str, paths: Sequence[str], streaming: bool, **options: Any) -> Dataset | IterableDataset:
    """Return the rows of these files, or a stream of them.

    Raises:
        BadRow: They cannot be read; a stream raises it when it reaches the row.
    """
    data_files = {"train": [glob.escape(path) for path in paths]}
    # Name and hash identify the cache. The hash is our version, so that no other version's cache is used.
    builder: Any = READERS[reader](dataset_name=f"abr_{reader}", hash=__version__, data_files=data_files, **options)
    reports = logging.getLogger("datasets.packaged_modules")
    level = reports.level
    reports.setLevel(logging.CRITICAL)  # an error is raised as well
    try:
        if streaming:
            return builder.as_streaming_dataset(split="train")
        builder.download_and_prepare()
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, BadRow):
            raise error.__cause__ from error
        raise
    finally:
        reports.setLevel(level)
    if not builder.info.splits["train"].num_examples:  # `datasets` cannot build an empty data set
        return Dataset.from_dict({})
    return builder.as_dataset(split="train")
