"""From a file to rows: its format, its compression, and one line about what is wrong with it."""

from __future__ import annotations

import contextlib
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
"""How a file with this suffix is read; one with any other is text, a row a line."""
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
"""What `fsspec` needs for a compression, where the standard library does not have it."""
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
"""What the first bytes of a file that is no text say."""
SEPARATORS = re.compile(r"[;\t|]")
"""What separates cells in files that are called .csv, beside commas."""
HEAD = 1 << 16
"""Bytes of a file that are looked at before it is read."""
UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Format:
    """How a file is read.

    Attributes:
        reader: "text", "json", "csv" or "parquet".
        suffix: What tells the reader, with its dot, in lower case; that of the compressed file if there is one.
        compression: What it is compressed with, as `fsspec` calls it.
    """

    reader: str
    suffix: str
    compression: str | None = None

    @property
    def separator(self) -> str:
        return "\t" if self.suffix == ".tsv" else ","


def format_of(path: str) -> Format:
    """Return how a file is read, by its name; by that of the one file in it for a .zip.

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
    """Return the names of the files in a .zip, without what a file manager hides there."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
    return [name for name in names if not Path(name).name.startswith((".", "__"))]


def member_of(path: str) -> str:
    """Return the name of the file in a .zip that is read."""
    return _members(path)[0]


@contextlib.contextmanager
def open_bytes(path: str) -> Iterator[IO[bytes]]:
    """Open a file for its bytes, decompressed."""
    compression = format_of(path).compression
    with contextlib.ExitStack() as stack:
        if compression == "zip":
            archive = stack.enter_context(zipfile.ZipFile(path))
            yield stack.enter_context(archive.open(member_of(path)))
            return
        raw: IO[bytes] = stack.enter_context(open(path, "rb"))
        yield raw if compression is None else stack.enter_context(compr[compression](raw, mode="rb"))


def check_file(path: str) -> Format:
    """Look at the beginning of a file, and return how it is read.

    Raises:
        ValueError: It is empty or not what its name says; the message goes on after the name of the file.
    """
    form = format_of(path)
    if Path(path).stat().st_size == 0:
        raise ValueError("is empty.")
    if form.reader == "parquet":
        if form.compression is not None:
            raise ValueError("is compressed Parquet, which has no reader: decompress it.")
        return form
    if form.compression not in (None, "zip", *compr):
        package = PACKAGES.get(str(form.compression), form.compression)
        raise ValueError(f"is compressed with {form.compression}, which needs a package: pip install {package}")
    if form.compression == "zip" and zipfile.is_zipfile(path) and len(_members(path)) != 1:
        raise ValueError(f"must hold one file, and holds {len(_members(path))}: unpack it.")
    try:
        with open_bytes(path) as stream:
            head = stream.read(HEAD)
    except Exception as error:  # each decompressor has its own
        raise ValueError(f"cannot be read: {one_line(error)}") from error
    if not head:
        raise ValueError("is empty.")
    for begin, what in BINARY.items():
        if head.startswith(begin):
            raise ValueError(f"is not text but {what}.")
    if b"\0" in head:
        raise ValueError("is not text but binary data: it holds zero bytes.")
    return form


def what_is_wrong(paths: Sequence[str], error: Exception) -> str:
    """Return what an error of a reader of these files means, and where it lies."""
    if isinstance(error, BadRow):
        return str(error)
    cells = re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", str(error))
    if cells:
        columns, line, found = cells.groups()
        return f"line {line} has {found} cells, and the header {columns}. Quote cells that hold the separator."
    quote = re.search(r"EOF inside string starting at row (\d+)", str(error))
    if quote:
        return f"row {quote[1]} opens a quote that is never closed."
    if isinstance(error, ValueError):  # which a byte may be the cause of
        texts = (path for path in paths if format_of(path).reader != "parquet")
        return next(filter(None, map(find_bad_bytes, texts)), one_line(error))
    return one_line(error)


