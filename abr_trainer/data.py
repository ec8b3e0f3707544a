"""From corpora to blocks: where the text comes from, and how it is cut for causal language modelling."""

from __future__ import annotations

import glob
import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    interleave_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from .context import fit_context
from .corpora import CORPORA, find_corpus, parse_mix
from .definitions import C4_DOCUMENTS
from .demo import demo_texts
from .errors import one_line, refuse_below, refuse_missing_files

logger = logging.get_logger(__name__)

DEFAULT_BLOCK_SIZE = 1024
BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
SPLIT_ALIASES = {"validation": ("validation", "valid", "val", "dev"), "train": ("train",), "test": ("test",)}
TEXT_COLUMNS = ("text", "dialog", "content", "sentence")


@dataclass
class DataArguments:
    """What to train and evaluate on."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "'wikitext', 'dailydialog', 'c4' (streamed), 'demo' (made on the spot, needs no network), any id "
            "on the Hub, or a local directory. Default: demo, unless --train_file, --validation_file or --test_file "
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
            "help": "Training text: .json, .jsonl, .csv or .parquet with a document or a dialogue in each row; any "
            "other suffix is read as one plain text. A column input_ids is taken for tokens, as they are."
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
        metadata={"help": "Tokens in a block. Default: what the model can attend to, at most 1024."},
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
        rows_are_lines: See `Corpus`.
    """

    rows: Dataset | IterableDataset
    origin: str
    rows_are_lines: bool = False


def choose_block_size(arguments: DataArguments, config: PreTrainedConfig) -> int:
    """Return `--block_size` or its default, checked against what the model can attend to."""
    return fit_context("block_size", arguments.block_size, DEFAULT_BLOCK_SIZE, config)


def load_blocks(
    arguments: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    splits: Collection[str],
    seed: int = 42,
) -> dict[str, Dataset | IterableDataset]:
    """Load, tokenize and cut what `splits` names, out of "train", "validation", "test" and "primer".

    Texts are tokenized without special tokens, one after the other. Where a row is a document or a dialogue, the end-
    of-text token follows it. Tokens that do not fill a last block are dropped.

    Args:
        seed: What draws from the data sets of a mix.

    Returns:
        Data sets with the columns `input_ids` and `labels`, equal, of `block_size` tokens.

    Raises:
        ValueError: A split is missing, cannot be read, has no such column, or is too short; the message names the
            flag.
    """
    if arguments.dataset_mix is not None:
        return _load_mix(arguments, tokenizer, block_size, splits, seed)
    loaded = load_rows(arguments, splits)
    limits = {"train": ("max_train_samples", arguments.max_train_samples), "primer": ("", None)}
    blocks: dict[str, Dataset | IterableDataset] = {}
    for split, rows in loaded.items():
        flag, limit = limits.get(split, ("max_eval_samples", arguments.max_eval_samples))
        cut = cut_blocks(tokenize(rows, arguments, tokenizer), block_size, arguments, rows.origin)
        blocks[split] = _at_most(cut, limit, flag, must_end=split != "train")
    return blocks


def _load_mix(
    arguments: DataArguments, tokenizer: PreTrainedTokenizerBase, block_size: int, splits: Collection[str], seed: int
) -> dict[str, Dataset | IterableDataset]:
    """Mix the training blocks of several data sets; the other splits are of the first."""
    shares = parse_mix(arguments.dataset_mix or "")
    alone = partial(replace, arguments, dataset_mix=None, max_train_samples=None)
    sources = [alone(train_file=name) if Path(name).is_file() else alone(dataset_name=name) for name in shares]
    blocks = load_blocks(sources[0], tokenizer, block_size, splits)
    if "train" not in splits:
        return blocks
    mixed = [blocks["train"]]
    mixed += [load_blocks(source, tokenizer, block_size, ["train"])["train"] for source in sources[1:]]
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


def load_rows(arguments: DataArguments, splits: Collection[str]) -> dict[str, Rows]:
    """Load the rows of these splits; take validation rows from the training rows where there are no others."""
    source = {} if arguments.dataset_name is None else _load_named(arguments, splits)
    source |= _load_files(arguments, splits)
    if "validation" in splits and "validation" not in source and "train" in source:
        source["train"], source["validation"] = _split_rows(source["train"], arguments.validation_split_percentage)
    for split in splits:
        if split not in source:
            otherwise = ", or --do_predict false" if split == "test" else ""
            where = f"--dataset_name {arguments.dataset_name} has" if arguments.dataset_name else "There is"
            raise ValueError(f"{where} no {split} split. Give --{split}_file{otherwise}.")
    return {split: source[split] for split in splits}


