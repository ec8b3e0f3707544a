"""From corpora to blocks: where the text comes from, and how it is cut for causal language modelling."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc
from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    interleave_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from ..records.errors import BadRow, one_line, refuse_below, refuse_missing_files
from .columns import EXAMPLES, TOKENS, Column, Place, as_text, as_tokens, check_tokens, choose_text_column, parse_line
from .context import fit_context
from .corpora import C4_DOCUMENTS, CORPORA, Corpus, find_corpus, parse_mix
from .demo import demo_texts
from .readers import READERS, TABLES, Format, check_file, holds_json_lines, read_cells, read_files, what_is_wrong

logger = logging.get_logger(__name__)

DEFAULT_BLOCK_SIZE = 1024
SPLIT_ALIASES = {"validation": ("validation", "valid", "val", "dev"), "train": ("train",), "test": ("test",)}


@dataclass
class DataArguments:
    """What to train and evaluate on."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "wikitext, dailydialog, c4, demo, a Hub id, or a directory. c4 is streamed; demo is made "
            "on the spot and needs no network. Default: demo, unless --train_file, --validation_file or --test_file "
            "is given."
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the data set, e.g. wikitext-103-raw-v1."}
    )
    dataset_mix: str | None = field(
        default=None,
        metadata={
            "help": "Training blocks of several data sets or files, drawn at random with these probabilities: "
            "wikitext=0.5,c4=0.5. Evaluation is on the first of them, unless --validation_file is given."
        },
    )
    mix_until: str = field(
        default="first_exhausted",
        metadata={
            "help": "When an epoch of --dataset_mix ends: with the first data set that is used up, or, shorter ones "
            "repeated, with the last.",
            "choices": ["first_exhausted", "all_exhausted"],
        },
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Training text: .json, .jsonl, .ndjson, .csv, .tsv or .parquet with a document or a dialogue in "
            "each row; any other suffix is read as one plain text. All but .parquet may be compressed: .gz, .bz2, "
            ".xz, .zst, .lz4, .zip. A column input_ids is taken for tokens, as they are."
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "Evaluation text, in the same formats."})
    test_file: str | None = field(default=None, metadata={"help": "Text for --do_predict, in the same formats."})
    primer_file: str | None = field(
        default=None,
        metadata={
            "help": "High-quality text that the run begins with: --primer_batches batches, before the training set."
        },
    )
    text_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with the text, or with a list of turns. Default: text, dialog, or the only one that fits."
        },
    )
    block_size: int | None = field(
        default=None,
        metadata={"help": "Tokens in a block. Default: 1024, or what the model can attend to, if that is less."},
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Use only the first so many training blocks."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Use only the first so many blocks of the evaluation and test sets."}
    )
    validation_split_percentage: float = field(
        default=5, metadata={"help": "Share of the training rows to evaluate on where there is no validation split."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read the training set while training."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize again what is cached."})

    def __post_init__(self) -> None:
        if self.dataset_mix is not None:
            for flag in ("dataset_name", "train_file"):
                if getattr(self, flag) is not None:
                    raise ValueError(
                        f"--dataset_mix says what to train on, and so does --{flag}. Leave one of them out."
                    )
            parse_mix(self.dataset_mix)
        elif self.dataset_name is None and not (self.train_file or self.validation_file or self.test_file):
            self.dataset_name = "demo"
        refuse_missing_files(self, "train_file", "validation_file", "test_file", "primer_file")
        least = {"block_size": 2, "max_train_samples": 1, "max_eval_samples": 1, "preprocessing_num_workers": 1}
        refuse_below(self, least)
        if not 0 < self.validation_split_percentage < 100:
            raise ValueError(
                f"--validation_split_percentage must lie between 0 and 100, got {self.validation_split_percentage}."
            )

    @property
    def is_streamed(self) -> bool:
        """Whether the training set is read while training, so that it has no length."""
        named = [] if self.dataset_name is None else [self.dataset_name]
        names = named if self.dataset_mix is None else parse_mix(self.dataset_mix)
        return self.streaming or any(find_corpus(name).streaming for name in names)


