"""Train and evaluate a sentence classifier: flags, trainer, scores and messages."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from peft import TaskType
from rich.console import Console
from torch.nn import functional
from transformers import EvalPrediction, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from ..data.tasks import Task
from ..models.arguments import ModelArguments
from ..models.loading import load_config
from ..models.unwrapping import without_adapter
from ..records.errors import find_named, refuse_below, refuse_missing_directory
from ..schedulers import OUTLIER_RULES
from ..training.config import ABRConfig
from ..training.log_table import Score, end_table, stdout_console
from ..training.summary import worse
from ..training.tracking import name_of
from ..training.trainer import ABRTrainer
from .labels import shown
from .records import classes_in, differ_in_order, remember_model, remember_task
from .scores import evaluate_judge, judge, logits_of, predictions_of
from .sentences import SentenceArguments, Sentences

logger = logging.get_logger(__name__)

DEFAULT_LENGTH = 512

MAIN_SCORE = "main_score"
"""Placeholder for the first score of a task until the task is known."""


@dataclass
class ClassifierArguments(ModelArguments):
    """Which model to fine-tune as a classifier, and how."""

    task: ClassVar[TaskType] = TaskType.SEQ_CLS
    lora_defaults: ClassVar[dict[str, Any]] = {"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.1}
    usual_targets: ClassVar[tuple[str, ...]] = ("q_proj", "v_proj")

    lora_alpha: int | None = field(
        default=None,
        metadata={
            "help": "Scale of the adapter: its output is multiplied by alpha / r. Default: 16, or that of "
            "--adapter_name_or_path."
        },
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Layers to adapt, by the end of their names, or all-linear. Default: those of "
            "--adapter_name_or_path; else q_proj and v_proj of LLaMA-like models, all-linear for others."
        },
    )
    ignore_mismatched_sizes: bool = field(
        default=False,
        metadata={"help": "Train a new head if that of the checkpoint has another number of labels."},
    )


@dataclass
class ClassifierConfig(ABRConfig):
    """`ABRConfig` with defaults for sentence classification."""

    learning_rate: float = field(default=3e-4, metadata={"help": "Highest learning rate, reached after warm-up."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Rows per micro-batch, on each device."})
    num_train_epochs: float = field(default=10, metadata={"help": "Number of epochs over the training rows."})
    warmup_steps: float = field(
        default=0.06, metadata={"help": "Batches of learning rate warm-up; below 1, a share of the run."}
    )
    skip_outliers: str = field(
        default="none",
        metadata={
            "help": "Skip batches with outlying losses: robust, classic, none. The losses of small batches "
            "scatter widely, so good batches are skipped, too: on MRPC one in 70.",
            "choices": [*sorted(OUTLIER_RULES), "none"],
        },
    )
    save_strategy: str = field(
        default="epoch", metadata={"help": "When to save a checkpoint: no, steps, epoch or best."}
    )
    optim: str = field(
        default="adamw_bnb_8bit", metadata={"help": "Optimizer of Trainer: adamw_bnb_8bit, adamw_torch, ..."}
    )

    def __post_init__(self) -> None:
        looks_for_best = self.load_best_model_at_end or self.early_stopping_patience or self.save_strategy == "best"
        if looks_for_best and self.metric_for_best_model is None:
            self.metric_for_best_model = MAIN_SCORE
        super().__post_init__()

    def settle(self, task: Task) -> None:
        """Set the score that selects the best checkpoint, and refuse flags that do not fit the task.

        Raises:
            ValueError: There is such a flag.
        """
        if self.metric_for_best_model == MAIN_SCORE:
            self.metric_for_best_model = task.scores[0]
        elif self.metric_for_best_model is not None:
            known = ("loss", *task.scores)
            find_named(
                "--metric_for_best_model", self.metric_for_best_model.removeprefix("eval_"), dict.fromkeys(known)
            )
        if self.prediction_loss_only:
            raise ValueError("--prediction_loss_only cannot be used: scores need predictions. Leave it out.")
        if self.label_smoothing_factor and not task.labels:
            raise ValueError("--label_smoothing_factor cannot be used for a regression. Leave it out.")


class ClassifierTrainer(ABRTrainer):
    """An `ABRTrainer` whose losses are means over rows, for any accumulation and number of ranks.

    Stock Trainer assumes that a model divides its loss by the number of targets in the full batch. Models for
    classification do not, so loss and gradient would grow with accumulation and ranks. All micro-batches of a batch
    have the same weight, also a shorter last one. The evaluation loss is the mean over all rows, each counted once.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        output = super().evaluation_loop(*args, **kwargs)
        metrics: dict[str, float] = output.metrics or {}
        name = next((name for name in metrics if name.endswith("_loss")), None)
        if name is not None and output.label_ids is not None:
            logits, labels = logits_of(output.predictions), np.asarray(output.label_ids)
            metrics[name] = mean_loss(logits, labels, self.args.label_smoothing_factor)
        return output


