"""The embedded default: a tiny pretrained LLaMA and text that the project generates itself, so that a run needs no
network.
"""

from __future__ import annotations

from pathlib import Path

from .prose import Register, passages

__all__ = ["DEMO_MODEL", "SPLITS", "Register", "demo_texts", "passages"]

DEMO_MODEL = Path(__file__).parent / "model"
"""A `LlamaForCausalLM` of half a million parameters with its tokenizer, made by `scripts/build_demo_model.py` from
tales.
"""

SPLITS = {"train": (1, 1200, 0.015), "validation": (2, 150, 0.0), "test": (3, 150, 0.0)}
"""Seed, number of passages and share of broken passages of each split of the data set `demo`: reports, all
difficulties.
"""


def demo_texts(split: str) -> list[str]:
    """Return the passages of one split. Only the training split has broken ones."""
    seed, count, broken = SPLITS[split]
    return list(passages("report", count, seed=seed, broken=broken))