@dataclass
class TextArguments:
    """What to measure a perplexity on."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "'wikitext', 'dailydialog', 'c4', 'demo', any id on the Hub, or a local directory."},
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the data set, e.g. wikitext-103-raw-v1."}
    )
    split: str | None = field(
        default=None,
        metadata={"help": "Split of the data set. Default: test; validation for c4, which has no other."},
    )
    text_file: str | None = field(
        default=None,
        metadata={"help": "A text of your own, in the formats of --train_file, instead of --dataset_name."},
    )
    text_column: str | None = field(
        default=None,
        metadata={"help": "Column with the text, or with a list of turns. Default: as for --train_file."},
    )
    max_rows: int | None = field(
        default=None,
        metadata={
            "help": "Read only the first so many rows. Default: all; "
            f"{C4_DOCUMENTS} of a stream, what is published on C4."
        },
    )

    def __post_init__(self) -> None:
        if (self.dataset_name is None) == (self.text_file is None):
            raise ValueError("Give either --dataset_name or --text_file: what to measure on.")
        refuse_missing_files(self, "text_file")
        refuse_below(self, {"max_rows": 1})
        if self.split is None:
            self.split = "validation" if self.is_c4 else "test"
        if self.split not in SPLIT_ALIASES:
            raise ValueError(f"--split must be one of {', '.join(SPLIT_ALIASES)}, got {self.split}.")

    @property
    def is_c4(self) -> bool:
        return self.dataset_name in ("c4", CORPORA["c4"].path)

    @property
    def config(self) -> str | None:
        """The configuration that is read."""
        by_default = None if self.dataset_name is None else find_corpus(self.dataset_name).config
        return self.dataset_config_name or by_default


@dataclass
class OptionalTextArguments(TextArguments):
    """What to measure a perplexity on, if on anything."""

    def __post_init__(self) -> None:
        if self.is_given:
            super().__post_init__()

    @property
    def is_given(self) -> bool:
        return self.dataset_name is not None or self.text_file is not None


@dataclass(frozen=True)
class Rows:
    """The rows of one split, as loaded.

    Attributes:
        origin: The flag that named them, for messages.
    """

    rows: Dataset | IterableDataset
    origin: str


@dataclass(frozen=True)
class TextRows(Rows):
    """Rows of which one column is read.

    Attributes:
        rows_are_lines: See `Corpus`.
    """

    column: Column
    rows_are_lines: bool = False


ChooseColumn = Callable[[Iterable[Mapping[str, Any]], str], str]
"""Returns the column of the text, given the first rows and what named them."""
LoadRows = Callable[[], TextRows]


def choose_block_size(arguments: DataArguments, config: PreTrainedConfig) -> int:
    """Return `--block_size` or its default, checked against what the model can attend to."""
    return fit_context("block_size", arguments.block_size, DEFAULT_BLOCK_SIZE, config)


def load_blocks(
    arguments: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    splits: Collection[str],
    seed: int = 42,
    vocabulary: int | None = None,
) -> dict[str, Dataset | IterableDataset]:
    """Load, tokenize and cut what `splits` names, out of "train", "validation", "test" and "primer".

    Texts are tokenized without special tokens, one after the other. Where a row is a document or a dialogue, the end-
    of-text token follows it. Tokens that do not fill a last block are dropped.

    Args:
        seed: What draws from the data sets of a mix.
        vocabulary: Token ids that the model knows. Default: those of the tokenizer.

    Returns:
        Data sets with the columns `input_ids` and `labels`, equal, of `block_size` tokens.

    Raises:
        ValueError: A split is missing, cannot be read, has no such column, or is too short; the message names the
            flag. It is a `BadRow` where a row cannot be trained on: a stream raises it when it gets there.
    """
    vocabulary = vocabulary or len(tokenizer)
    if arguments.dataset_mix is not None:
        return _load_mix(arguments, tokenizer, block_size, splits, seed, vocabulary)
    loaded = load_rows(arguments, splits)
    limits = {"train": ("max_train_samples", arguments.max_train_samples), "primer": ("", None)}
    blocks: dict[str, Dataset | IterableDataset] = {}
    for split, rows in loaded.items():
        flag, limit = limits.get(split, ("max_eval_samples", arguments.max_eval_samples))
        cut = cut_blocks(tokenize(rows, arguments, tokenizer), block_size, arguments, rows, vocabulary)
        blocks[split] = _at_most(cut, limit, flag, must_end=split != "train")
    return blocks


def _load_mix(
    arguments: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    splits: Collection[str],
    seed: int,
    vocabulary: int,
) -> dict[str, Dataset | IterableDataset]:
    """Mix the training blocks of several data sets; the other splits are of the first."""
    shares = parse_mix(arguments.dataset_mix or "")
    alone = partial(replace, arguments, dataset_mix=None, max_train_samples=None)
    sources = [alone(train_file=name) if Path(name).is_file() else alone(dataset_name=name) for name in shares]
    load = partial(load_blocks, tokenizer=tokenizer, block_size=block_size, vocabulary=vocabulary)
    blocks = load(sources[0], splits=splits)
    if "train" not in splits:
        return blocks
    mixed = [blocks["train"]]
    mixed += [load(source, splits=["train"])["train"] for source in sources[1:]]
    if any(isinstance(each, IterableDataset) for each in mixed):
        mixed = [each if isinstance(each, IterableDataset) else each.to_iterable_dataset() for each in mixed]
    drawn = interleave_datasets(
        mixed,
        probabilities=list(shares.values()),
        seed=seed,
        stopping_strategy=arguments.mix_until,
    )
    blocks["train"] = _at_most(drawn, arguments.max_train_samples, "max_train_samples", must_end=False)
    return blocks


def load_rows(arguments: DataArguments, splits: Collection[str]) -> dict[str, TextRows]:
    """Load the rows of these splits; take validation rows from the training rows where there are no others."""
    choose = partial(choose_text_column, wanted=arguments.text_column, takes_tokens=True)
    sources: dict[str, LoadRows] = {}
    if arguments.dataset_name is not None:
        sources = _find_splits(arguments, f"--dataset_name {arguments.dataset_name}", choose)
    for split in ("train", "validation", "test", "primer"):
        if (path := getattr(arguments, f"{split}_file")) is not None:
            streaming = arguments.streaming and split == "train"
            sources[split] = partial(_load_text_files, Place(f"--{split}_file {path}"), [path], choose, streaming)
    takes_from_train = "validation" in splits and "validation" not in sources and "train" in sources
    for split in splits:
        if split not in sources and not (split == "validation" and takes_from_train):
            otherwise = ", or --do_predict false" if split == "test" else ""
            where = f"--dataset_name {arguments.dataset_name} has" if arguments.dataset_name else "There is"
            raise ValueError(f"{where} no {split} split. Give --{split}_file{otherwise}.")
    needed = {*splits} - {"validation"} | {"train"} if takes_from_train else splits
    loaded = {split: sources[split]() for split in needed}
    if takes_from_train:
        loaded["train"], loaded["validation"] = _split_rows(loaded["train"], arguments.validation_split_percentage)
    return {split: loaded[split] for split in splits}


def load_texts(arguments: TextArguments, flag: str | None = None) -> tuple[list[str], TextRows]:
    """Return the texts of a split or a file, and the rows that they are of; of a stream as much as is published of C4.

    Args:
        flag: What named the file or the data set, for messages. Default: that of the verbs which only measure.

    Raises:
        ValueError: They cannot be read, or hold no text.
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
        raise ValueError(f"{loaded.origin} holds no text.")
    _say_what_is_left_out(missing, len(texts) + len(missing), loaded)
    return texts, loaded