@dataclass
class EvaluateArguments:
    """What to evaluate a trained classifier on, and where to write the predictions."""

    split: str = field(
        default="test", metadata={"help": "Rows to evaluate on.", "choices": ["test", "validation", "train"]}
    )
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Rows per batch, on each device."})
    bf16: bool = field(default=False, metadata={"help": "Use bf16 mixed precision."})
    fp16: bool = field(default=False, metadata={"help": "Use fp16 mixed precision."})
    use_cpu: bool = field(default=False, metadata={"help": "Use the CPU even if there is a GPU."})
    output_file: str | None = field(
        default=None, metadata={"help": "Write one line of JSON per row to this file: prediction, label, logits."}
    )

    def __post_init__(self) -> None:
        refuse_below(self, {"per_device_eval_batch_size": 1})
        refuse_missing_directory(self, "output_file")

    def as_training_arguments(self, scratch: str) -> TrainingArguments:
        """Return the arguments for a Trainer that only predicts.

        Args:
            scratch: A directory, which is not used.
        """
        return TrainingArguments(
            output_dir=scratch,
            per_device_eval_batch_size=self.per_device_eval_batch_size,
            bf16=self.bf16,
            fp16=self.fp16,
            use_cpu=self.use_cpu,
            report_to="none",
        )


# ---- Scores ----


def mean_loss(logits: np.ndarray, labels: np.ndarray, label_smoothing: float = 0.0) -> float:
    """Return the mean cross-entropy over rows, or the mean squared error if labels are floats.

    >>> mean_loss(np.array([[0.0, 0.0]]), np.array([1])), mean_loss(np.array([[1.0], [2.0]]), np.array([1.0, 4.0]))
    (0.6931471805599453, 2.0)
    """
    said, right = torch.from_numpy(logits), torch.from_numpy(labels)
    if right.is_floating_point():
        return float(functional.mse_loss(said.reshape(-1), right.to(said.dtype).reshape(-1)))
    return float(functional.cross_entropy(said, right, label_smoothing=label_smoothing))


class Judge:
    """Compute the scores of a task from an evaluation of Trainer.

    If a logit is NaN or infinite, all scores are NaN, and `non_finite_rows` is the number of rows with such logits.

    Args:
        arguments: The task's name and the library for the scores.
    """

    def __init__(self, task: Task, arguments: SentenceArguments) -> None:
        self._task = task
        by_evaluate = arguments.metrics_from == "evaluate"
        self._judge = evaluate_judge(arguments.task_name, task) if by_evaluate else partial(judge, task)

    def __call__(self, evaluated: EvalPrediction) -> dict[str, float]:
        logits = logits_of(evaluated.predictions)
        labels = np.asarray(evaluated.label_ids)
        broken = int((~np.isfinite(logits)).any(axis=-1).sum())
        if broken:
            logger.warning(f"{broken} of {len(logits)} rows have NaN or infinite logits, so all scores are NaN.")
            return {**dict.fromkeys(self._task.scores, math.nan), "non_finite_rows": broken}
        predictions = predictions_of(logits, self._task)
        return self._judge(predictions, labels)


class ClassifierCallback(TrainerCallback):
    """Write the files that a later evaluation needs.

    These are `task.json`, `config.json` and, if the model is quantised, `quant_config.json`.

    Args:
        arguments: The dataclasses of the command line.
    """

    def __init__(self, arguments: Sequence[Any]) -> None:
        self._arguments = arguments

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and not state.is_hyper_param_search:
            remember_task(Path(args.output_dir), self._arguments)
            remember_model(Path(args.output_dir), without_adapter(model))


def labels_in_config(task: Task) -> dict[str, Any]:
    """Return the settings for the labels of a task in a model's configuration."""
    if not task.labels:
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        "id2label": dict(enumerate(task.labels)),
        "label2id": {name: index for index, name in enumerate(task.labels)},
        "problem_type": "single_label_classification",
    }


