"""Predictions and scores from the logits of a classifier."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from ..data.tasks import TASKS, Task


def logits_of(predictions: Any) -> np.ndarray:
    """Return the logits `(rows, labels)` from the output of a model."""
    return np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions, dtype=np.float64)


def predictions_of(logits: np.ndarray, task: Task) -> np.ndarray:
    """Return the predicted label of each row of logits `(rows, labels)`, or the predicted number of a regression."""
    return logits.argmax(axis=-1) if task.labels else logits.reshape(-1)


def judge(task: Task, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the scores of a task. They equal those of the metric `glue` of `evaluate`.

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
        warnings.simplefilter("ignore")  # the correlation with constant numbers is NaN
        return {name: float(known[name](labels, predictions)) for name in task.scores}


def evaluate_judge(name: str | None, task: Task) -> Callable[[Any, Any], dict[str, float]]:
    """Return a function that computes the scores of `judge` with `evaluate`, which fetches its code from the Hub.

    Args:
        name: Name of the task; None for the user's own.

    Raises:
        OSError: The code cannot be fetched.
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
