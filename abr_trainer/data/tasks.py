"""Classification tasks, those of GLUE and the user's own: columns, labels, metrics and prompts."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

GLUE = "nyu-mll/glue"
"""The data set on the Hub with these tasks."""


@dataclass(frozen=True)
class Task:
    """A classification or regression task on one sentence or a pair of sentences.

    Attributes:
        columns: Columns with the sentences, one or two.
        labels: Names of the labels, in order; empty for regression.
        scores: Names of the metrics. The first selects the best checkpoint.
        span: Lowest and highest target of a regression.
        validation, test: Splits on the Hub. All but the first are evaluated at the end, as `eval_mm_*`.
    """

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    scores: tuple[str, ...]
    span: tuple[float, float] | None = None
    validation: tuple[str, ...] = ("validation",)
    test: tuple[str, ...] = ("test",)


PAIR = ("sentence1", "sentence2")
ENTAILS = ("entailment", "not_entailment")

TASKS = {
    "cola": Task(("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
    "mnli": Task(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        validation=("validation_matched", "validation_mismatched"),
        test=("test_matched", "test_mismatched"),
    ),
    "mrpc": Task(PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qnli": Task(("question", "sentence"), ENTAILS, ("accuracy",)),
    "qqp": Task(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "rte": Task(PAIR, ENTAILS, ("accuracy",)),
    "sst2": Task(("sentence",), ("negative", "positive"), ("accuracy",)),
    "stsb": Task(PAIR, (), ("pearson", "spearmanr"), span=(0.0, 5.0)),
    "wnli": Task(PAIR, ("not_entailment", "entailment"), ("accuracy",)),
}

DEMO = "demo"
"""A task whose rows are generated, so that it needs no network."""

BY_NAME = {**TASKS, DEMO: Task(("sentence",), ("plain", "involved"), ("accuracy", "f1"))}

PROMPTS = {
    "none": "",
    "perfect": "Does sentence 1 mean the same as sentence 2?",
    "conflicting": "Bob sent a message to Alice, which one is better?",
    "insufficient": "Cut the crap, what's your GPA?",
}
"""Prompts before the sentences: none, the task, another task, and one without meaning."""


def own_task(columns: Sequence[str], labels: Sequence[str]) -> Task:
    """Return a task for the user's own data; without labels it is a regression.

    >>> own_task(["text"], ["a", "b", "c"]).scores
    ('accuracy', 'f1_macro')
    """
    scores = ("pearson", "spearmanr") if not labels else ("accuracy", "f1" if len(labels) == 2 else "f1_macro")
    return Task(tuple(columns), tuple(labels), scores)


def find_prompt(given: str) -> str:
    """Return the prompt with this name, or else the given text itself.

    Raises:
        ValueError: The text is one word that resembles one of the names.

    >>> find_prompt("perfect"), find_prompt("Same?")
    ('Does sentence 1 mean the same as sentence 2?', 'Same?')
    """
    if given in PROMPTS:
        return PROMPTS[given]
    if given.isalpha() and (close := difflib.get_close_matches(given, PROMPTS, n=1, cutoff=0.7)):
        raise ValueError(
            f"--prompt {given}: did you mean {close[0]}? To use {given} itself as the prompt, end it with a full stop."
        )
    return given.strip()


def ask(prompt: str, sentences: Sequence[str]) -> str:
    """Return the input text of a model: the prompt, if any, and the sentences.

    >>> ask("Same?", ["It rains.", "Rain falls."])
    'Same? Sentence 1: It rains. Sentence 2: Rain falls.'
    >>> ask("", ["It rains."])
    'Sentence: It rains.'
    """
    numbers = [""] if len(sentences) == 1 else [f" {i + 1}" for i in range(len(sentences))]
    parts = [f"Sentence{number}: {text}" for number, text in zip(numbers, sentences, strict=True)]
    return " ".join([prompt, *parts] if prompt else parts)
