"""Which rows of the training set a batch is made of.

The loader of the training set gives each micro-batch one more tensor, `abr_row`: for each row the index that it has in
the training set, before shuffling. The batches, their order and the random state stay as they are without it. It is
there only if a row rule or `--rank_rows` asks for it, and is taken out before the model sees the inputs.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import IterableDatasetShard
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from ..data.identity import SOURCE_COLUMN, UNKNOWN, are_blocks, located, sources_of
from .config import setting

ROW_INDEX = "abr_row"
"""In a micro-batch: the index of each row that is judged, shape `(rows,)`."""

KEEP_ORDER = ("abr_trainer", "transformers", "trl")
"""Packages whose collators put rows into a batch in the order in which they get them."""


_SOURCES: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""The column of the sources of a data set: making it takes ten times as long as looking into it."""


def asks_for_rows(args: Any) -> bool:
    """Tell whether the arguments of a run ask which rows a batch is made of."""
    return bool(setting(args, "rank_rows")) or setting(args, "skip_rows") != "none"


def wants_row_indices(trainer: Any) -> bool:
    """Tell whether anything asks which rows a batch is made of."""
    return trainer.row_rule is not None or asks_for_rows(trainer.args)


def taken_out(inputs: Any) -> tuple[Any, Tensor | None]:
    """Take the indices of its rows out of a micro-batch.

    Returns:
        The micro-batch, and an int64 tensor with an index for each row that is judged, `UNKNOWN` for what is no row of
        the training set; None if no index is known.
    """
    is_there = isinstance(inputs, MutableMapping) and ROW_INDEX in inputs
    return inputs, inputs.pop(ROW_INDEX) if is_there else None


def source_of(dataset: Any, index: int) -> dict[str, Any]:
    """Return what is known of a row of the training set, by what `ROW_INDEX` says of it.

    Returns:
        `index`, its place in the training set from 0, and `source`, `first_row` and `last_row`: the file or the data
        set that it was made of, and from which row of it to which, from 1. What is not known is missing. A row of a
        stream that has a source has no index. A block of tokens, which may hold only a part of these rows, has
        `is_block`.
    """
    index = int(index)
    if index < 0:
        return {}
    names = sources_of(dataset)
    block = {"is_block": True} if are_blocks(dataset) else {}
    if isinstance(dataset, IterableDataset):
        return located(names, index) | block if names else {"index": index}
    if not names or SOURCE_COLUMN not in dataset.column_names:
        return {"index": index}
    if dataset not in _SOURCES:
        _SOURCES[dataset] = dataset.select_columns([SOURCE_COLUMN]).with_format(None)
    return {"index": index, **located(names, _SOURCES[dataset][index][SOURCE_COLUMN]), **block}


def numbered(loader: Any, dataset: Any, collator: Any) -> Any:
    """Make a loader of the training set put `ROW_INDEX` into its micro-batches. It is changed in place.

    The data set inside is replaced after samplers, shards and accelerate have looked at it: what they do depends on
    its class.

    Args:
        loader: As accelerate has prepared it. Another one than a `DataLoader` of torch stays as it is.
        dataset: The training set, before ranks share it.
        collator: The trainer's own, which may be inside of that of the loader.
    """
    base = getattr(loader, "base_dataloader", loader)
    if not isinstance(base, DataLoader) or (base.batch_size is None and base.batch_sampler is None):
        return loader
    inner = base.dataset
    if not isinstance(inner, IterableDataset):
        rows: Any = NumberedRows(inner)
    elif isinstance(inner, IterableDatasetShard):  # each rank reads all rows, and takes its own
        inner.dataset, rows = NumberedStream(inner.dataset, has_fixed_order(dataset)), inner
    else:
        rows = NumberedStream(inner, has_fixed_order(dataset))
    object.__setattr__(base, "dataset", rows)  # a DataLoader refuses another data set, for the sake of its samplers
    base.collate_fn = NumberingCollator(base.collate_fn, keeps_order(collator))
    return loader


