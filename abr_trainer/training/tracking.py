"""How perplexity moves in the course of a run: a line an evaluation, a file, a table at the end, a word of warning."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from tqdm import tqdm
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState
from transformers.utils import logging

from ..records.files import HISTORY_NAME, TRACE_NAME, read_json, sound_lines, step_of, write_whole
from ..schedulers import Outcome
from .log_table import end_table, stdout_console
from .memory import memory_in_use, memory_peaks

logger = logging.get_logger(__name__)

BEFORE = "Before training"
"""The name of an evaluation before the first batch. Files of earlier versions call it Baseline."""

WORSE = 0.005
"""By how much, as a share, perplexity must have risen to count as a rise."""

MOST_ROWS = 20
"""Evaluations that the table at the end shows, beside the first and the one that was kept."""


class EarlyStopping(EarlyStoppingCallback):
    """That of transformers, for several calls of `train`, and for evaluations by `eval_passes`."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.early_stopping_patience_counter = evaluations_without_gain(state, self)


def evaluations_without_gain(state: TrainerState, callback: EarlyStoppingCallback) -> int:
    """Return how many evaluations in a row were not better when the checkpoint was saved that a run goes on from."""
    states: Any = state.stateful_callbacks
    kept = states.get(type(callback).__name__) if state.global_step else None
    counted = kept["attributes"] if isinstance(kept, dict) else {}
    return int(counted.get("early_stopping_patience_counter", 0))


def doubt_of_the_best(args: Any, state: TrainerState, tells_if_worse: bool = True) -> str | None:
    """Return what is to be said of the best model that a run loads at its end; None if it is the best evaluated.

    Args:
        tells_if_worse: Whether to say so where it was better before training.
    """
    metric = f"eval_{(args.metric_for_best_model or '').removeprefix('eval_')}"
    values = [(logs["step"], logs[metric]) for logs in state.log_history if metric in logs]
    best, saved = state.best_global_step, state.best_model_checkpoint
    loaded = f"the model is that of batch {step_of(Path(saved)) if saved else state.global_step}"
    if not any(step for step, _ in values):
        return f"No best model: nothing was evaluated while training, and {loaded}."
    if best is None:
        return f"No best model: {metric} was at no evaluation a finite number, and {loaded}."
    if saved is None or step_of(Path(saved)) != best or not Path(saved).is_dir():
        return f"No checkpoint of the best evaluation, that of batch {best}, is there any more, and {loaded}."
    sign = 1 if args.greater_is_better else -1
    before = next((value for step, value in values if step == 0), math.nan)
    if tells_if_worse and state.best_metric is not None and sign * before > sign * state.best_metric:
        return (
            f"Training made the model worse: {metric} was {before:.4g} before the first batch and is "
            f"{state.best_metric:.4g} at best after it. Of the checkpoints the best is loaded: {loaded}."
        )
    return None


@dataclass(frozen=True)
class Evaluation:
    """An evaluation in the course of a run.

    Attributes:
        name: `BEFORE`; the epoch that has ended; or the step.
        step: Batches finished.
        perplexity: None where it is not finite.
        loss: Mean first-pass loss of the batches since the evaluation before, in nats; None where there are none, or
            the trainer repeats no batches.
        memory: Bytes of the process and of its GPU: `before` the batches since the evaluation before, `consumed` by
            them, and the `peak` so far.
    """

    name: str
    step: int
    epoch: float
    perplexity: float | None
    loss: float | None
    memory: dict[str, dict[str, int]] = field(default_factory=dict)