def load_texts(arguments: TextArguments, flag: str | None = None) -> tuple[list[str], Rows]:
    """Return the texts of a split or a file, and the rows that they are of; of a stream as much as is published of C4.

    Args:
        flag: What named the file or the data set, for messages. Default: that of the scripts which only measure.

    Raises:
        ValueError: They cannot be read, or hold no text.
    """
    if arguments.text_file is not None:
        loaded = load_file(flag or "text_file", arguments.text_file, streaming=False)
    else:
        named = DataArguments(dataset_name=arguments.dataset_name, dataset_config_name=arguments.dataset_config_name)
        splits = _load_named(named, SPLIT_ALIASES, flag or "dataset_name")
        if arguments.split not in splits:
            instead = f"--split {' or '.join(splits)}, or a --text_file" if flag is None else "a file as --eval_text"
            raise ValueError(
                f"--{flag or 'dataset_name'} {arguments.dataset_name} has no {arguments.split} split. Give {instead}."
            )
        loaded = splits[arguments.split]
    example = _first(loaded.rows, loaded.origin)
    if example is None:
        raise ValueError(f"{loaded.origin} is empty.")
    column = choose_text_column(example, arguments.text_column, loaded.origin)
    is_stream = isinstance(loaded.rows, IterableDataset)
    most = arguments.max_rows or (C4_DOCUMENTS if is_stream else None)
    texts = [as_text(row[column]) for row in itertools.islice(loaded.rows.select_columns([column]), most)]
    if not any(text.strip() for text in texts):
        raise ValueError(f"{loaded.origin} holds no text.")
    return texts, loaded


def _load_files(arguments: DataArguments, splits: Collection[str]) -> dict[str, Rows]:
    """Load the files of these splits, and the training file where validation rows may have to come from it."""
    wanted = {*splits, "train"} if "validation" in splits and arguments.validation_file is None else splits
    return {
        split: load_file(f"{split}_file", path, arguments.streaming and split == "train")
        for split in wanted
        if (path := getattr(arguments, f"{split}_file")) is not None
    }


def load_file(flag: str, path: str, streaming: bool) -> Rows:
    """Load the rows of a file; one of a suffix that is not of a table is text, a row a line.

    Raises:
        ValueError: It is empty, or cannot be read.
    """
    builder = BUILDERS.get(Path(path).suffix.lower(), "text")
    # A cell that reads NA or None is text, too.
    options = {"text": {"keep_linebreaks": True}, "csv": {"keep_default_na": False}}.get(builder, {})
    origin = f"--{flag} {path}"
    if Path(path).stat().st_size == 0:
        raise ValueError(f"{origin} is empty.")
    rows = load_or_refuse(
        origin, builder, data_files={"train": glob.escape(path)}, split="train", streaming=streaming, **options
    )
    return Rows(rows, origin, rows_are_lines=builder == "text")


def _load_named(arguments: DataArguments, splits: Collection[str], flag: str = "dataset_name") -> dict[str, Rows]:
    name = arguments.dataset_name or ""
    origin = f"--{flag} {name}"
    if name == "demo":
        return {
            split: Rows(Dataset.from_dict({"text": demo_texts(split)}), origin)
            for split in splits
            if split != "primer"
        }
    corpus = find_corpus(name)
    config = arguments.dataset_config_name or corpus.config
    streaming = arguments.is_streamed
    if _is_saved_to_disk(Path(name)):
        found = load_from_disk(name)
    else:
        found = load_or_refuse(origin, corpus.path, config, revision=corpus.revision, streaming=streaming)
    if not isinstance(found, DatasetDict | IterableDatasetDict):
        found = {"train": found}
    return {
        split: Rows(found[alias], origin, corpus.rows_are_lines)
        for split, aliases in SPLIT_ALIASES.items()
        for alias in aliases[::-1]
        if alias in found
    }


