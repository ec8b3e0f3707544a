"""A classifier of sentences: the flags it takes, how it is judged, and what is said of it."""

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
"""Stands for the first score of a task, as long as that is not known."""


@dataclass
class ClassifierArguments(ModelArguments):
    """Which model to fine-tune as a classifier, and how."""

    task: ClassVar[TaskType] = TaskType.SEQ_CLS
    lora_defaults: ClassVar[dict[str, Any]] = {"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.1}
    usual_targets: ClassVar[tuple[str, ...]] = ("q_proj", "v_proj")

    lora_alpha: int | None = field(
        default=None,
        metadata={
            "help": "Scale of the adapter: its output counts alpha / r times. Default: 16, or that of "
            "--adapter_name_or_path."
        },
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Layers to adapt, by the end of their names, or all-linear. Default: q_proj and v_proj of LLaMA-"
            "like models, all-linear of others, or those of --adapter_name_or_path."
        },
    )
    ignore_mismatched_sizes: bool = field(
        default=False,
        metadata={"help": "Make a new head where that of the checkpoint is for another number of labels."},
    )


@dataclass
class ClassifierConfig(ABRConfig):
    """`ABRConfig` with the defaults below, which suit a classifier of sentences."""

    learning_rate: float = field(default=3e-4, metadata={"help": "Learning rate of the first batch after warm-up."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Rows of a micro-batch, on each device."})
    num_train_epochs: float = field(default=10, metadata={"help": "How often to go over the training rows."})
    warmup_steps: float = field(
        default=0.06, metadata={"help": "Batches until the learning rate is reached; below 1, a share of the run."}
    )
    skip_outliers: str = field(
        default="none",
        metadata={
            "help": "Skip batches with outlying losses: robust, classic, none. The losses of few rows "
            "scatter widely, so that good batches are skipped as well, on MRPC one in 70.",
            "choices": [*sorted(OUTLIER_RULES), "none"],
        },
    )
    save_strategy: str = field(
        default="epoch", metadata={"help": "When to save a checkpoint: no, steps, epoch or best."}
    )
    optim: str = field(
        default="adamw_bnb_8bit", metadata={"help": "The optimizer: adamw_bnb_8bit, adamw_torch, ... as of Trainer."}
    )

    def __post_init__(self) -> None:
        looks_for_best = self.load_best_model_at_end or self.early_stopping_patience or self.save_strategy == "best"
        if looks_for_best and self.metric_for_best_model is None:
            self.metric_for_best_model = MAIN_SCORE
        super().__post_init__()

    def settle(self, task: Task) -> None:
        """Say by which score the best checkpoint is chosen, if one is, and refuse what does not go with the task.

        Raises:
            ValueError: Something does not.
        """
        if self.metric_for_best_model == MAIN_SCORE:
            self.metric_for_best_model = task.scores[0]
        elif self.metric_for_best_model is not None:
            known = ("loss", *task.scores)
            find_named(
                "--metric_for_best_model", self.metric_for_best_model.removeprefix("eval_"), dict.fromkeys(known)
            )
        if self.prediction_loss_only:
            raise ValueError("--prediction_loss_only leaves nothing to judge.")
        if self.label_smoothing_factor and not task.labels:
            raise ValueError("--label_smoothing_factor is for labels; here a number is to be said.")


class ClassifierTrainer(ABRTrainer):
    """An `ABRTrainer` whose losses are means over rows, whatever the accumulation and the number of ranks.

    Stock Trainer takes models for classification for such that divide by the number of targets of the whole batch,
    which they do not: their loss and gradient would grow with both. Of a batch, micro-batches count the same, the
    short last one of an epoch, too. The loss of an evaluation is that of all rows, each once.
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
    """What to evaluate a trained classifier on, and where the predictions go."""

    split: str = field(
        default="test", metadata={"help": "Rows to evaluate on.", "choices": ["test", "validation", "train"]}
    )
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Rows at a time, on each device."})
    bf16: bool = field(default=False, metadata={"help": "Compute in bf16 where the model's layers can."})
    fp16: bool = field(default=False, metadata={"help": "Compute in fp16 where the model's layers can."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU where there is a GPU."})
    output_file: str | None = field(
        default=None, metadata={"help": "Write a line for each row: prediction, label, logits, as JSON."}
    )

    def __post_init__(self) -> None:
        refuse_below(self, {"per_device_eval_batch_size": 1})
        refuse_missing_directory(self, "output_file")

    def as_training_arguments(self, scratch: str) -> TrainingArguments:
        """Return these as the arguments of a Trainer that only predicts.

        Args:
            scratch: A directory, of which it makes no use.
        """
        return TrainingArguments(
            output_dir=scratch,
            per_device_eval_batch_size=self.per_device_eval_batch_size,
            bf16=self.bf16,
            fp16=self.fp16,
            use_cpu=self.use_cpu,
            report_to="none",
        )


# ---- Judging ----


def mean_loss(logits: np.ndarray, labels: np.ndarray, label_smoothing: float = 0.0) -> float:
    """Return the mean over rows of the cross-entropy, or, of labels that are no whole numbers, of the squared error.

    >>> mean_loss(np.array([[0.0, 0.0]]), np.array([1])), mean_loss(np.array([[1.0], [2.0]]), np.array([1.0, 4.0]))
    (0.6931471805599453, 2.0)
    """
    said, right = torch.from_numpy(logits), torch.from_numpy(labels)
    if right.is_floating_point():
        return float(functional.mse_loss(said.reshape(-1), right.to(said.dtype).reshape(-1)))
    return float(functional.cross_entropy(said, right, label_smoothing=label_smoothing))


class Judge:
    """Turn what a Trainer has evaluated into the scores of a task.

    Where the model gives no finite numbers there is nothing to judge: all scores are not a number, and
    `non_finite_rows` says of how many rows.

    Args:
        arguments: Which task it is, and who computes the scores.
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
            logger.warning(f"{broken} of {len(logits)} rows got a logit that is not finite: so no score is a number.")
            return {**dict.fromkeys(self._task.scores, math.nan), "non_finite_rows": broken}
        predictions = predictions_of(logits, self._task)
        return self._judge(predictions, labels)


class ClassifierCallback(TrainerCallback):
    """Keep beside the weights what a classifier needs to be found again: `task.json`, `config.json` and, if it is
    quantised, `quant_config.json`.

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
    """Return what the configuration of a model says of the labels of a task."""
    if not task.labels:
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        "id2label": dict(enumerate(task.labels)),
        "label2id": {name: index for index, name in enumerate(task.labels)},
        "problem_type": "single_label_classification",
    }


def check_order(arguments: ClassifierArguments, task: Task, trains: bool) -> None:
    """Look whether a model that is a classifier already has the classes of a task in another order.

    Args:
        trains: Whether its head will be trained for this order. That is said only.

    Raises:
        ValueError: It has, and its predictions would be taken for those of other classes.
    """
    if arguments.adapter_name_or_path is not None:
        return  # its head comes with its own record of the classes
    config = load_config(arguments)
    is_classifier = any("ForSequenceClassification" in name for name in config.architectures or [])
    names = classes_in(config.id2label) if is_classifier else []
    if not differ_in_order(names, task.labels):
        return
    what = f"--model_name_or_path {arguments.model_name_or_path} has the classes {shown(names)}, in this order"
    if not trains:
        raise ValueError(f"{what}; here they are {shown(task.labels)}. Give --classes {' '.join(names)}.")
    logger.warning(f"{what}: its head is trained anew for the order {shown(task.labels)}.")


def describe_rows(sentences: Sentences) -> list[str]:
    """Return lines on which classes there are, and what one class for all rows would reach."""
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
    """Return the evaluations that a run has logged, one for each step: the first, before a best model was loaded."""
    by_step: dict[float, dict[str, float]] = {}
    for logs in log_history:
        if f"eval_{task.scores[0]}" in logs:
            by_step.setdefault(logs["step"], logs)
    return list(by_step.values())


def show_scores(state: TrainerState, task: Task, kept: int, console: Console | None = None) -> None:
    """Print the evaluations of a run as a table that marks the best; nothing if there were fewer than two.

    The best is the checkpoint that Trainer has chosen, if it did, else the first of the highest score.

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
    """Yield a line each on what a run has reached."""
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
