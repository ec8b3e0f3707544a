"""Rows that were not trained on, as people are told of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..records.errors import one_line
from ..records.files import RANKED_NAME, write_whole
from .held import Call
from .identity import source_of
from .ranking import RowRanking
from .row_losses import owners_of

logger = logging.get_logger(__name__)

EXCERPT_TOKENS = 128
"""How much of each row of a skipped batch is kept, to show which data are broken."""

KEPT_TOKENS = 256
"""How much of a dropped row is kept, to show what it is about."""


@dataclass(frozen=True)
class DroppedRow:
    """A row that was not trained on, as it is told to people.

    Attributes:
        position: In its batch.
        index: What the micro-batch said of its place in the training set; `UNKNOWN` if nothing.
        loss: Mean loss per target of the first pass, in nats.
        limit: The loss above which the rule drops such a row; None where it has none.
        targets: How many.
        input_ids: Its first tokens, without padding.
        text: What these say; None without a tokenizer.
        source: Its place in the training set, and the file or data set and rows that it comes from; see `source_of`.
    """

    position: int
    index: int
    loss: float
    limit: float | None
    targets: int
    input_ids: list[int]
    text: str | None = None
    source: Mapping[str, Any] = field(default_factory=dict)

    def as_line(self) -> dict[str, Any]:
        """Return it as it is written down, without what is not known."""
        is_finite = math.isfinite(self.loss)
        line = {
            "position": self.position,
            **self.source,
            "limit": self.limit,
            "targets": self.targets,
            "reason": "outlier" if is_finite else "non-finite",
            "input_ids": self.input_ids,
            "text": self.text,
        }
        known = {name: value for name, value in line.items() if value is not None}
        return {**known, "loss": self.loss if is_finite else None}


def tokens_of_rows(inputs: Any, rows: int) -> list[list[int]]:
    """Return the first tokens of each row, without padding; nothing of rows that are not made of tokens.

    Args:
        rows: How many there are: as many as rows of the tensors, or as documents in them.
    """
    if (found := _tokens_in(inputs)) is None:
        return [[] for _ in range(rows)]
    ids, there = found
    owners = owners_of(inputs, ids)
    owners = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids) if owners is None else owners
    return [ids[there & (owners == row)][:KEPT_TOKENS].tolist() for row in range(rows)]


def excerpts(calls: list[Call]) -> list[list[int]]:
    """Return the first tokens of each row of some micro-batches, without padding."""
    rows: list[list[int]] = []
    for call in calls:
        if (found := _generated_tokens(call) if call.rollout else _tokens_in(call.inputs)) is not None:
            rows += [row[kept][:EXCERPT_TOKENS].tolist() for row, kept in zip(*found, strict=True)]
    return rows


def _generated_tokens(call: Call) -> tuple[Tensor, Tensor] | None:
    """Return the tokens of a micro-batch that was generated, prompts and completions, as `_tokens_in` does."""
    made = call.rollout.inputs if call.rollout else None
    if made is None:
        return None
    ids, there = (torch.cat([made[f"prompt_{name}"], made[f"completion_{name}"]], dim=1) for name in ("ids", "mask"))
    return ids, there.bool()


def _tokens_in(inputs: Any) -> tuple[Tensor, Tensor] | None:
    """Return the tokens of a micro-batch, of shape (rows, length), and which of them are no padding; None if it has
    none.
    """
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return None
    mask = inputs.get("attention_mask")
    return ids, mask.bool() if isinstance(mask, Tensor) and mask.shape == ids.shape else torch.ones_like(ids) > 0


def decoded(trainer: Any, tokens: Sequence[int]) -> str | None:
    """Return what tokens say; None without tokens or without a tokenizer."""
    decode = getattr(trainer.processing_class, "decode", None)
    return decode(tokens) if decode is not None and tokens else None


MOST_RANKED = 200
"""Rows of the highest and of the lowest losses whose text a run with `--rank_rows` leaves behind."""


def write_ranked(trainer: Any, ranking: RowRanking, directory: Path) -> None:
    """Write what the rows of the highest and of the lowest losses say, and where they come from."""
    try:
        lines = [_described(trainer, index) for index in ranking.extremes(MOST_RANKED)]
    except Exception as error:  # the data set is somebody else's code, and the run is over: nothing of it may be lost
        logger.warning(f"{RANKED_NAME} is not written: a row of the training set cannot be read ({one_line(error)}).")
        return
    write_whole(directory / RANKED_NAME, "".join(json.dumps(line) + "\n" for line in lines))


def _described(trainer: Any, index: int) -> dict[str, Any]:
    row = trainer.train_dataset[index]
    ids = row.get("input_ids") if isinstance(row, Mapping) else None
    tokens = [] if ids is None else torch.as_tensor(ids).flatten()[:KEPT_TOKENS].tolist()
    text = decoded(trainer, tokens)
    said = {} if text is None else {"text": text}
    return {**source_of(trainer.train_dataset, index), "index": index, "input_ids": tokens, **said}


def with_text(trainer: Any, dropped: Sequence[DroppedRow]) -> list[DroppedRow]:
    """Add to dropped rows, on the main process, what they say and where they come from."""
    if not trainer.is_world_process_zero():
        return []
    return [
        replace(row, text=decoded(trainer, row.input_ids), source=source_of(trainer.train_dataset, row.index))
        for row in dropped
    ]