def _is_saved_to_disk(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def load_or_refuse(origin: str, *args: Any, **kwargs: Any) -> Any:
    """Return what `datasets.load_dataset` does.

    Args:
        origin: The flag that named it.

    Raises:
        ValueError: It cannot be found, or cannot be read.
    """
    try:
        return load_dataset(*args, **kwargs)
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise ValueError(f"{origin} cannot be read: {one_line(cause)}") from error
    except (OSError, ValueError, RuntimeError) as error:  # not found, no network, no such configuration, a script
        raise ValueError(f"{origin} cannot be loaded: {one_line(error)}") from error


def _split_rows(rows: Rows, percentage: float) -> tuple[Rows, Rows]:
    """Take the first rows of a data set, or of each hundred of a stream, for validation."""
    data = rows.rows
    if isinstance(data, Dataset):
        held_out = max(1, round(len(data) * percentage / 100))
        if held_out >= len(data):
            raise ValueError(f"{rows.origin} has too few rows to hold some out. Give --validation_file.")
        parts = data.select(range(held_out, len(data))), data.select(range(held_out))
    else:
        parts = (
            data.filter(lambda _row, index: index % 100 >= percentage, with_indices=True),
            data.filter(lambda _row, index: index % 100 < percentage, with_indices=True),
        )
    train, validation = (Rows(part, rows.origin, rows.rows_are_lines) for part in parts)
    return train, validation


def tokenize(rows: Rows, arguments: DataArguments, tokenizer: PreTrainedTokenizerBase) -> Dataset | IterableDataset:
    """Turn rows into rows of token ids, `input_ids`: as they are where a column of that name holds them."""
    data = rows.rows
    example = _first(data, rows.origin)
    if example is None:
        raise ValueError(f"{rows.origin} is empty.")
    if arguments.text_column in (None, "input_ids") and _is_tokenized(example.get("input_ids")):
        return data.select_columns(["input_ids"])
    column = choose_text_column(example, arguments.text_column, rows.origin)
    end = [] if rows.rows_are_lines or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        texts = [as_text(value) for value in batch[column]]
        ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return {"input_ids": [row + end for row in ids]}

    return _map(data, encode, arguments, "Tokenizing", list(example), num_proc=arguments.preprocessing_num_workers)


def _first(data: Dataset | IterableDataset, origin: str) -> dict[str, Any] | None:
    """Return the first row, or None; a stream is read here for the first time."""
    try:
        return next(iter(data), None)
    except Exception as error:  # each reader has its own
        raise ValueError(f"{origin} cannot be read: {one_line(error)}") from error


def choose_text_column(example: dict[str, Any], wanted: str | None, origin: str) -> str:
    """Return the column that holds the text: the wanted one, a usual name, or the only one that can be text."""
    if wanted is not None:
        if wanted not in example:
            raise ValueError(f"--text_column {wanted} is not in {origin}. Its columns are {', '.join(example)}.")
        if not _is_text(example[wanted]):
            raise ValueError(f"--text_column {wanted} of {origin} holds {type(example[wanted]).__name__}, not text.")
        return wanted
    candidates = [name for name, value in example.items() if _is_text(value)]
    usual = [name for name in TEXT_COLUMNS if name in candidates]
    if usual or len(candidates) == 1:
        return (usual or candidates)[0]
    if not candidates:
        raise ValueError(f"{origin} has no column of text: its columns are {', '.join(example)}.")
    raise ValueError(f"Which column of {origin} is the text? Choose with --text_column from {', '.join(candidates)}.")


def _is_tokenized(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(token, int) for token in value)


def _is_text(value: Any) -> bool:
    return (
        value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(x, str) for x in value))
    )


def as_text(value: str | list[str] | None) -> str:
    r"""Return a text as it is, and the turns of a dialogue on a line each.

    >>> as_text(["Hello . ", "Hi ."])
    'Hello .\nHi .'
    """
    if isinstance(value, list):
        return "\n".join(turn.strip() for turn in value)
    return value or ""


def cut_blocks(
    tokens: Dataset | IterableDataset, block_size: int, arguments: DataArguments, origin: str
) -> Dataset | IterableDataset:
    """Concatenate all tokens and cut them into blocks. A stream is cut a thousand rows at a time."""

    def cut(batch: dict[str, Any]) -> dict[str, np.ndarray]:
        ids = np.concatenate([np.asarray(row, dtype=np.int64) for row in batch["input_ids"]])
        blocks = ids[: len(ids) // block_size * block_size].reshape(-1, block_size)
        return {"input_ids": blocks, "labels": blocks}

    if isinstance(tokens, IterableDataset):
        stream = _map(tokens, cut, arguments, "", ["input_ids"])
        if _first(stream, origin) is None:
            raise ValueError(f"{origin} is shorter than one block: --block_size is {block_size}.")
        return stream
    description = f"Cutting blocks of {block_size}"
    blocks = _map(tokens.with_format("numpy"), cut, arguments, description, ["input_ids"], batch_size=None)
    if len(blocks) == 0:
        count = sum(len(row) for row in tokens["input_ids"])
        raise ValueError(f"{origin} has {count} tokens, less than one block: --block_size is {block_size}.")
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
        return data.map(function, batched=True, remove_columns=remove_columns)
    return data.map(
        function,
        batched=True,
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
