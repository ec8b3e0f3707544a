"""The built-in demo: a tiny pretrained LLaMA and generated text, so that a run needs no network."""

from __future__ import annotations

import functools
import random
from pathlib import Path

from .prose import Register, passages

__all__ = ["DEMO_MODEL", "SPLITS", "Register", "demo_chats", "demo_rows", "demo_texts", "passages"]

DEMO_MODEL = Path(__file__).parent / "model"
"""A `LlamaForCausalLM` of half a million parameters with its tokenizer. `benchmarks/build_demo_model.py` trained it on
tales.
"""

SPLITS = {"train": (1, 1200, 0.015), "validation": (2, 150, 0.0), "test": (3, 150, 0.0)}
"""Seed, number of passages and share of broken passages of each split of the data set `demo`. The passages are reports
of all difficulties.
"""


def is_demo_elsewhere(name: str) -> bool:
    """Tell whether a name is the path of the demo model in another installation, or in an earlier version."""
    path = Path(name)
    return path.parts[-2:] == ("demo", "model") and "abr_trainer" in path.parts and not path.exists()


def demo_texts(split: str) -> list[str]:
    """Return the passages of one split. Only the training split has broken ones."""
    return list(_texts(split))


@functools.cache  # making them takes as long as a short training
def _texts(split: str) -> tuple[str, ...]:
    seed, count, broken = SPLITS[split]
    return tuple(passages("report", count, seed=seed, broken=broken))


def demo_chats(split: str) -> list[dict[str, list[dict[str, str]]]]:
    """Return the passages of one split as chats: the user begins a report, the assistant continues it."""
    chats = []
    for text in demo_texts(split):
        first, mark, rest = text.partition(". ")
        if not rest:  # a broken passage has no sentences
            first, mark, rest = text[: len(text) // 2], "", text[len(text) // 2 :]
        turns = {"user": first + mark.strip(), "assistant": rest}
        chats.append({"messages": [{"role": role, "content": text} for role, text in turns.items()]})
    return chats


ROWS = {"train": (1, 640), "validation": (2, 160), "test": (3, 160)}
"""Seed and number of rows of each split of the task `demo`."""


def demo_rows(split: str) -> list[dict[str, str | int]]:
    """Return the rows of one split of the task `demo`: a report, and whether it is plain (0) or involved (1).

    The label is 1 if the difficulty of the passage is above 0.5. Passages near 0.5 cannot be told apart.
    """
    return [{"sentence": text, "label": label} for text, label in _labelled(split)]


@functools.cache
def _labelled(split: str) -> tuple[tuple[str, int], ...]:
    seed, count = ROWS[split]
    rng = random.Random(seed)
    levels = [rng.random() for _ in range(count)]
    texts = (next(passages("report", 1, seed=1000 * seed + i, difficulty=level)) for i, level in enumerate(levels))
    return tuple((text, int(level > 0.5)) for text, level in zip(texts, levels, strict=True))
