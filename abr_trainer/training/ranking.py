"""The last loss of every row of the training set, so that all of them can be ranked."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import IterableDataset
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..perplexity.windows import IntArray
from ..records.files import ROW_LOSSES_NAME, replacing
from .config import setting

logger = logging.get_logger(__name__)

AT_ONCE = 2**18
"""Rows that are sorted at a time: what that takes beside the 12 bytes a row is small."""


class RowRanking:
    """What the first passes of a run have measured of each row, by its index in the training set: 12 bytes a row.

    Attributes:
        loss: Of the last first pass over the row, in nats per target. NaN if there was none.
        visits: First passes over the row.
        step: The batch of the last one, from 1; 0 if there was none.
    """

    def __init__(self, rows: int) -> None:
        self.loss = np.full(rows, np.nan, dtype=np.float32)
        self.visits = np.zeros(rows, dtype=np.int32)
        self.step = np.zeros(rows, dtype=np.int32)

    @classmethod
    def of(cls, trainer: Any) -> RowRanking | None:
        """Return an empty ranking if `--rank_rows` asks for one and there is a training set.

        Raises:
            ValueError: The training set has no length.
        """
        if not setting(trainer.args, "rank_rows") or trainer.train_dataset is None:
            return None
        if not has_length(trainer.train_dataset) or isinstance(trainer.train_dataset, IterableDataset):
            raise ValueError(
                "--rank_rows needs a training set with a length: rows of a stream have no place in a ranking. Leave "
                "--rank_rows out, or read the data without --streaming."
            )
        return cls(len(trainer.train_dataset))

    def note(
        self, step: int, indices: IntArray, losses: npt.NDArray[np.floating[Any]], targets: IntArray | None = None
    ) -> None:
        """Take note of the rows of a batch, over all ranks.

        Args:
            step: The number of the batch, from 1.
            indices: Of the rows, in the training set. What is no row of it has a negative one, and is left out.
            losses: Of the rows, mean per target. They may be NaN or infinite.
            targets: In each of them. Documents that are packed into one row, and so have the same index, count by
                them; without targets, they count alike.
        """
        numbers, values = np.asarray(indices, dtype=np.int64), np.asarray(losses, dtype=np.float64)
        weights = np.ones(len(numbers)) if targets is None else np.asarray(targets, dtype=np.float64)
        known = (numbers >= 0) & (weights > 0)
        numbers, values, weights = numbers[known], values[known], weights[known]
        rows, where = np.unique(numbers, return_inverse=True)
        self.loss[rows] = np.bincount(where, values * weights) / np.bincount(where, weights)
        self.visits[rows] += 1
        self.step[rows] = step

    def extremes(self, most: int) -> list[int]:
        """Return the rows of the highest losses, highest first, and those of the lowest, lowest last: so many of each.

        A loss that is not finite is higher than all others. Rows that were never visited are left out.
        """
        candidates = np.empty(0, dtype=np.int64)
        for start in range(0, len(self.loss), AT_ONCE):
            seen = start + np.flatnonzero(self.visits[start : start + AT_ONCE])
            candidates = self._extremes_of(np.concatenate([candidates, seen]), most)
        found: list[int] = candidates.tolist()
        return found

    def _extremes_of(self, rows: npt.NDArray[np.int64], most: int) -> npt.NDArray[np.int64]:
        rows = np.sort(rows)  # of equal losses, the first row comes first
        order = rows[np.argsort(-np.nan_to_num(self.loss[rows], nan=np.inf), kind="stable")]
        return order if len(order) <= 2 * most else np.concatenate([order[:most], order[-most:]])

    def save(self, directory: Path) -> None:
        """Write everything, all or nothing."""
        with replacing(directory / ROW_LOSSES_NAME) as file:
            np.savez(file, loss=self.loss, visits=self.visits, step=self.step)

    def load(self, directory: Path) -> None:
        """Go on from a checkpoint; a warning says if it has nothing to go on from.

        Raises:
            ValueError: It is of another number of rows.
        """
        path = directory / ROW_LOSSES_NAME
        try:
            with np.load(path, allow_pickle=False) as saved:
                for name in ("loss", "visits", "step"):  # one after the other: each takes a third of the memory
                    array = saved[name]
                    rows = len(array)
                    if rows != len(self.loss):
                        break
                    getattr(self, name)[:] = array
                    del array
        except FileNotFoundError:
            logger.warning(
                f"{directory} has no {ROW_LOSSES_NAME}: --rank_rows knows nothing of the batches before it."
            )
            return
        except (KeyError, ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is damaged. Go on from another checkpoint.") from error
        if rows != len(self.loss):
            raise ValueError(
                f"{path} is of a training set of {rows:,} rows, and this one has {len(self.loss):,}: "
                "resume with the data that the run was begun with, or without --rank_rows."
            )

    def warn_if_empty(self) -> None:
        """Say so if no row of any batch could be told: a collator or a loader of one's own can hide that."""
        if len(self.loss) and not self.visits.any():
            logger.warning(
                f"--rank_rows has seen no row, and {ROW_LOSSES_NAME} is empty: the data collator or the data loader "
                "does not show which rows a batch is made of."
            )
