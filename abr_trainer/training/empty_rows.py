"""Rows of a data set that a model learns nothing from, or nothing new: without targets, empty, or there twice."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from transformers import DataCollatorForLanguageModeling, DataCollatorForPermutationLanguageModeling
from transformers.utils import logging

from ..perplexity.windows import IGNORE_INDEX, IntArray
from ..report.rows import RunRow
from .identity import source_of
from .targets import first_target

logger = logging.get_logger(__name__)

MAKE_LABELS = (DataCollatorForLanguageModeling, DataCollatorForPermutationLanguageModeling)
"""Collators that replace the labels of the data set."""

MOST_ROWS = 100_000
MOST_LABELS = 50_000_000
"""How much of a data set is looked at before training: 100,000 rows take 0.1 to 3 s."""

ROWS_AT_A_TIME = 1_000
NAMED = 5
"""Rows that are named as examples."""

TOKENS = "input_ids"
SAY_LITTLE = {TOKENS, "attention_mask", "token_type_ids", "position_ids", "special_tokens_mask", "seq_lengths"}
"""Columns that follow from the text of a row."""


@dataclass(frozen=True)
class RowsWithoutTargets:
    """What was found in a data set.

    Attributes:
        looked_at: Rows looked at, from the first on.
        indices: Those without a target, from 0.
        is_all: There are no other rows.
    """

    looked_at: int
    indices: tuple[int, ...]
    is_all: bool

    def describe(self, of: str, dataset: Any = None) -> str:
        """Return a sentence.

        Args:
            dataset: It, of which some know where their rows come from.

        >>> RowsWithoutTargets(looked_at=40, indices=(2, 7), is_all=True).describe("training")
        '2 of the 40 rows of the training set (5.0 %) have no target (a label other than -100): index 2, index 7.'
        """
        count = _share(len(self.indices), self.looked_at, self.is_all, of)
        verb = "has" if len(self.indices) == 1 else "have"
        return f"{count} {verb} no target (a label other than -100): {_named(self.indices, dataset)}."


@dataclass(frozen=True)
class UselessRows:
    """What was found in the tokens of a data set.

    Attributes:
        looked_at: Rows looked at, from the first on.
        empty: Those without a token, from 0.
        repeats: Those that have the tokens and labels of an earlier one, each with the first of these.
        is_all: There are no other rows.
    """

    looked_at: int
    empty: tuple[int, ...]
    repeats: tuple[tuple[int, int], ...]
    is_all: bool

    def describe(self, of: str, dataset: Any = None) -> list[str]:
        """Return a sentence for each kind of row that there is.

        Args:
            dataset: It, of which some know where their rows come from.

        >>> UselessRows(looked_at=40, empty=(2,), repeats=(), is_all=True).describe("training")
        ['1 of the 40 rows of the training set (2.5 %) has no token: index 2.']
        """
        lines = []
        if self.empty:
            count = _share(len(self.empty), self.looked_at, self.is_all, of)
            verb = "has" if len(self.empty) == 1 else "have"
            lines.append(f"{count} {verb} no token: {_named(self.empty, dataset)}.")
        if self.repeats:
            count = _share(len(self.repeats), self.looked_at, self.is_all, of)
            verb = "repeats" if len(self.repeats) == 1 else "repeat"
            pairs = ([_place(index, dataset) for index in pair] for pair in self.repeats[:NAMED])
            named = ", ".join(f"{row} repeats {first}" for row, first in pairs)
            more = " and others" if len(self.repeats) > NAMED else ""
            lines.append(f"{count} {verb} an earlier row, tokens and labels: {named}{more}.")
        return lines


def _share(found: int, looked_at: int, is_all: bool, of: str) -> str:
    rows = f"{looked_at:,} rows" if is_all else f"first {looked_at:,} rows"
    return f"{found:,} of the {rows} of the {of} set ({100 * found / looked_at:.1f} %)"


def _named(indices: tuple[int, ...], dataset: Any) -> str:
    return ", ".join(_place(index, dataset) for index in indices[:NAMED]) + " and others" * (len(indices) > NAMED)


def _place(index: int, dataset: Any) -> str:
    row = RunRow(**source_of(dataset, index))
    return f"index {index}" + (f" ({row.place})" if row.source is not None else "")


def find_rows_without_targets(dataset: Any, collator: Any, first: int) -> RowsWithoutTargets | None:
    """Look for rows without targets, where labels can be read without running anybody's code.

    That is in a list of rows, and in a column of a `datasets.Dataset`. Of a large one the first `MOST_ROWS` rows, or
    `MOST_LABELS` labels, are looked at. 100,000 rows of 20 labels on disk took 0.1 s, 1.4 s when shuffled; 98,000 of
    512 labels took 0.6 s, 2.5 s when shuffled, and 2.7 s as a list of tensors.

    Args:
        collator: What makes batches of rows. Some make labels of their own.
        first: Position of the first label in a row that can be a target.

    Returns:
        None where that cannot be told: a stream, a data set of one's own, one that transforms its rows.
    """
    if isinstance(collator, MAKE_LABELS) or not _can_be_read(dataset):
        return None
    looked_at = labels_seen = 0
    indices: list[int] = []
    for targets, labels in _targets_of_rows(dataset, first):
        indices += (looked_at + np.flatnonzero(targets == 0)).tolist()
        looked_at += len(targets)
        labels_seen += labels
        if looked_at >= MOST_ROWS or labels_seen >= MOST_LABELS:
            break
    return RowsWithoutTargets(looked_at, tuple(indices), looked_at == len(dataset)) if looked_at else None


def find_useless_rows(dataset: Any, label_names: Sequence[str], inputs: Collection[str] | None) -> UselessRows | None:
    """Look for rows without a token, and for rows whose tokens and labels are those of an earlier one.

    It looks where and as far as `find_rows_without_targets` does, and keeps a digest of each row. 49,000 rows of 512
    tokens and as many labels took 1.3 s on disk, 2.5 s when shuffled; 100,000 of 20 took 3.8 s as a list of tensors.

    Args:
        label_names: What labels are called.
        inputs: Columns that the model gets; None for all.

    Returns:
        None where that cannot be told, for one because the model gets more than tokens.
    """
    if not _can_be_read(dataset):
        return None
    columns = _columns(dataset, inputs)
    others = columns - {*SAY_LITTLE, *label_names}
    if TOKENS not in columns or others:
        return None
    looked_at = values_seen = 0
    empty: list[int] = []
    repeats: list[tuple[int, int]] = []
    first: dict[bytes, int] = {}
    compared = [TOKENS, *sorted(columns & {*label_names})]
    for parts in zip(*(_parts(dataset, name, of_any_number=True) for name in compared), strict=False):
        if any(part is None for part in parts):
            return None
        for row in zip(*(_split(*part) for part in parts), strict=True):
            if not len(row[0]):
                empty.append(looked_at)
            else:
                digest = blake2b(digest_size=16)
                for values in row:
                    digest.update(len(values).to_bytes(8, "little"))
                    digest.update(values.astype(np.float64 if values.dtype.kind == "f" else np.int64, copy=False))
                earlier = first.setdefault(digest.digest(), looked_at)
                if earlier != looked_at:
                    repeats.append((looked_at, earlier))
            looked_at += 1
        values_seen += sum(len(values) for _, values in parts)
        if looked_at >= MOST_ROWS or values_seen >= MOST_LABELS:
            break
    return UselessRows(looked_at, tuple(empty), tuple(repeats), looked_at == len(dataset)) if looked_at else None


def _columns(dataset: Any, inputs: Collection[str] | None) -> set[str]:
    """Return the columns that a model gets; of a list, those of its first row."""
    first = dataset.column_names if _is_of_datasets(dataset) else dataset[0]
    names = set(first) if isinstance(first, list | Mapping) else set()
    return names if inputs is None else names & {*inputs}


def _split(lengths: IntArray, values: Any) -> Iterator[Any]:
    end = 0
    for length in lengths.tolist():
        yield values[end : end + length]
        end += length


def _can_be_read(dataset: Any) -> bool:
    """Tell whether there are rows that can be read without running anybody's code."""
    return (isinstance(dataset, list | tuple) or _is_of_datasets(dataset)) and len(dataset) > 0


