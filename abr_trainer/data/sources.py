"""Load rows and texts from files, directories and the Hub."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_dataset_builder, load_from_disk
from datasets.exceptions import DatasetGenerationError
from transformers.utils import logging

from ..records.errors import BadRow, one_line
from .arguments import SPLIT_ALIASES, DataArguments, TextArguments
from .columns import EVERY, EXAMPLES, Column, Place, as_text, choose_every, choose_text_column, parse_line
from .corpora import C4_DOCUMENTS, Corpus, find_corpus
from .demo import demo_chats, demo_texts
from .identity import SOURCE_COLUMN
from .readers import (
    READERS,
    TABLES,
    Format,
    check_file,
    holds_json_lines,
    open_bytes,
    read_cells,
    read_files,
    what_is_wrong,
)

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Rows:
    """The rows of one split, as loaded.

    Attributes:
        origin: The flag that they come from, for messages.
    """

    rows: Dataset | IterableDataset
    origin: str


@dataclass(frozen=True)
class TextRows(Rows):
    """Rows of which we read one column.

    Attributes:
        rows_are_lines: See `Corpus`.
        numbered: The files that `SOURCE_COLUMN` refers to; empty if the rows do not have this column.
    """

    column: Column
    rows_are_lines: bool = False
    numbered: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """Where the rows come from: files, or else the flag."""
        return self.numbered or (self.column.place.source,)


ChooseColumn = Callable[[Iterable[Mapping[str, Any]], str], str]
"""Returns the text column, given the first rows and the flag that they come from; `EVERY` for all columns."""

LoadRows = Callable[[], TextRows]


def load_rows(
    arguments: DataArguments,
    splits: Collection[str],
    choose: ChooseColumn | None = None,
    is_numbered: bool = False,
) -> dict[str, TextRows]:
    """Load the rows of these splits. If there is no validation split, take its rows from the training rows.

    Args:
        choose: Chooses the column. Default: the column with the text or the tokens.
        is_numbered: Record in `SOURCE_COLUMN` which row of which file each row is, for formats that allow it.

    Raises:
        ValueError: A split is missing or cannot be read; the message names the flag.
    """
    choose = choose or partial(choose_text_column, wanted=arguments.text_column, takes_tokens=True)
    sources: dict[str, LoadRows] = {}
    if arguments.dataset_name is not None:
        sources = _find_splits(arguments, f"--dataset_name {arguments.dataset_name}", choose, is_numbered)
    for split in ("train", "validation", "test", "primer"):
        if (path := getattr(arguments, f"{split}_file")) is not None:
            streaming = arguments.streaming and split == "train"
            sources[split] = partial(_load_text_files, Place(f"--{split}_file {path}"), [path], choose, streaming)
    takes_from_train = "validation" in splits and "validation" not in sources and "train" in sources
    for split in splits:
        if split not in sources and not (split == "validation" and takes_from_train):
            otherwise = ", or --do_predict false" if split == "test" else arguments.other_split(split)
            where = f"--dataset_name {arguments.dataset_name} has" if arguments.dataset_name else "There is"
            raise ValueError(f"{where} no {split} split. Give --{split}_file{otherwise}.")
    needed = {*splits} - {"validation"} | {"train"} if takes_from_train else splits
    loaded = {split: sources[split]() for split in needed}
    if takes_from_train:
        loaded["train"], loaded["validation"] = _split_rows(loaded["train"], arguments.validation_split_percentage)
    return {split: loaded[split] for split in splits}


def load_texts(arguments: TextArguments, flag: str | None = None) -> tuple[list[str], TextRows]:
    """Return the texts of a split or a file, and their rows; of a stream the first `C4_DOCUMENTS` by default.

    Args:
        flag: The flag that gave the file or the data set, for messages. Default: `text_file` or `dataset_name`.

    Raises:
        ValueError: They cannot be read, or contain no text.
    """
    choose = partial(choose_text_column, wanted=arguments.text_column)
    if arguments.text_file is not None:
        place = Place(f"--{flag or 'text_file'} {arguments.text_file}")
        loaded = _load_text_files(place, [arguments.text_file], choose)
    else:
        named = DataArguments(dataset_name=arguments.dataset_name, dataset_config_name=arguments.dataset_config_name)
        origin = f"--{flag or 'dataset_name'} {arguments.dataset_name}"
        splits = _find_splits(named, origin, choose)
        if arguments.split not in splits:
            instead = f"--split {' or '.join(splits)}, or a --text_file" if flag is None else "a file as --eval_text"
            raise ValueError(f"{origin} has no {arguments.split} split. Give {instead}.")
        loaded = splits[arguments.split]()
    is_stream = isinstance(loaded.rows, IterableDataset)
    most = arguments.max_rows or (C4_DOCUMENTS if is_stream else None)
    texts, missing = [], []
    for index, row in enumerate(itertools.islice(loaded.rows, most)):
        [raw] = row.values()
        [value] = loaded.column.values({name: [raw] for name in row}, [index])
        if value is not None:
            texts.append(as_text(value, loaded.column.where(index)))
        elif loaded.column.is_row(raw):
            missing.append(index)
    if not any(text.strip() for text in texts):
        raise ValueError(f"{loaded.origin} contains no text.")
    say_what_is_left_out(missing, len(texts) + len(missing), loaded)
    return texts, loaded


def say_what_is_left_out(missing: Sequence[int], count: int, rows: TextRows) -> None:
    if missing:
        logger.warning(
            f"{len(missing)} of {count} rows of {rows.origin} have no {rows.column.name} and are left out. "
            f"The first is {rows.column.place.number(missing[0])}."
        )


def load_table(flag: str, path: str) -> Dataset:
    """Load all columns of a table. All cells of a .csv or .tsv are text.

    Raises:
        ValueError: The file is not a table, is empty, or cannot be read.
    """
    origin = f"--{flag} {path}"
    form = _check(origin, path)
    if form.reader == "text":
        raise ValueError(f"{origin} is not a table. It must be a file of the type {', '.join(TABLES)}.")
    if form.reader == "csv":
        rows = Dataset.from_pandas(pd.concat(_cells(origin, path, 10_000)), preserve_index=False)
        if len(rows) == 0:
            raise ValueError(f"{origin} is empty.")
        return rows
    # Read JSON in one piece: a later piece with another column or another type could not be read. Without
    # parse_agent_traces, rows of chats stay rows.
    options = {"chunksize": 1 << 30, "parse_agent_traces": False} if form.reader == "json" else {}
    table: Dataset = _read(origin, form.reader, [path], streaming=False, **options)
    return table


def _check(origin: str, path: str) -> Format:
    try:
        return check_file(path)
    except ValueError as error:
        raise ValueError(f"{origin} {error}") from error


def _cells(origin: str, path: str, rows: int) -> Iterator[pd.DataFrame]:
    """Yield the cells of a .csv or .tsv as text, in chunks of `rows` rows."""
    with _refusing(origin):
        try:
            yield from read_cells(path, rows)
        except pd.errors.EmptyDataError as error:
            raise ValueError(f"{origin} is empty.") from error
        except (ValueError, EOFError) as error:
            raise BadRow(what_is_wrong([path], error)) from error


def _first_cells(origin: str, path: str) -> list[dict[str, Any]]:
    """Return the first rows of a .csv or .tsv, with numbers as floats and empty cells as None."""
    first = next(_cells(origin, path, EXAMPLES)).to_dict("records")
    return [{name: _number(cell) for name, cell in row.items()} for row in first]


def _number(cell: Any) -> str | float | None:
    if not isinstance(cell, str) or not cell:  # pandas fills short rows with NaN
        return None
    try:
        return float(cell)
    except ValueError:
        return cell


def _read(origin: str, reader: str, paths: Sequence[str], streaming: bool, **options: Any) -> Any:
    with _refusing(origin):
        rows = read_files(reader, paths, streaming, **options)
    if isinstance(rows, Dataset) and len(rows) == 0:
        raise ValueError(f"{origin} is empty.")
    return rows


def _load_text_files(
    place: Place,
    paths: Sequence[str],
    choose: ChooseColumn,
    streaming: bool = False,
    origin: str | None = None,
    is_numbered: bool = False,
) -> TextRows:
    """Load the text of files of one format, without their other columns if the format allows it.

    Args:
        origin: The flag that they come from. Default: that of the place.
        is_numbered: See `load_rows`.
    """
    origin = origin or place.origin
    if len(paths) > 1:  # one of many may be empty
        paths = [path for path in paths if Path(path).stat().st_size] or paths[:1]
    readers = [
        _check(origin if origin.endswith(path) else f"{origin}: {Path(path).name}", path).reader for path in paths
    ]
    reader, lines = readers[0], replace(place, files=tuple(paths))
    numbering: dict[str, Any] = {"is_numbered": True} if is_numbered and len(paths) > 1 else {}
    numbered = tuple(paths) if numbering else ()
    if reader == "text":
        rows = _read(origin, "text", paths, streaming, **numbering)
        return _choosing(rows, origin, choose, lines, rows_are_lines=True, numbered=numbered)
    if reader == "json" and all(map(holds_json_lines, paths)):
        # Lines are parsed when their text is needed, so that other keys may have different types in each line.
        rows = _read(origin, "text", paths, streaming, **numbering)
        first = (parse_line(row["text"], partial(lines, i)) for i, row in enumerate(first_rows(rows, origin)))
        return TextRows(rows, origin, Column(choose(first, origin), lines, is_json=True), numbered=numbered)
    if reader == "csv":
        column = choose(_first_cells(origin, paths[0]), origin)
        if column == EVERY:
            table = pd.concat([frame for path in paths for frame in _cells(origin, path, 10_000)])
            return TextRows(Dataset.from_pandas(table, preserve_index=False), origin, Column(EVERY, place))
        rows = _read(origin, "cell", paths, streaming, column=column, **numbering)
        return TextRows(rows, origin, Column(column, place), numbered=numbered)
    if reader == "parquet":
        column = choose(first_rows(_read(origin, reader, paths, streaming=True), origin), origin)
        columns = None if column == EVERY else [column]
        return TextRows(_read(origin, reader, paths, streaming, columns=columns), origin, Column(column, place))
    if choose is choose_every:
        return TextRows(_objects_in(origin, paths), origin, Column(EVERY, place, is_json=True))
    return _choosing(_read(origin, reader, paths, streaming, parse_agent_traces=False), origin, choose, place)


def _choosing(
    rows: Dataset | IterableDataset,
    origin: str,
    choose: ChooseColumn,
    place: Place,
    rows_are_lines: bool = False,
    numbered: tuple[str, ...] = (),
) -> TextRows:
    column = choose(first_rows(rows, origin), origin)
    read = [column, SOURCE_COLUMN] if numbered else [column]
    chosen = rows if column == EVERY else rows.select_columns(read)
    return TextRows(chosen, origin, Column(column, place), rows_are_lines, numbered)


def _objects_in(origin: str, paths: Sequence[str]) -> Dataset:
    """Return the objects in JSON lists as one line each; they may have different keys."""
    lines: list[str] = []
    for path in paths:
        with _refusing(origin):
            try:
                with open_bytes(path) as stream:
                    rows = json.loads(stream.read().decode("utf-8-sig"))
            except (ValueError, EOFError) as error:
                raise BadRow(what_is_wrong([path], error)) from error
            if not isinstance(rows, list):
                raise BadRow("it must contain a list of rows, or one row per line.")
        lines += [json.dumps(row, ensure_ascii=False) for row in rows]
    if not lines:
        raise ValueError(f"{origin} is empty.")
    return Dataset.from_dict({"text": lines})


def _find_splits(
    arguments: DataArguments, origin: str, choose: ChooseColumn, is_numbered: bool = False
) -> dict[str, LoadRows]:
    """Return a function to load each split that a data set has."""
    name = arguments.dataset_name or ""
    if name == "demo":
        return {split: partial(_load_demo, split, origin, choose) for split in SPLIT_ALIASES}
    corpus = find_corpus(name)
    streaming, rows_are_lines = arguments.is_streamed, corpus.rows_are_lines
    if is_saved_to_disk(Path(name)):
        found = load_from_disk(name)
        found = found if isinstance(found, DatasetDict) else {"train": found}
    else:
        named = partial(load_or_refuse, origin, corpus.path, arguments.dataset_config_name or corpus.config)
        files = _files_in(arguments, origin) if corpus == Corpus(name) and Path(name).is_dir() else None
        if files is not None:
            load = partial(
                _load_text_files, choose=choose, streaming=streaming, origin=origin, is_numbered=is_numbered
            )
            loads = {split: partial(load, _split_of(origin, split), paths) for split, paths in files.items()}
            return _by_alias(loads, arguments, origin)
        found = named(revision=corpus.revision, streaming=streaming)
        reader = next(iter(found.values())).info.builder_name
        if reader in ("text", "csv"):  # read it in the same way as a file given by a flag
            options = {"keep_linebreaks": True} if reader == "text" else {"keep_default_na": False}
            found = named(revision=corpus.revision, streaming=streaming, **options)
            rows_are_lines = reader == "text"
    return _by_alias(
        {
            split: partial(_choosing, rows, origin, choose, _split_of(origin, split), rows_are_lines)
            for split, rows in found.items()
        },
        arguments,
        origin,
    )


def _files_in(arguments: DataArguments, origin: str) -> dict[str, list[str]] | None:
    """Return the files of each split of a directory; None if one has a format that we cannot read."""
    with _refusing(origin):
        builder = load_dataset_builder(arguments.dataset_name, arguments.dataset_config_name)
    files: dict[str, list[str]] = builder.config.data_files or {}
    are_here = all(Path(path).is_file() for paths in files.values() for path in paths)
    return files if builder.name in READERS and are_here else None


def _load_demo(split: str, origin: str, choose: ChooseColumn) -> TextRows:
    chats = choose is choose_every
    rows = Dataset.from_list(demo_chats(split)) if chats else Dataset.from_dict({"text": demo_texts(split)})
    return _choosing(rows, origin, choose, _split_of(origin, split))


def _split_of(origin: str, split: str) -> Place:
    return Place(f"the {split} split of {origin}")


def _by_alias(found: Mapping[str, LoadRows], arguments: DataArguments, origin: str) -> dict[str, LoadRows]:
    """Rename splits to our names.

    Raises:
        ValueError: There is no split with the name that a flag gives.
    """
    known: dict[str, LoadRows] = {}
    for split, aliases in arguments.split_aliases.items():
        loads = [found[alias] for alias in aliases if alias in found]
        if loads:
            known[split] = loads[0]
        elif aliases != SPLIT_ALIASES[split]:
            raise ValueError(f"{origin} has no split {aliases[0]}. It has {', '.join(found)}.")
    return known


def is_saved_to_disk(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def load_or_refuse(origin: str, *args: Any, **kwargs: Any) -> Any:
    """Call `datasets.load_dataset`.

    Args:
        origin: The flag that gave the data set, for messages.

    Raises:
        ValueError: The data set cannot be found or read.
    """
    with _refusing(origin):
        return load_dataset(*args, **kwargs)


@contextlib.contextmanager
def _refusing(origin: str) -> Iterator[None]:
    """Name the flag in errors about data that cannot be loaded."""
    try:
        yield
    except BadRow as error:
        raise ValueError(f"{origin} cannot be read: {error}") from error
    except DatasetGenerationError as error:
        raise ValueError(f"{origin} cannot be read: {one_line(error.__cause__ or error)}") from error
    except (OSError, ValueError, RuntimeError) as error:  # not found, no network, no such configuration, a script
        raise ValueError(f"{origin} cannot be loaded: {one_line(error)}") from error


def _split_rows(rows: TextRows, percentage: float) -> tuple[TextRows, TextRows]:
    """Use the first rows of a data set, or the first of each hundred rows of a stream, for validation."""
    data, place = rows.rows, rows.column.place
    if isinstance(data, Dataset):
        held_out = max(1, round(len(data) * percentage / 100))
        if held_out >= len(data):
            raise ValueError(f"{rows.origin} has too few rows to use some for evaluation. Give --validation_file.")
        parts = data.select(range(held_out, len(data))), data.select(range(held_out))
        places = replace(place, first=held_out), place
    else:
        parts = (
            data.filter(lambda _row, index: index % 100 >= percentage, with_indices=True),
            data.filter(lambda _row, index: index % 100 < percentage, with_indices=True),
        )
        first = math.ceil(percentage)
        places = replace(place, of_hundred=range(first, 100)), replace(place, of_hundred=range(first))
    train, validation = (
        replace(rows, rows=part, column=replace(rows.column, place=where))
        for part, where in zip(parts, places, strict=True)
    )
    return train, validation


def first_rows(data: Dataset | IterableDataset, origin: str, most: int = EXAMPLES) -> list[dict[str, Any]]:
    """Return the first rows, without `SOURCE_COLUMN`. If the data is a stream, this is the first time it is read."""
    try:
        rows = list(itertools.islice(data, most))
        return [{name: value for name, value in row.items() if name != SOURCE_COLUMN} for row in rows]
    except BadRow as error:
        if origin in str(error):
            raise
        raise BadRow(f"{origin} cannot be read: {error}") from error
    except Exception as error:  # each reader raises errors of its own
        raise ValueError(f"{origin} cannot be read: {one_line(error)}") from error