class PerplexityCallback(TrainerCallback):
    """Say at each evaluation how perplexity has moved since the first, and keep it in `perplexity_history.json`.

    It reads what an evaluation has measured, and spends nothing itself.
    An evaluation after the end of a run belongs to it unless these weights were evaluated already. A resumed run goes
    on with the history up to its checkpoint. It warns once of overfitting: perplexity rises while the training loss
    falls. It is silent in a hyperparameter search.

    Args:
        metric: Which one to follow, such as `eval_wanda_perplexity` of an `eval_measurement`. Default: the token-exact
            perplexity of a causal language model, of several evaluation sets on the first.
        prints: Whether each evaluation is said in a line; not where something else shows them.
    """

    def __init__(self, metric: str | None = None, prints: bool = True) -> None:
        self.history: list[Evaluation] = []
        self._metric = metric
        self._prints = prints
        self._losses: list[tuple[int, float]] = []
        self._has_ended = False
        self._has_warned = False
        self._before: dict[str, int] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._has_warned = self._has_ended = False
        path = Path(args.output_dir, HISTORY_NAME)
        written = (read_json(path) or {"evaluations": []})["evaluations"] if state.global_step else []
        self.history = [each for each in evaluations_in(written) if each.step <= state.global_step]
        self._losses = batch_losses(Path(args.output_dir), state.global_step) if state.global_step else []
        self._before = memory_in_use()

    def on_outcome(self, args: Any, state: Any, control: Any, outcome: Outcome, **kwargs: Any) -> None:
        loss = outcome.losses[0]
        if not outcome.skipped and math.isfinite(loss):
            self._losses.append((state.global_step, loss))

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        metrics = metrics or {}
        if self._metric is None:
            self._metric = next((name for name in metrics if re.fullmatch(r"eval_(\w+_)?perplexity", name)), None)
        perplexity = metrics.get(self._metric or "")
        if perplexity is None or not (self._before and state.is_world_process_zero) or state.is_hyper_param_search:
            return  # another metric, or a run that only evaluates
        is_of_earlier_weights = self._has_ended and args.load_best_model_at_end
        if is_of_earlier_weights or (self.history and self.history[-1].step == state.global_step):
            return
        since = self.history[-1].step if self.history else 0
        evaluation = Evaluation(
            name_of(state.global_step, state.epoch),
            state.global_step,
            state.epoch or 0.0,
            perplexity if math.isfinite(perplexity) else None,
            mean([loss for batch, loss in self._losses if batch > since]),
            self._memory(),
        )
        self.history.append(evaluation)
        if self._prints:
            tqdm.write(trend(evaluation, self.history[0]))
        data = {
            "metric": self._metric,
            "evaluations": [asdict(each) for each in self.history],
            "summary": summary(self.history, self._losses),
        }
        write_whole(Path(args.output_dir, HISTORY_NAME), json.dumps(data, indent=1) + "\n")
        if not self._has_warned and (warning := overfitting(self.history)):
            logger.warning(warning)
            self._has_warned = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._has_ended = True

    def _memory(self) -> dict[str, dict[str, int]]:
        """Return what memory there was, what has come to it, and the most so far; count from here on."""
        before, self._before = self._before, memory_in_use()
        peaks = memory_peaks()
        return {
            where: {"before": before[where], "consumed": now - before[where], "peak": max(peaks[where], now)}
            for where, now in self._before.items()
        }


# ---- What evaluations say ----


def name_of(step: int, epoch: float | None) -> str:
    """Return how to call an evaluation: by the epoch that it ends, if it does.

    >>> name_of(0, 0), name_of(50, 1.0), name_of(60, 1.2)
    ('Before training', 'Epoch 1', 'Step 60')
    """
    if step == 0:
        return BEFORE
    return f"Epoch {epoch:.0f}" if epoch and float(epoch).is_integer() else f"Step {step}"


def evaluations_in(written: Sequence[Mapping[str, Any]]) -> list[Evaluation]:
    """Return the evaluations that a file of the history holds, also one of an earlier version."""
    return [Evaluation(**{**entry, "name": entry["name"] if entry["step"] else BEFORE}) for entry in written]


def change(now: float | None, before: float | None) -> float | None:
    """Return by which share a perplexity has changed; None where one of them is not finite."""
    return None if now is None or before is None else now / before - 1