def find_bad_bytes(path: str) -> str | None:
    """Return which line of a file is the first that is not UTF-8, if there is one. Reads up to it."""
    with open_bytes(path) as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                byte = f"0x{line[error.start]:02x}"
                return f"line {number} of {Path(path).name} holds {byte}, which is not UTF-8. Save it as UTF-8."
    return None


def count_lines(path: str) -> int:
    """Return how many lines a file has. Reads all of it."""
    with open_bytes(path) as stream:
        return sum(1 for _ in stream)


def holds_json_lines(path: str) -> bool:
    """Return whether a file has a JSON value in each line, as opposed to one value in many."""
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
    """Read a .csv or .tsv, so many rows at a time; a cell is text, whatever it says.

    Raises:
        ValueError: It cannot be read, for one because a row has more cells than the header.
    """
    separator = format_of(path).separator
    with (
        open_bytes(path) as stream,
        pd.read_csv(stream, sep=separator, dtype=object, keep_default_na=False, chunksize=rows) as frames,
    ):
        for frame in frames:
            # Where row 1 is too long, pandas takes the first cells of all rows for their names.
            if not isinstance(frame.index, pd.RangeIndex):
                raise BadRow("row 1 has more cells than the header. Quote cells that hold the separator.")
            if len(frame.columns) == 1 and (found := SEPARATORS.search(str(frame.columns[0]))):
                raise BadRow(
                    f"its header is one column, {str(frame.columns[0])!r}. Separate cells by commas, not by "
                    f"{found[0]!r}; with tabs, name the file .tsv."
                )
            yield frame


Tables = Iterator[tuple[tuple[int, int], pa.Table]]


class _OneLine:
    """Let a reader of files end with one line, also in the middle of a stream."""

    def _generate_tables(self, *args: Any, **options: Any) -> Tables:
        try:
            for key, table in super()._generate_tables(*args, **options):  # type: ignore[misc]
                table.validate(full=True)  # text that is not UTF-8 would be found when it is used
                yield key, table
        except BadRow:
            raise
        except (ValueError, OSError, EOFError, RuntimeError, zlib.error, lzma.LZMAError) as error:
            paths = options.get("base_files") or options["files"]
            raise BadRow(what_is_wrong(paths, error)) from error


@dataclass
class RowConfig(TextConfig):
    """How rows are read.

    Attributes:
        column: Which column is read.
        is_numbered: Each row says by `SOURCE_COLUMN` which row of which file it is, whoever reads which files.
    """

    column: str = "text"
    is_numbered: bool = False


class _Rows(Text):
    """A row has one column."""

    BUILDER_CONFIG_CLASS = RowConfig

    def _table(self, rows: Any, path: str, first: int) -> pa.Table:
        """Return rows of a file as a table, given how many rows come before them."""
        columns = {self.config.column: rows}
        if self.config.is_numbered:
            file = self.config.data_files["train"].index(path)
            columns[SOURCE_COLUMN] = rows_of(file, np.arange(first + 1, first + len(rows) + 1))
        return pa.table(columns)


class _Lines(_Rows):
    """A row is a line, its line break included."""

    def _generate_tables(self, base_files: list[str], files_iterables: Any) -> Tables:
        for shard, path in enumerate(base_files):
            with open_bytes(path) as stream, io.TextIOWrapper(stream, "utf-8-sig") as text:
                batch = count = 0
                while lines := text.readlines(self.config.chunksize):
                    yield (shard, batch), self._table(lines, path, count)
                    batch, count = batch + 1, count + len(lines)


class _Cells(_Rows):
    """A row is one cell of a table: what the others hold does not matter."""

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
    """Reads text, a row a line."""


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
        BadRow: They cannot be read; a stream raises it when it gets there.
    """
    data_files = {"train": [glob.escape(path) for path in paths]}
    # Name and hash are those of its cache: what another version of us read is read again.
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
    if not builder.info.splits["train"].num_examples:  # of which `datasets` makes no data set
        return Dataset.from_dict({})
    return builder.as_dataset(split="train")