def _is_of_datasets(dataset: Any) -> bool:
    """Tell whether it is a `datasets.Dataset`; where nobody has imported that library, it is none."""
    library = sys.modules.get("datasets")
    return library is not None and isinstance(dataset, library.Dataset)


def _targets_of_rows(dataset: Any, first: int) -> Iterator[tuple[IntArray, int]]:
    """Yield the targets of each row of a part of the data set, and how many labels these rows have; nothing where
    that cannot be told.
    """
    for part in _parts(dataset, "labels"):
        if part is None:
            return
        lengths, labels = part
        ends = np.cumsum(lengths)
        begins = np.minimum(ends - lengths + first, ends)
        before = np.concatenate([[0], np.cumsum(labels != IGNORE_INDEX)])
        yield before[ends] - before[begins], len(labels)


def _parts(dataset: Any, name: str, of_any_number: bool = False) -> Iterator[tuple[IntArray, Any] | None]:
    """Yield the number of values in a column of each of some rows, and these values; None where they are not numbers.

    Args:
        of_any_number: Numbers with fractions are numbers, too.
    """
    if _is_of_datasets(dataset):
        if name not in dataset.column_names or dataset.format["type"] == "custom":
            return
        column = dataset.select_columns([name]).with_format("arrow")
        for table in column.iter(ROWS_AT_A_TIME):
            yield _of_column(table[name].combine_chunks(), of_any_number)
        return
    kind = np.number if of_any_number else np.integer
    for start in range(0, len(dataset), ROWS_AT_A_TIME):
        rows = dataset[start : start + ROWS_AT_A_TIME]
        if not all(isinstance(row, Mapping) and name in row and "shift_labels" not in row for row in rows):
            return
        values = [_of_row(row[name]) for row in rows]
        is_known = all(each.ndim == 1 and (np.issubdtype(each.dtype, kind) or not each.size) for each in values)
        yield (np.array([len(each) for each in values]), np.concatenate(values)) if is_known else None