def check_order(arguments: ClassifierArguments, task: Task, trains: bool) -> None:
    """Check whether a model that is already a classifier has the classes of a task in another order.

    Args:
        trains: Whether its head will be trained for the new order. If so, only warn.

    Raises:
        ValueError: It has, so its predictions would be read as other classes.
    """
    if arguments.adapter_name_or_path is not None:
        return  # an adapter has its own head and records its own classes
    config = load_config(arguments)
    is_classifier = any("ForSequenceClassification" in name for name in config.architectures or [])
    names = classes_in(config.id2label) if is_classifier else []
    if not differ_in_order(names, task.labels):
        return
    what = f"--model_name_or_path {arguments.model_name_or_path} has the classes {shown(names)}, in this order"
    if not trains:
        raise ValueError(f"{what}, but the task has {shown(task.labels)}. Give --classes {' '.join(names)}.")
    logger.warning(f"{what}. Its head is now trained for the order {shown(task.labels)}.")


def describe_rows(sentences: Sentences) -> list[str]:
    """Return lines about the classes, and the accuracy of always predicting the same class."""
    labels = sentences.task.labels
    kind = f"{len(labels)} classes, in this order: {shown(labels)}" if labels else "numbers (regression)"
    lines = [f"labels: {kind}"]
    judged = next((split for split in ("validation", "test") if "label" in _columns(sentences, split)), None)
    if judged is not None and "accuracy" in sentences.task.scores:
        label, count = Counter(sentences.splits[judged]["label"]).most_common(1)[0]
        share = count / len(sentences.splits[judged])
        lines.append(f"to beat: {share:.4f} accuracy, if all {judged} rows were {sentences.task.labels[label]!r}")
    return lines


def _columns(sentences: Sentences, split: str) -> list[str]:
    return sentences.splits[split].column_names if split in sentences.splits else []


def scores_in(metrics: dict[str, float], task: Task, prefix: str = "eval") -> str:
    """Return the scores among the metrics of an evaluation, in words.

    >>> from abr_trainer.data.tasks import own_task
    >>> scores_in({"eval_accuracy": 0.75, "eval_f1": 0.8, "eval_loss": 0.5}, own_task(["text"], ["a", "b"]))
    'accuracy 0.7500, f1 0.8000'
    """
    found = {name: metrics.get(f"{prefix}_{name}") for name in task.scores}
    return ", ".join(f"{name} {value:.4f}" for name, value in found.items() if value is not None)


def evaluations_in(log_history: list[dict[str, float]], task: Task) -> list[dict[str, float]]:
    """Return the logged evaluations of a run, one per step: the first one, before the best model was loaded."""
    by_step: dict[float, dict[str, float]] = {}
    for logs in log_history:
        if f"eval_{task.scores[0]}" in logs:
            by_step.setdefault(logs["step"], logs)
    return list(by_step.values())


def show_scores(state: TrainerState, task: Task, kept: int, console: Console | None = None) -> None:
    """Print the evaluations of a run as a table that marks the best one; nothing if there are fewer than two.

    The best is the checkpoint that Trainer chose, if any, else the first one with the highest score.

    Args:
        kept: The step of the model that the run has kept.
    """
    evaluations = evaluations_in(state.log_history, task)
    if len(evaluations) < 2:
        return
    main = f"eval_{task.scores[0]}"
    finite = [logs for logs in evaluations if math.isfinite(logs[main])]
    best = state.best_global_step or max(finite, key=lambda logs: logs[main], default={"step": math.nan})["step"]
    rows = []
    for logs in evaluations:
        marks = [name for name, step in {"best": best, "kept": kept}.items() if logs["step"] == step]
        numbers = [logs.get(f"eval_{name}", math.nan) for name in (*task.scores, "loss")]
        rows.append(
            [name_of(int(logs["step"]), logs.get("epoch")), *(f"{each:.4f}" for each in numbers), ", ".join(marks)]
        )
    end_table(stdout_console(console), ("", *task.scores, "loss", ""), rows)


def score_lines(log_history: list[dict[str, float]], results: dict[str, float], task: Task) -> Iterator[str]:
    """Yield lines with the scores of a run."""
    main = score_of(task)
    first, *later = evaluations_in(log_history, task) or [{"step": math.nan}]
    before = first if later and first["step"] == 0 else None
    if before:
        yield f"before      {scores_in(before, task)}"
    for what, prefix in {"evaluation": "eval", "mismatched": "eval_mm", "test": "test"}.items():
        if shown := scores_in(results, task, prefix):
            yield f"{what:<11} {shown}"
    if before and (told := worse(main, before[main.key], results.get(main.key), greater_is_better=True)):
        yield told


def score_of(task: Task) -> Score:
    """Return the score that the evaluations of a task are read by."""
    first, *others = task.scores
    more = {f"eval_{name}": name for name in (*others, "loss")}
    return Score(f"eval_{first}", first.replace("_", " "), digits=4, is_perplexity=False, more=more)
