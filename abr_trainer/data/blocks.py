"""Turn rows of text into blocks of tokens for causal language modelling."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset, interleave_datasets
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from .arguments import DataArguments
from .columns import TOKENS, Column, as_text, as_tokens, check_tokens
from .context import fit_context
from .corpora import parse_mix
from .identity import SOURCE_COLUMN, from_to, in_source, name_sources, rows_of
from .sources import TextRows, first_rows, load_rows, say_what_is_left_out

logger = logging.get_logger(__name__)

DEFAULT_BLOCK_SIZE = 1024


def choose_block_size(arguments: DataArguments, config: PreTrainedConfig) -> int:
    """Return `--block_size` or its default, checked against the model's context length."""
    return fit_context("block_size", arguments.block_size, DEFAULT_BLOCK_SIZE, config)


def load_blocks(
    arguments: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    splits: Collection[str],
    seed: int = 42,
    vocabulary: int | None = None,
    with_sources: bool = False,
) -> dict[str, Dataset | IterableDataset]:
    """Load, tokenize and cut the splits named: "train", "validation", "test" or "primer".

    Texts are tokenized without special tokens and concatenated. If a row is a document or a dialogue, an
    end-of-text token follows it. Tokens that do not fill the last block are dropped.

    Args:
        seed: Seed for drawing from the data sets of a mix.
        vocabulary: Number of token ids that the model knows. Default: the tokenizer's.
        with_sources: Record in `SOURCE_COLUMN` which rows of which source each training block was cut from.

    Returns:
        Data sets with the columns `input_ids` and `labels`, both of shape `(block_size,)` and equal.

    Raises:
        ValueError: A split is missing, cannot be read, has no such column, or is too short; the message names the
            flag. It is a `BadRow` if a row cannot be used; a stream raises it when it reaches that row.
    """
    vocabulary = vocabulary or len(tokenizer)
    sources: list[str] | None = [] if with_sources else None
    load = partial(_load_blocks, tokenizer=tokenizer, block_size=block_size, vocabulary=vocabulary, sources=sources)
    if arguments.dataset_mix is None:
        blocks = load(arguments, splits=splits)
    else:
        blocks = _load_mix(arguments, load, splits, seed)
    if sources is not None and "train" in splits:
        name_sources(blocks["train"], sources, are_blocks=True)
    return blocks


def _load_blocks(
    arguments: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    splits: Collection[str],
    vocabulary: int,
    sources: list[str] | None,
) -> dict[str, Dataset | IterableDataset]:
    """Load the blocks of one data set.

    Args:
        sources: Sources of the training blocks are appended to it; None to record no sources.
    """
    loaded = load_rows(arguments, splits, is_numbered=sources is not None)
    limits = {"train": ("max_train_samples", arguments.max_train_samples), "primer": ("", None)}
    blocks: dict[str, Dataset | IterableDataset] = {}
    for split, rows in loaded.items():
        flag, limit = limits.get(split, ("max_eval_samples", arguments.max_eval_samples))
        tokens = tokenize(rows, arguments, tokenizer)
        cut = cut_blocks(tokens, block_size, arguments, rows, vocabulary, sources if split == "train" else None)
        blocks[split] = at_most(cut, limit, flag, must_end=split != "train")
    return blocks


def _load_mix(
    arguments: DataArguments, load: Callable[..., Any], splits: Collection[str], seed: int
) -> dict[str, Dataset | IterableDataset]:
    """Mix the training blocks of several data sets; take the other splits from the first."""
    shares = parse_mix(arguments.dataset_mix or "")
    alone = partial(replace, arguments, dataset_mix=None, max_train_samples=None)
    each_alone = [alone(train_file=name) if Path(name).is_file() else alone(dataset_name=name) for name in shares]
    blocks: dict[str, Dataset | IterableDataset] = load(each_alone[0], splits=splits)
    if "train" not in splits:
        return blocks
    mixed = [blocks["train"]]
    mixed += [load(one, splits=["train"])["train"] for one in each_alone[1:]]
    if any(isinstance(each, IterableDataset) for each in mixed):
        mixed = [each if isinstance(each, IterableDataset) else each.to_iterable_dataset() for each in mixed]
    drawn = interleave_datasets(
        mixed,
        probabilities=list(shares.values()),
        seed=seed,
        stopping_strategy=arguments.mix_until,
    )
    blocks["train"] = at_most(drawn, arguments.max_train_samples, "max_train_samples", must_end=False)
    return blocks


_WARNED_OF: set[str] = set()


def _warn_of_first_left_out(column: Column, missing: Sequence[int]) -> None:
    """Warn once per stream, whose rows are not counted, that empty rows are left out."""
    if missing and column.place.origin not in _WARNED_OF:
        _WARNED_OF.add(column.place.origin)
        logger.warning(
            f"{column.place(missing[0])} has no {column.name} and is left out, as are all other rows without it."
        )