def _of_row(value: Any) -> Any:
    array = np.atleast_1d(np.asarray(value))
    return array if array.size else array.astype(np.int64)  # an empty list is one of floats to numpy


def _of_column(column: Any, of_any_number: bool) -> tuple[IntArray, Any] | None:
    import pyarrow as pa  # here, because a trainer of other data sets needs no Arrow
    import pyarrow.compute as pc

    def is_number(kind: Any) -> bool:
        return bool(pa.types.is_integer(kind) or (of_any_number and pa.types.is_floating(kind)))

    kind = column.type
    if is_number(kind) and not column.null_count:
        return np.ones(len(column), dtype=np.int64), column.to_numpy(zero_copy_only=False)
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not is_number(kind.value_type):
        return None
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    return lengths.astype(np.int64), pc.list_flatten(column).to_numpy(zero_copy_only=False)


class WatchForEmptyRows:
    """Warns of rows without targets in a training set: before the first batch where they can be found without running
    anybody's code, after the last one where they can only be counted as they pass.
    """

    def __init__(self) -> None:
        self._inspected: tuple[Any, bool] | None = None  # a training set, and whether all of its rows were looked at
        self._empty = self._passed = 0

    def forget_counts(self) -> None:
        """Begin to count anew, for another run."""
        self._empty = self._passed = 0

    def warn_at_start(self, trainer: Any) -> None:
        """Name the rows of the training set that have no targets, no tokens, or those of another; once for a set."""
        dataset = trainer.train_dataset
        if self._inspected is not None and self._inspected[0] is dataset:
            return
        found = find_rows_without_targets(dataset, trainer.data_collator, first_target(trainer))
        self._inspected = dataset, found is not None and found.is_all
        if not trainer.is_world_process_zero():
            return
        if found is not None and found.indices:
            logger.warning(f"{found.describe('training', dataset)} A batch of such rows alone is skipped.")
        inputs = None
        if trainer.args.remove_unused_columns:
            trainer._set_signature_columns_if_needed()
            inputs = trainer._signature_columns
        label_names = ["label", "label_ids", *trainer.label_names]
        useless = find_useless_rows(dataset, label_names, inputs)
        for line in () if useless is None else useless.describe("training", dataset):
            logger.warning(line)

    def count(self, empty: int, rows: int) -> None:
        """Count the rows of a batch."""
        self._empty += empty
        self._passed += rows

    def warn_at_end(self, trainer: Any) -> None:
        """Say how many rows without targets went by, if the start could not say so."""
        was_told = self._inspected is not None and self._inspected[1]
        if self._empty and not was_told and trainer.is_world_process_zero():
            logger.warning(
                f"{self._empty:,} of the {self._passed:,} rows that went by had no target (a label other than -100)."
            )