_SAID: set[str] = set()


def _say_first_left_out(column: Column, missing: Sequence[int]) -> None:
    """Say once of a stream, whose rows are not counted, that some are left out."""
    if missing and column.place.origin not in _SAID:
        _SAID.add(column.place.origin)
        logger.warning(
            f"Left out, as will be all rows like it: {column.place(missing[0])} has nothing in {column.name}."
        )


def _say_what_is_left_out(missing: Sequence[int], count: int, rows: TextRows) -> None:
    if missing:
        logger.warning(
            f"{len(missing)} of {count} rows of {rows.origin} have nothing in {rows.column.name}, and are left out. "
            f"The first is {rows.column.place.number(missing[0])}."
        )


def load_table(flag: str, path: str) -> Dataset:
    """Load all columns of a table; all cells of a .csv or .tsv are texts.

    Raises:
        ValueError: It is no table, is empty, or cannot be read.
    """
    origin = f"--{flag} {path}"
    form = _check(origin, path)
    if form.reader == "text":
        raise ValueError(f"{origin} has no columns: it must be one of {', '.join(TABLES)}.")
    if form.reader == "csv":
        rows = Dataset.from_pandas(pd.concat(_cells(origin, path, 10_000)), preserve_index=False)
        if len(rows) == 0:
            raise ValueError(f"{origin} is empty.")
        return rows
    # In pieces, JSON could not be read where a later one has another column, or another type in it. Rows of chats are
    # rows, and no traces of agents.
    options = {"chunksize": 1 << 30, "parse_agent_traces": False} if form.reader == "json" else {}
    table: Dataset = _read(origin, form.reader, [path], streaming=False, **options)
    return table


