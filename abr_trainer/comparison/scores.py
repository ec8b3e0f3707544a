"""Scores to compare runs by: name, whether lower is better, and how to report differences."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

SPLITS = {"eval": "validation", "test": "test"}
"""Prefix of a metric's name, and the name of the split for readers."""


@dataclass(frozen=True)
class Score:
    """A score of a run.

    Attributes:
        name: Name in the results of a run, after the split: `eval_f1` is `f1` on the validation split.
        words: Name for use in a sentence.
        lower_is_better: Whether lower values are better.
        in_logs: Whether ratios matter. If so, differences are also given in percent, and the logarithm is interpolated
            between two evaluations.
    """

    name: str
    words: str
    lower_is_better: bool = False
    in_logs: bool = False

    @property
    def worst(self) -> float:
        return math.inf if self.lower_is_better else -math.inf

    @property
    def direction(self) -> str:
        return "lower" if self.lower_is_better else "higher"


PERPLEXITY = Score("perplexity", "perplexity", lower_is_better=True, in_logs=True)

OF_CLASSIFIERS = (
    Score("accuracy", "accuracy"),
    Score("matthews_correlation", "Matthews correlation"),
    Score("pearson", "Pearson correlation"),
    Score("f1", "F1"),
    Score("f1_macro", "macro F1"),
    Score("spearmanr", "Spearman correlation"),
)

SCORES = {"scheduler": (PERPLEXITY,), "prompt": OF_CLASSIFIERS}
"""Scores by what is varied, in order of precedence: runs are compared by the first that they have."""

BY_NAME = {score.name: score for scores in SCORES.values() for score in scores}


def score_of(metric: str) -> Score:
    """Return the score of a metric, without the split.

    >>> score_of("test_f1").words
    'F1'
    """
    return BY_NAME[metric.partition("_")[2]]


def words_for(metric: str) -> str:
    """Return the name of a metric for readers.

    >>> words_for("eval_matthews_correlation")
    'validation Matthews correlation'
    """
    return f"{SPLITS[metric.partition('_')[0]]} {score_of(metric).words}"


def metrics_in(names: Iterable[str], varied: str) -> list[str]:
    """Return the metrics to report among these names, by precedence of the score, the validation split first.

    >>> metrics_in(["test_f1", "eval_f1", "eval_accuracy", "eval_loss"], "prompt")
    ['eval_accuracy', 'eval_f1', 'test_f1']
    """
    known = set(names)
    wanted = (f"{split}_{score.name}" for score in SCORES[varied] for split in SPLITS)
    return [metric for metric in wanted if metric in known]


def main_metric(names: Iterable[str], varied: str) -> str:
    """Return the metric to compare runs by: their first score, on the test split if there is one, else on validation.

    >>> main_metric(["eval_f1", "eval_accuracy", "test_accuracy"], "prompt"), main_metric([], "scheduler")
    ('test_accuracy', 'eval_perplexity')
    """
    metrics = metrics_in(names, varied) or [f"eval_{SCORES[varied][0].name}"]
    return [metric for metric in metrics if score_of(metric) == score_of(metrics[0])][-1]


def sentence_case(text: str) -> str:
    """Return a text with its first letter in upper case. Unlike `str.capitalize`, keep the other letters.

    >>> sentence_case("validation F1")
    'Validation F1'
    """
    return text[:1].upper() + text[1:]