class _Around:
    """Stands for a data set, with all that it has."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getattr__(self, name: str) -> Any:
        if name == "rows" or name.startswith("__"):  # as while it is unpickled in a worker
            raise AttributeError(name)
        return getattr(self.rows, name)


class NumberedRows(_Around, Dataset[Any]):
    """The rows of a data set, each with its index."""

    def __getitem__(self, index: Any) -> tuple[int, Any]:
        return self._number(index), self.rows[index]

    def __getitems__(self, indices: Sequence[Any]) -> list[tuple[int, Any]]:
        fetch = getattr(self.rows, "__getitems__", None)
        rows = fetch(indices) if fetch else [self.rows[index] for index in indices]
        numbers = [self._number(index) for index in indices]
        if len(rows) != len(numbers):
            return [(UNKNOWN, row) for row in rows]
        return list(zip(numbers, rows, strict=True))

    def _number(self, index: Any) -> int:
        try:
            number = int(index)
            return number if number >= 0 else number + len(self.rows)
        except (TypeError, ValueError):
            return UNKNOWN  # a key, of a sampler of one's own


class NumberedStream(_Around, IterableDataset[Any]):
    """The rows of a stream, each with what it says about its source, or else with its position.

    Args:
        is_in_order: See `has_fixed_order`.
    """

    def __init__(self, rows: Any, is_in_order: bool) -> None:
        super().__init__(rows)
        self.is_in_order = is_in_order

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        worker = get_worker_info()
        is_alone = worker is None or worker.num_workers == 1 or _is_of_datasets(self.rows)  # of which one worker reads
        has_positions = self.is_in_order and is_alone
        for position, row in enumerate(self.rows):
            source = row.get(SOURCE_COLUMN) if isinstance(row, Mapping) else None
            yield (position if has_positions else UNKNOWN) if source is None else int(source), row


def has_fixed_order(stream: Any) -> bool:
    """Tell whether the same row is at a position in each round, and for each rank.

    That is not so for a stream of `datasets` that is shuffled, mixed at random, of one node of many, or read from
    several files: these are dealt out to ranks and workers, and come in another order in a later epoch.
    """
    if not _is_of_datasets(stream):
        return True
    if stream.num_shards > 1 or getattr(stream, "_distributed", None) is not None:
        return False
    pending = [getattr(stream, "_ex_iterable", None)]
    while pending:
        part = pending.pop()
        if part is None or any(word in type(part).__name__ for word in ("Shuffled", "Random")):
            return False
        pending += getattr(part, "ex_iterables", [part.ex_iterable] if hasattr(part, "ex_iterable") else [])
    return True


def _is_of_datasets(stream: Any) -> bool:
    return type(stream).__module__.startswith("datasets.")


def keeps_order(collator: Any) -> bool:
    """Tell whether a collator is known to put rows into a batch in the order in which it gets them."""
    while isinstance(collator, functools.partial):
        collator = collator.func
    named = collator if hasattr(collator, "__qualname__") else type(collator)
    return str(getattr(named, "__module__", "")).partition(".")[0] in KEEP_ORDER


class NumberingCollator:
    """Makes a batch of numbered rows, with their numbers in it where it is known which row is where.

    Args:
        collate: What makes the batch.
        keeps_order: It is known to keep the order of the rows. Else the tokens in the batch must say so.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], keeps_order: bool) -> None:
        self.collate = collate
        self.keeps_order = keeps_order

    def __call__(self, rows: Sequence[tuple[int, Any]]) -> Any:
        numbers, features = [number for number, _ in rows], [without_source(feature) for _, feature in rows]
        batch = self.collate(features)
        if isinstance(batch, MutableMapping) and ROW_INDEX not in batch and any(each >= 0 for each in numbers):
            indices = self._numbers_in(batch, features, numbers)
            if indices is not None:
                batch[ROW_INDEX] = torch.tensor(indices, dtype=torch.int64)
        return batch

    def _numbers_in(self, batch: Mapping[str, Any], features: list[Any], numbers: list[int]) -> list[int] | None:
        """Return the number of each row of a batch, in order; None if that cannot be told."""
        ids = batch.get("input_ids")
        ids = ids if isinstance(ids, Tensor) and ids.dim() == 2 else None
        documents = [_documents(feature) for feature in features]
        if ids is not None and len(ids) == 1 and (len(features) > 1 or documents[0] > 1):
            return self._numbers_in_one_row(batch, ids, features, numbers, documents)
        if self.keeps_order:
            return numbers
        if ids is None or not all(_has_tokens(feature) for feature in features):
            sizes = [len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()]
            return numbers if sizes and set(sizes) == {len(numbers)} else None
        order = _find_order(ids, [_tokens(feature) for feature in features])
        return None if order is None else [numbers[i] for i in order]

    def _numbers_in_one_row(
        self, batch: Mapping[str, Any], ids: Tensor, features: list[Any], numbers: list[int], documents: list[int]
    ) -> list[int] | None:
        """Return the numbers where all rows stand in one, one after the other: one for each document."""
        if not all(_has_tokens(feature) for feature in features):
            return None
        joined = np.concatenate([_tokens(feature) for feature in features])
        if not self.keeps_order and not _is_row(ids[0].numpy(), joined):
            return None
        indices = [number for number, many in zip(numbers, documents, strict=True) for _ in range(many)]
        bounds = batch.get("cu_seq_lens_q")
        # Padding to a multiple counts as documents of a token each.
        padding = len(bounds) - 1 - len(indices) if isinstance(bounds, Tensor) else 0
        return indices + [UNKNOWN] * padding


def without_source(feature: Any) -> Any:
    if not (isinstance(feature, dict) and SOURCE_COLUMN in feature):
        return feature
    return {name: value for name, value in feature.items() if name != SOURCE_COLUMN}


def _has_tokens(feature: Any) -> bool:
    return isinstance(feature, Mapping) and "input_ids" in feature


def _tokens(feature: Any) -> Any:
    ids = feature["input_ids"]
    return np.asarray(ids.cpu() if isinstance(ids, Tensor) else ids).reshape(-1)


def _documents(feature: Any) -> int:
    """Return how many documents are packed into a row; a row without a token has none."""
    if not _has_tokens(feature):
        return 1
    lengths = feature.get("seq_lengths")
    return int(len(feature["input_ids"]) > 0) if lengths is None else sum(length > 0 for length in lengths)


def _find_order(ids: Tensor, tokens: list[Any]) -> list[int] | None:
    """Return which of some token rows is in each row of a batch; None if they are not all there, each once."""
    if len(ids) != len(tokens):
        return None
    order: list[int] = []
    left = list(range(len(tokens)))
    for position, row in enumerate(ids.numpy()):
        candidates = sorted(left, key=lambda index: index != position)  # mostly, they are in order
        found = next((index for index in candidates if _is_row(row, tokens[index])), None)
        if found is None:
            return None
        left.remove(found)
        order.append(found)
    return order


def _is_row(row: Any, tokens: Any) -> bool:
    """Tell whether a row of a batch is made of these tokens, padded on one side, or cut."""
    size = min(len(row), len(tokens))
    for kept, other in ((row[:size], row[size:]), (row[len(row) - size :], row[: len(row) - size])):
        same = np.array_equal(kept, tokens[:size]) or np.array_equal(kept, tokens[len(tokens) - size :])
        if same and (not len(other) or (other == other[0]).all()):
            return True
    return False