def _check(origin: str, path: str) -> Format:
    try:
        return check_file(path)
    except ValueError as error:
        raise ValueError(f"{origin} {error}") from error


def _cells(origin: str, path: str, rows: int) -> Iterator[pd.DataFrame]:
    """Yield the cells of a .csv or .tsv, so many rows at a time, as texts."""
    with _refusing(origin):
        try:
            yield from read_cells(path, rows)
        except pd.errors.EmptyDataError as error:
            raise ValueError(f"{origin} is empty.") from error
        except (ValueError, EOFError) as error:
            raise BadRow(what_is_wrong([path], error)) from error


def _first_cells(origin: str, path: str) -> list[dict[str, Any]]:
    """Return the first rows of a .csv or .tsv, numbers as such, and None for an empty cell."""
    first = next(_cells(origin, path, EXAMPLES)).to_dict("records")
    return [{name: _number(cell) for name, cell in row.items()} for row in first]


def _number(cell: Any) -> str | float | None:
    if not isinstance(cell, str) or not cell:  # a row that is too short has NaN there
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
    place: Place, paths: Sequence[str], choose: ChooseColumn, streaming: bool = False, origin: str | None = None
) -> TextRows:
    """Load the text of files of one format, and nothing else of them where their format allows it.

    Args:
        origin: The flag that named them. Default: that of the place.
    """
    origin = origin or place.origin
    if len(paths) > 1:  # one of many may be empty
        paths = [path for path in paths if Path(path).stat().st_size] or paths[:1]
    readers = [
        _check(origin if origin.endswith(path) else f"{origin}: {Path(path).name}", path).reader for path in paths
    ]
    reader, lines = readers[0], replace(place, files=tuple(paths))
    if reader == "text":
        return _choosing(_read(origin, "text", paths, streaming), origin, choose, lines, rows_are_lines=True)
    if reader == "json" and all(map(holds_json_lines, paths)):
        # A line is parsed when its text is needed, so that only this has to be alike in all of them.
        rows = _read(origin, "text", paths, streaming)
        first = (parse_line(row["text"], partial(lines, i)) for i, row in enumerate(_first_rows(rows, origin)))
        return TextRows(rows, origin, Column(choose(first, origin), lines, is_json=True))
    if reader == "csv":
        column = choose(_first_cells(origin, paths[0]), origin)
        return TextRows(_read(origin, "cell", paths, streaming, column=column), origin, Column(column, place))
    if reader == "parquet":
        column = choose(_first_rows(_read(origin, reader, paths, streaming=True), origin), origin)
        return TextRows(_read(origin, reader, paths, streaming, columns=[column]), origin, Column(column, place))
    return _choosing(_read(origin, reader, paths, streaming, parse_agent_traces=False), origin, choose, place)


def _choosing(
    rows: Dataset | IterableDataset, origin: str, choose: ChooseColumn, place: Place, rows_are_lines: bool = False
) -> TextRows:
    column = choose(_first_rows(rows, origin), origin)
    return TextRows(rows.select_columns([column]), origin, Column(column, place), rows_are_lines)


