"""Sentence classification: rows and labels, GLUE tasks, flags, trainer, scores."""

from __future__ import annotations

from ..records.lazy import on_first_use

_HOMES = {
    "ClassifierConfig": "trainer",
    "ClassifierTrainer": "trainer",
    "SentenceArguments": "sentences",
    "judge": "scores",
    "load_sentences": "sentences",
}

__all__ = sorted(_HOMES)
__getattr__, __dir__ = on_first_use(__name__, _HOMES)