def tokenize(
    rows: TextRows, arguments: DataArguments, tokenizer: PreTrainedTokenizerBase
) -> Dataset | IterableDataset:
    """Turn rows into rows of token ids in `input_ids`. Given token ids stay as they are; no text gives an empty list.

    Raises:
        BadRow: A row holds neither text nor token ids.
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
            _warn_of_first_left_out(column, [i for value, each, i in raw if value is None and column.is_row(each)])
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


def cut_blocks(
    tokens: Dataset | IterableDataset,
    block_size: int,
    arguments: DataArguments,
    rows: TextRows,
    vocabulary: int,
    sources: list[str] | None = None,
    flag: str = "block_size",
) -> Dataset | IterableDataset:
    """Concatenate all tokens and cut them into blocks. A stream is cut a thousand rows at a time.

    Rows without a token are left out, with a warning.

    Args:
        sources: If given, each block records which rows of which source it was cut from, and the sources of these
            rows are appended to the list.
        flag: The flag that sets the block size, for messages.

    Raises:
        BadRow: A row has token ids that are not in the vocabulary.
    """
    column, origin = rows.column, rows.origin
    is_stream, are_given = isinstance(tokens, IterableDataset), column.name == TOKENS
    # If a stream has several shards, each reader counts only its own rows.
    are_counted = not is_stream or tokens.num_shards == 1
    offset: int | None = None
    if sources is not None:
        offset = len(sources)
        sources += rows.sources
    are_numbered = bool(rows.numbered)
    used = [TOKENS, SOURCE_COLUMN] if are_numbered else [TOKENS]

    def cut(batch: dict[str, Any], indices: list[int]) -> dict[str, np.ndarray]:
        ids = [np.asarray([] if row is None else row) for row in batch[TOKENS]]
        if are_given:
            for row, index in zip(ids, indices, strict=True):
                check_tokens(row, vocabulary, column.where(index))
        if are_given and is_stream and not column.is_json:
            _warn_of_first_left_out(column, [index for row, index in zip(ids, indices, strict=True) if not len(row)])
        joined = np.concatenate(ids).astype(np.int64)
        blocks = joined[: len(joined) // block_size * block_size].reshape(-1, block_size)
        found = {TOKENS: blocks, "labels": blocks}
        if offset is not None:
            row_numbers = column.place.rows(indices) if are_counted else np.zeros(len(ids), dtype=np.int64)
            numbers = np.asarray(batch[SOURCE_COLUMN]) if are_numbered else rows_of(0, row_numbers)
            ends, begins = np.cumsum([len(row) for row in ids]), np.arange(len(blocks)) * block_size
            first, last = (np.searchsorted(ends, each, side="right") for each in (begins, begins + block_size - 1))
            found[SOURCE_COLUMN] = in_source(from_to(numbers, first, last), offset)
        return found

    if is_stream:
        stream = _map(tokens, cut, arguments, "", used)
        if not first_rows(stream, origin, 1):
            raise ValueError(f"{origin} is shorter than one block: --{flag} is {block_size}. Give a smaller --{flag}.")
        return stream
    lengths = pc.list_value_length(tokens.with_format("arrow")[:][TOKENS]).fill_null(0).to_numpy()
    if not rows.rows_are_lines:
        empty = np.flatnonzero(lengths == 0).tolist()
        raw = rows.rows.select(empty)[rows.rows.column_names[0]]
        missing = [index for index, each in zip(empty, raw, strict=True) if column.is_row(each)]
        say_what_is_left_out(missing, len(lengths) - len(empty) + len(missing), rows)
    if lengths.sum() < block_size:
        raise ValueError(
            f"{origin} has {lengths.sum()} tokens, less than one block: --{flag} is {block_size}. "
            f"Give a smaller --{flag}."
        )
    description = f"Cutting blocks of {block_size}"
    blocks = _map(tokens.with_format("numpy"), cut, arguments, description, used, batch_size=None)
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


def at_most(
    blocks: Dataset | IterableDataset, limit: int | None, flag: str, must_end: bool
) -> Dataset | IterableDataset:
    """Return the first `limit` blocks.

    Args:
        limit: None for all of them.
        flag: The flag that sets the limit, for messages.
        must_end: Read a stream into memory, so that its blocks can be counted.

    Raises:
        ValueError: A stream must end, but there is no limit.
    """
    if isinstance(blocks, IterableDataset):
        if must_end and limit is None:
            raise ValueError(f"The length of a streamed data set is unknown. Give --{flag} to evaluate on it.")
        taken = blocks if limit is None else blocks.take(limit)
        return Dataset.from_list(list(taken)) if must_end else taken
    if limit is None or limit == len(blocks):
        return blocks
    if limit > len(blocks):
        logger.warning(f"--{flag} is {limit}, but there are only {len(blocks)} blocks: using all of them.")
        return blocks
    return blocks.select(range(limit))