def _find_splits(arguments: DataArguments, origin: str, choose: ChooseColumn) -> dict[str, LoadRows]:
    """Return what loads each split that a data set has."""
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
            load = partial(_load_text_files, choose=choose, streaming=streaming, origin=origin)
            return _by_alias({split: partial(load, _split_of(origin, split), paths) for split, paths in files.items()})
        found = named(revision=corpus.revision, streaming=streaming)
        reader = next(iter(found.values())).info.builder_name
        if reader in ("text", "csv"):  # read as a file of ours is
            options = {"keep_linebreaks": True} if reader == "text" else {"keep_default_na": False}
            found = named(revision=corpus.revision, streaming=streaming, **options)
            rows_are_lines = reader == "text"
    return _by_alias(
        {
            split: partial(_choosing, rows, origin, choose, _split_of(origin, split), rows_are_lines)
            for split, rows in found.items()
        }
    )


def _files_in(arguments: DataArguments, origin: str) -> dict[str, list[str]] | None:
    """Return the files of each split of a directory, if all of them are of a format that we read."""
    with _refusing(origin):
        builder = load_dataset_builder(arguments.dataset_name, arguments.dataset_config_name)
    files: dict[str, list[str]] = builder.config.data_files or {}
    are_here = all(Path(path).is_file() for paths in files.values() for path in paths)
    return files if builder.name in READERS and are_here else None


def _load_demo(split: str, origin: str, choose: ChooseColumn) -> TextRows:
    return _choosing(Dataset.from_dict({"text": demo_texts(split)}), origin, choose, _split_of(origin, split))


def _split_of(origin: str, split: str) -> Place:
    return Place(f"the {split} split of {origin}")


def _by_alias(found: Mapping[str, LoadRows]) -> dict[str, LoadRows]:
    """Call splits as we do."""
    return {
        split: found[alias] for split, aliases in SPLIT_ALIASES.items() for alias in aliases[::-1] if alias in found
    }


