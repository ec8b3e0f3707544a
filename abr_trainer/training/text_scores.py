"""BLEU and ROUGE of what a model writes, against what stands in the data."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.utils import logging

from ..data.prompts import Prompt
from .generation import continue_over_ranks

logger = logging.get_logger(__name__)

PACKAGES = {"bleu": ("sacrebleu", "sacrebleu"), "rouge": ("rouge_score", "rouge-score")}
"""What computes each metric: the module, and its package."""

ROUGE = ("rouge1", "rouge2", "rougeL")

Measure = Callable[[torch.nn.Module], Mapping[str, float]]


def refuse_missing_packages(metrics: Sequence[str]) -> None:
    """Refuse metrics whose package is not installed.

    Raises:
        ValueError: One of them is such.
    """
    for metric in metrics:
        module, package = PACKAGES[metric]
        if importlib.util.find_spec(module) is None:
            raise ValueError(
                f'--generation_metrics {metric} needs {package}: pip install "abr-trainer[metrics]", or pip install '
                f"{package}."
            )


def scores_of(metrics: Sequence[str], texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return metrics of texts, from 0 to 100: `bleu` of the corpus, and the means of `rouge1`, `rouge2`, `rougeL`.

    BLEU is that of sacrebleu with its defaults, ROUGE the F-measure of rouge-score with its defaults (no stemming).
    """
    found: dict[str, float] = {}
    if "bleu" in metrics:
        from sacrebleu.metrics.bleu import BLEU  # here, because it is an extra

        found["bleu"] = float(BLEU().corpus_score(list(texts), [list(references)]).score)
    if "rouge" in metrics:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(list(ROUGE))
        pairs = [scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)]
        found |= {name: 100 * math.fsum(pair[name].fmeasure for pair in pairs) / len(pairs) for name in ROUGE}
    return found


def warn_of_other_letters(references: Sequence[str]) -> None:
    """Warn where ROUGE would see little of a text: it drops all but a to z and digits."""
    letters = sum(letter.isalnum() for text in references for letter in text)
    seen = sum(letter.isascii() and letter.isalnum() for text in references for letter in text)
    if seen < 0.9 * letters:
        logger.warning(
            f"--generation_metrics rouge sees only {seen / letters:.0%} of the letters of the texts: rouge-score "
            "drops all but a to z and digits. Do not rely on it for this language."
        )


@dataclass(frozen=True)
class TextScores:
    """Metrics of what a model writes after prompts, to be measured as often as one likes, on all ranks.

    Called with a model it returns them by name. That is what `ABRTrainer(eval_measurement=...)` takes.

    Attributes:
        batch_size: Prompts at a time, on each rank.
    """

    metrics: Sequence[str]
    prompts: Sequence[Prompt]
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    state: PartialState

    def __call__(self, model: torch.nn.Module) -> dict[str, float]:
        texts = continue_over_ranks(model, self.tokenizer, self.prompts, self.batch_size, self.state)
        return scores_of(self.metrics, texts, [prompt.reference for prompt in self.prompts])


def together(*measures: Measure | None) -> Measure:
    """Return what measures all that these do, as far as they are there."""

    def measure(model: torch.nn.Module) -> dict[str, float]:
        return {name: value for each in measures if each is not None for name, value in each(model).items()}

    return measure


class ScoresBefore(TrainerCallback):
    """Log, as of batch 0, the metrics before training that no evaluation measures then.

    Args:
        measures: By the prefix of their names in the log.
    """

    def __init__(self, trainer: Any, measures: Mapping[str, Measure]) -> None:
        self._trainer, self._measures = trainer, measures

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            return
        for prefix, measure in self._measures.items():
            if prefix != "eval" or not args.eval_on_start:
                self._trainer.log({f"{prefix}_{name}": value for name, value in measure(self._trainer.model).items()})


SHOWN = {"bleu": "BLEU", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}


def text_score_lines(log_history: Sequence[Mapping[str, float]], results: Mapping[str, float]) -> list[str]:
    """Return a line each on the metrics of the evaluation and the test set, before and after training.

    >>> text_score_lines([{"step": 0, "eval_bleu": 1.5}, {"step": 9, "eval_bleu": 3.25}], {"eval_bleu": 3.25})
    ['evaluation  BLEU 1.50 before, 3.25 after']
    """
    lines = []
    at_first = [logs for logs in log_history if logs["step"] == 0 and log_history[-1]["step"]]
    for prefix, name in (("eval", "evaluation"), ("test", "test")):
        parts = []
        for metric, shown in SHOWN.items():
            key = f"{prefix}_{metric}"
            before = next((logs[key] for logs in at_first if key in logs), None)
            if key in results and before is None:
                parts.append(f"{shown} {results[key]:.2f}")
            elif key in results:
                parts.append(f"{shown} {before:.2f} before, {results[key]:.2f} after")
        if parts:
            lines.append(f"{name:<11} {'; '.join(parts)}")
    return lines
