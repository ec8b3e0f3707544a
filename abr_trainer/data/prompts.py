"""What a model is given to continue, and what follows it in the data."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

PROMPT_TOKENS = 32
"""The beginning of a text, as long as this, is its prompt; half of a text that is shorter than two of them."""

NEW_TOKENS = 32
"""How far a text is continued."""

ANSWER_TOKENS = 128
"""How long an answer may be."""

LEAST_ROOM = 8
"""Tokens that the model's context must leave for an answer."""

MASKS = ("completion_mask", "assistant_masks")
"""Columns in which TRL says what is learnt, where there are no labels yet."""


@dataclass(frozen=True)
class Prompt:
    """What a model is given.

    Attributes:
        ids: Its tokens.
        text: What people are shown of it.
        reference: What follows it in the data.
        most: How many tokens the model may add.
    """

    ids: Sequence[int]
    text: str
    reference: str
    most: int


def spread(length: int, count: int | None) -> list[int]:
    """Return so many indices of a sequence, at equal distances; all of them for None.

    >>> spread(10, 3), spread(2, 3), spread(3, None)
    ([0, 3, 6], [0, 1], [0, 1, 2])
    """
    count = length if count is None else min(count, length)
    return [index * length // count for index in range(count)]


def prompts_in(
    rows: Any, tokenizer: PreTrainedTokenizerBase, count: int | None = None, context: int | None = None
) -> list[Prompt]:
    """Return the prompts in rows of tokens: of so many rows at equal distances, of a stream the first ones.

    Where a row has tokens that are not learnt before others that are, the last of the latter are the answer. Else it
    is a text, of which the beginning is the prompt. Rows of which neither can be had are left out.

    Args:
        count: None for all rows.
        context: How many tokens the model can attend to.
    """
    is_stream = isinstance(rows, IterableDataset)  # it has `__getitem__`, which raises
    if not is_stream and hasattr(rows, "__len__") and hasattr(rows, "__getitem__"):
        chosen: Iterator[Any] = (rows[index] for index in spread(len(rows), count))
    else:
        chosen = itertools.islice(iter(rows), count)
    found = (_prompt_in(row, tokenizer, context) for row in chosen)
    return [prompt for prompt in found if prompt is not None]


def _prompt_in(row: Any, tokenizer: PreTrainedTokenizerBase, context: int | None) -> Prompt | None:
    if not isinstance(row, Mapping) or row.get("input_ids") is None:
        return None
    ids, learnt = np.asarray(row["input_ids"]), _learnt_in(row)
    if row.get("attention_mask") is not None:
        there = np.asarray(row["attention_mask"]).astype(bool)
        ids, learnt = ids[there], learnt[there]
    if len(ids) < 2 or not learnt.any():
        return None
    end = int(np.flatnonzero(learnt)[-1]) + 1
    begin = end - int(np.argmin(learnt[:end][::-1])) if not learnt[:end].all() else 0
    tokens: list[int] = ids.tolist()
    if begin:
        reference, most = tokens[begin:end], ANSWER_TOKENS
    else:
        begin = min(PROMPT_TOKENS, len(tokens) // 2)
        reference = tokens[begin : begin + NEW_TOKENS]
        most = len(reference)
    room = most if context is None else min(most, context - begin)
    if room < min(most, LEAST_ROOM):
        return None
    before = tokens[:begin]
    return Prompt(before, written(tokenizer, [], before), written(tokenizer, before, reference), room)


def _learnt_in(row: Mapping[str, Any]) -> np.ndarray:
    """Return which tokens are targets, of shape (length,)."""
    learnt = np.ones(len(row["input_ids"]), bool)
    if row.get("labels") is not None:
        learnt &= np.asarray(row["labels"]) != -100
    else:
        for name in (name for name in MASKS if row.get(name) is not None):
            learnt &= np.asarray(row[name]).astype(bool)
    return learnt


def written(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int]) -> str:
    """Return what tokens say after others, without special ones.

    Alone they may say something else: the first of them may begin with a blank that only shows behind another.
    """
    start, whole, alone = (
        str(tokenizer.decode(list(tokens), skip_special_tokens=True)) if tokens else ""
        for tokens in (before, [*before, *ids], ids)
    )
    return whole[len(start) :] if whole.startswith(start) else alone  # the text before may end within a letter