def is_saved_to_disk(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def load_or_refuse(origin: str, *args: Any, **kwargs: Any) -> Any:
    """Return what `datasets.load_dataset` does.

    Args:
        origin: The flag that named it.

    Raises:
        ValueError: It cannot be found, or cannot be read.
    """
    with _refusing(origin):
        return load_dataset(*args, **kwargs)


@contextlib.contextmanager
def _refusing(origin: str) -> Iterator[None]:
    """Say of what cannot be loaded that it is what a flag named."""
    try:
        yield
    except BadRow as error:
        raise ValueError(f"{origin} cannot be read: {error}") from error
    except DatasetGenerationError as error:
        raise ValueError(f"{origin} cannot be read: {one_line(error.__cause__ or error)}") from error
    except (OSError, ValueError, RuntimeError) as error:  # not found, no network, no such configuration, a script
        raise ValueError(f"{origin} cannot be loaded: {one_line(error)}") from error


def _split_rows(rows: TextRows, percentage: float) -> tuple[TextRows, TextRows]:
    """Take the first rows of a data set, or of each hundred of a stream, for validation."""
    data, place = rows.rows, rows.column.place
    if isinstance(data, Dataset):
        held_out = max(1, round(len(data) * percentage / 100))
        if held_out >= len(data):
            raise ValueError(f"{rows.origin} has too few rows to hold some out. Give --validation_file.")
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


def tokenize(
    rows: TextRows, arguments: DataArguments, tokenizer: PreTrainedTokenizerBase
) -> Dataset | IterableDataset:
    """Turn rows into rows of token ids, `input_ids`: as they are where they are given, none where there is no text.

    Raises:
        BadRow: A row holds something else.
    """
    column = rows.column
    if column.name == TOKENS and not column.is_json:
        return rows.rows
    end = [] if rows.rows_are_lines or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    read = "text" if column.is_json else column.name
    is_stream = isinstance(rows.rows, IterableDataset)

    def encode(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[list[int]]]:
        values = column.values(batch, indices)
        there = [i for i, value in enumerate(values) if value is not None]
        if is_stream and len(there) < len(values):
            raw = zip(values, batch[read], indices, strict=True)
            _say_first_left_out(column, [i for value, each, i in raw if value is None and column.is_row(each)])
        found: list[list[int]] = [[] for _ in values]
        if column.name == TOKENS:
            for i in there:
                found[i] = as_tokens(values[i], column.where(indices[i]))
        elif there:
            texts = [as_text(values[i], column.where(indices[i])) for i in there]
            ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
            for i, row in zip(there, ids, strict=True):
                found[i] = row + end
        return {TOKENS: found}

    return _map(rows.rows, encode, arguments, "Tokenizing", [read], num_proc=arguments.preprocessing_num_workers)


def _first_rows(data: Dataset | IterableDataset, origin: str, most: int = EXAMPLES) -> list[dict[str, Any]]:
    """Return the first rows; a stream is read here for the first time."""
    try:
        return list(itertools.islice(data, most))
    except BadRow as error:
        if origin in str(error):
            raise
        raise BadRow(f"{origin} cannot be read: {error}") from error
    except Exception as error:  # each reader has its own
        raise ValueError(f"{origin} cannot be read: {one_line(error)}") from error


def cut_blocks(
    tokens: Dataset | IterableDataset, block_size: int, arguments: DataArguments, rows: TextRows, vocabulary: int
) -> Dataset | IterableDataset:
    """Concatenate all tokens and cut them into blocks. A stream is cut a thousand rows at a time.

    Rows without a token are left out, which a warning says.

    Raises:
        BadRow: A row has ids that are not of the vocabulary.
    """
    column, origin = rows.column, rows.origin
    is_stream, are_given = isinstance(tokens, IterableDataset), column.name == TOKENS

    def cut(batch: dict[str, Any], indices: list[int]) -> dict[str, np.ndarray]:
        ids = [np.asarray([] if row is None else row) for row in batch[TOKENS]]
        if are_given:
            for row, index in zip(ids, indices, strict=True):
                check_tokens(row, vocabulary, column.where(index))
        if are_given and is_stream and not column.is_json:
            _say_first_left_out(column, [index for row, index in zip(ids, indices, strict=True) if not len(row)])
        joined = np.concatenate(ids).astype(np.int64)
        blocks = joined[: len(joined) // block_size * block_size].reshape(-1, block_size)
        return {TOKENS: blocks, "labels": blocks}

    if is_stream:
        stream = _map(tokens, cut, arguments, "", [TOKENS])
        if not _first_rows(stream, origin, 1):
            raise ValueError(f"{origin} is shorter than one block: --block_size is {block_size}.")
        return stream
    lengths = pc.list_value_length(tokens.with_format("arrow")[:][TOKENS]).fill_null(0).to_numpy()
    if not rows.rows_are_lines:
        empty = np.flatnonzero(lengths == 0).tolist()
        raw = rows.rows.select(empty)[rows.rows.column_names[0]]
        missing = [index for index, each in zip(empty, raw, strict=True) if column.is_row(each)]
        _say_what_is_left_out(missing, len(lengths) - len(empty) + len(missing), rows)
    if lengths.sum() < block_size:
        raise ValueError(f"{origin} has {lengths.sum()} tokens, less than one block: --block_size is {block_size}.")
    description = f"Cutting blocks of {block_size}"
    blocks = _map(tokens.with_format("numpy"), cut, arguments, description, [TOKENS], batch_size=None)
    return blocks.with_format(None)


def _map(
    data: Dataset | IterableDataset,
    function: Callable[..., Any],
    arguments: DataArguments,
    description: str,
    remove_columns: list[str],
    **options: Any,
) -> Any:
    if isinstance(data, IterableDataset):
        return data.map(function, batched=True, with_indices=True, remove_columns=remove_columns)
    return data.map(
        function,
        batched=True,
        with_indices=True,
        remove_columns=remove_columns,
        load_from_cache_file=not arguments.overwrite_cache,
        desc=description,
        **options,
    )


def _at_most(
    blocks: Dataset | IterableDataset, limit: int | None, flag: str, must_end: bool
) -> Dataset | IterableDataset:
    if isinstance(blocks, IterableDataset):
        if must_end and limit is None:
            raise ValueError(f"A streamed data set has no end to evaluate to: give --{flag}.")
        taken = blocks if limit is None else blocks.take(limit)
        return Dataset.from_list(list(taken)) if must_end else taken
    if limit is None or limit == len(blocks):
        return blocks
    if limit > len(blocks):
        logger.warning(f"--{flag} {limit} asks for more than the {len(blocks)} blocks there are: using all of them.")
        return blocks
    return blocks.select(range(limit))