def trend(evaluation: Evaluation, first: Evaluation) -> str:
    """Return a line on an evaluation, beside the first one.

    >>> first, later = Evaluation(BEFORE, 0, 0.0, 27.45, None), Evaluation("Epoch 1", 50, 1.0, 25.82, 3.1)
    >>> trend(first, first), trend(later, first)
    ('Before training: 27.45', 'Epoch 1: 25.82 (-5.9 %)')
    """
    if evaluation.perplexity is None:
        return f"{evaluation.name}: not finite"
    changed = None if evaluation is first else change(evaluation.perplexity, first.perplexity)
    beside = "" if changed is None else f" ({100 * changed:+.1f} %)"
    return f"{evaluation.name}: {evaluation.perplexity:.2f}{beside}"


def overfitting(history: Sequence[Evaluation]) -> str | None:
    """Return a warning if perplexity has risen since it was best, while the training loss has gone on falling."""
    finite = [each for each in history if each.perplexity is not None]
    if len(history) < 3 or not finite or finite[-1] is not history[-1]:
        return None
    best, last = min(finite, key=lambda each: each.perplexity or math.inf), history[-1]
    loss = history[1].loss if best is history[0] else best.loss
    risen = change(last.perplexity, best.perplexity)
    if risen is None or risen < WORSE or last.loss is None or loss is None or last.loss >= loss:
        return None
    when = BEFORE.lower() if best.name == BEFORE else best.name
    return (
        f"Overfitting: since {when} perplexity has risen from {best.perplexity:.2f} to {last.perplexity:.2f}, "
        f"while the training loss fell from {loss:.3f} to {last.loss:.3f}. --early_stopping_patience stops such a "
        "run, and keeps the best checkpoint."
    )


def batch_losses(directory: Path, last: int) -> list[tuple[int, float]]:
    """Return step and first-pass loss of the batches up to the `last` that a run was trained on, by its trace."""
    path = directory / TRACE_NAME
    lines = sound_lines(path) if path.exists() else iter(())
    losses = ((line["step"], line["loss"]) for line in lines if line["repeats"])
    return [(step, loss) for step, loss in losses if loss is not None and step <= last]


def mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def summary(history: Sequence[Evaluation], losses: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """Return where a run came from, how far it got, where it was best, and on how many batches of which mean loss."""
    finite = [each for each in history if each.perplexity is not None]
    best = min(finite, key=lambda each: each.perplexity or math.inf, default=None)
    return {
        "baseline": history[0].perplexity,
        "final": history[-1].perplexity,
        "best": best and best.perplexity,
        "best_at": best and best.name,
        "improvement": change(history[-1].perplexity, history[0].perplexity),
        "batches": history[-1].step,
        "mean_loss": mean([loss for _, loss in losses]),
    }


def show_history(directory: Path, kept: int | None = None, console: Console | None = None) -> None:
    """Print the evaluations of a run as a table; nothing if there were fewer than two.

    Args:
        kept: The step of the model that the run has kept.
    """
    found = read_json(directory / HISTORY_NAME)
    if found is None or len(found["evaluations"]) < 2:
        return
    console = stdout_console(console)
    history = evaluations_in(found["evaluations"])
    shown = [each for i, each in enumerate(history) if i == 0 or i >= len(history) - MOST_ROWS or each.step == kept]
    rows = []
    for each in shown:
        where = "gpu" if "gpu" in each.memory else "process"
        held, peak = (each.memory[where][name] for name in ("before", "peak"))
        held += each.memory[where]["consumed"]
        changed = None if each is history[0] else change(each.perplexity, history[0].perplexity)
        rows.append(
            [
                each.name,
                "not finite" if each.perplexity is None else f"{each.perplexity:,.2f}",
                "" if changed is None else f"{100 * changed:+.1f} %",
                "" if each.loss is None else f"{each.loss:.3f}",
                f"{held / 1e6:,.0f}",
                f"{peak / 1e6:,.0f}",
                "(kept)" if each.step == kept else "",
            ]
        )
    end_table(console, ("", "perplexity", "change", "train loss", "memory, MB", "peak, MB", ""), rows)
    if len(shown) < len(history):
        more = f"{len(history) - len(shown)} more in {directory / HISTORY_NAME}"
        console.print(more, highlight=False, markup=False, soft_wrap=True)  # a path may have brackets
