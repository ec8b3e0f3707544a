"""The tasks of GLUE: their columns and labels, what a model is asked, and by which numbers it is judged."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

GLUE = "nyu-mll/glue"
"""Where the tasks lie on the Hub."""


@dataclass(frozen=True)
class Task:
    """What is to be said of one sentence, or of two.

    Attributes:
        columns: Those of the sentences, one or two.
        labels: Names of the labels, in order; none for a number.
        scores: What a model is judged by; the first is what the best checkpoint is chosen by.
        span: Least and greatest label where it is a number.
        validation, test: Splits on the Hub. What comes after the first is evaluated at the end, as `eval_mm_*`.
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
"""A task that is made on the spot and needs no network."""

BY_NAME = {**TASKS, DEMO: Task(("sentence",), ("plain", "involved"), ("accuracy", "f1"))}

PROMPTS = {
    "none": "",
    "perfect": "Does sentence 1 mean the same as sentence 2?",
    "conflicting": "Bob sent a message to Alice, which one is better?",
    "insufficient": "Cut the crap, what's your GPA?",
}
"""What a model is told before the sentences: nothing, what the task is, another task, and what makes no sense."""


def own_task(columns: Sequence[str], labels: Sequence[str]) -> Task:
    """Return a task of one's own: without labels, a number is to be said.

    >>> own_task(["text"], ["a", "b", "c"]).scores
    ('accuracy', 'f1_macro')
    """
    scores = ("pearson", "spearmanr") if not labels else ("accuracy", "f1" if len(labels) == 2 else "f1_macro")
    return Task(tuple(columns), tuple(labels), scores)


def find_prompt(given: str) -> str:
    """Return the text of a prompt by its name; any other text stands for itself.

    Raises:
        ValueError: It is one word, and nearly one of the names.

    >>> find_prompt("perfect"), find_prompt("Same?")
    ('Does sentence 1 mean the same as sentence 2?', 'Same?')
    """
    if given in PROMPTS:
        return PROMPTS[given]
    if given.isalpha() and (close := difflib.get_close_matches(given, PROMPTS, n=1, cutoff=0.7)):
        raise ValueError(f"--prompt {given}: did you mean {close[0]}? To say just that word, end it with a stop.")
    return given.strip()


def ask(prompt: str, sentences: Sequence[str]) -> str:
    """Return what a model reads.

    >>> ask("Same?", ["It rains.", "Rain falls."])
    'Same? Sentence 1: It rains. Sentence 2: Rain falls.'
    >>> ask("", ["It rains."])
    'Sentence: It rains.'
    """
    numbers = [""] if len(sentences) == 1 else [f" {i + 1}" for i in range(len(sentences))]
    parts = [f"Sentence{number}: {text}" for number, text in zip(numbers, sentences, strict=True)]
    return " ".join([prompt, *parts] if prompt else parts)


# ---- Judging ----


def logits_of(predictions: Any) -> np.ndarray:
    """Return the logits `(rows, labels)` among what a model has returned."""
    return np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions, dtype=np.float64)


def predictions_of(logits: np.ndarray, task: Task) -> np.ndarray:
    """Return the label that each row of logits `(rows, labels)` is for, or the number that it says."""
    return logits.argmax(axis=-1) if task.labels else logits.reshape(-1)


def judge(task: Task, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the scores of a task, the same numbers as those of the metric `glue` of `evaluate`.

    >>> judge(TASKS["mrpc"], np.array([1, 1, 0, 1]), np.array([1, 0, 0, 1]))
    {'accuracy': 0.75, 'f1': 0.8}
    """
    from scipy import stats  # here, because they take seconds to import
    from sklearn import metrics

    known = {
        "accuracy": metrics.accuracy_score,
        "f1": metrics.f1_score,
        "f1_macro": lambda right, said: metrics.f1_score(right, said, average="macro", zero_division=0.0),
        "matthews_correlation": metrics.matthews_corrcoef,
        "pearson": lambda right, said: stats.pearsonr(said, right)[0] if len(right) > 1 else math.nan,
        "spearmanr": lambda right, said: stats.spearmanr(said, right)[0] if len(right) > 1 else math.nan,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numbers that are all the same: a correlation with them is not a number
        return {name: float(known[name](labels, predictions)) for name in task.scores}


def evaluate_judge(name: str | None, task: Task) -> Callable[[Any, Any], dict[str, float]]:
    """Return what computes the scores of a task as `judge` does, by `evaluate`, with code that it gets from the Hub.

    Args:
        name: Of the task, None for one of one's own.

    Raises:
        OSError: The code cannot be had.
    """
    import evaluate  # here, because it takes seconds to import

    if name in TASKS:
        whole = evaluate.load("glue", name)

        def by_task(predictions: Any, labels: Any) -> dict[str, float]:
            found = whole.compute(predictions=predictions, references=labels)
            return {score: float(found[score]) for score in task.scores}

        return by_task
    known = {"f1_macro": "f1", "pearson": "pearsonr"}
    metrics = {score: evaluate.load(known.get(score, score)) for score in task.scores}

    def one_by_one(predictions: Any, labels: Any) -> dict[str, float]:
        found = {}
        for score, metric in metrics.items():
            options = {"average": "macro"} if score == "f1_macro" else {}
            answer = metric.compute(predictions=predictions, references=labels, **options)
            found[score] = float(next(iter(answer.values())))
        return found

    return one_by_one
