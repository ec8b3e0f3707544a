"""What watches a run: statistics for the log, the per-batch trace, and the progress bar."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from transformers import ProgressCallback, TrainerCallback, TrainerState
from transformers.utils import logging

from ..data.identity import UNKNOWN
from ..perplexity.windows import perplexity_of
from ..records.files import DROPPED_NAME, ROW_TRACE_NAME, SKIPPED_NAME, TRACE_NAME, cut_lines
from ..schedulers import BatchTimes, Outcome
from .budget import limit_of
from .dropped_rows import DroppedRow
from .dropping import BatchRows
from .ledger import ComputeLedger

logger = logging.get_logger(__name__)


@dataclass
class LogWindow:
    """Counts over the batches since the last log."""

    batches: int = 0
    updates: int = 0
    skipped: int = 0
    non_finite: int = 0
    measured: int = 0
    losses: float = 0.0
    rows: int = 0
    rows_dropped: int = 0
    waiting_seconds: float = 0.0
    generating_seconds: float = 0.0
    generated: int = 0
    divergence: float = 0.0

    def observe(self, outcome: Outcome, times: BatchTimes) -> None:
        loss = outcome.observation.loss
        self.waiting_seconds += times.waiting
        self.generating_seconds += times.generating
        self.batches += 1
        self.updates += outcome.updates
        self.skipped += outcome.skipped
        self.rows += outcome.rows
        self.rows_dropped += outcome.rows_dropped
        if outcome.drifts and math.isfinite(kl := outcome.drifts[-1].kl):
            self.generated += 1
            self.divergence += kl
        if math.isfinite(loss):
            self.measured += 1
            self.losses += loss
        else:
            self.non_finite += 1

    @property
    def mean_loss(self) -> float:
        """The mean loss per target of the batches that have one; Trainer may divide by other labels too."""
        return self.losses / self.measured if self.measured else math.nan

    def finite_mean(self, mean: float) -> float:
        """Turn a mean over all batches, to which non-finite ones gave 0, into one over the finite batches."""
        finite = self.batches - self.non_finite
        return mean * self.batches / finite if finite else math.nan

    def logs(self, ledger: ComputeLedger) -> dict[str, float]:
        """Return what is logged beside the first-pass loss."""
        return {
            "repeats": self.updates / self.batches,
            "skipped": self.skipped / self.batches,
            "passes": float(ledger.passes),
            "updates": ledger.updates,
            "waiting_seconds": self.waiting_seconds,
            **({"generating_seconds": self.generating_seconds} if self.generating_seconds else {}),
            **({"rows_dropped": self.rows_dropped} if self.rows else {}),
            **({"policy_kl": self.divergence / self.generated} if self.generated else {}),
        }

    def state_dict(self) -> dict[str, float]:
        return asdict(self)


class ABRCallback(TrainerCallback):
    """A `TrainerCallback` with one more event. Any callback that has an `on_outcome` method gets it."""

    def on_outcome(
        self,
        args: Any,
        state: Any,
        control: Any,
        outcome: Outcome,
        ledger: ComputeLedger,
        learning_rate: float,
        seconds: float,
        times: BatchTimes,
        memory: int,
        excerpts: list[list[int]],
        rows: BatchRows | None = None,
        dropped_rows: Sequence[DroppedRow] = (),
        **kwargs: Any,
    ) -> None:
        """Event after a batch is finished, before it is logged, evaluated or saved.

        Args:
            outcome: What the scheduler saw, and what was done.
            ledger: What the run has spent, this batch included.
            learning_rate: The rate of the first update on the batch.
            seconds: Wall-clock time of the batch, waiting included.
            times: How long its data took, and a pass.
            memory: Bytes: on a GPU the most that was allocated so far, elsewhere what the process holds.
            excerpts: The first tokens of each row of a skipped batch, of all ranks; nothing for other batches.
            rows: Under a row rule, the rows of the batch, of all ranks.
            dropped_rows: Those among them that were not trained on; on the main process.
        """


class TraceCallback(ABRCallback):
    """Write one JSON line a batch to `abr_trace.jsonl` in the output directory, or in that of a trial.

    Beside it, in the output directory only, from where nothing whose name begins with `_` is pushed: the text of
    skipped batches, the dropped rows, and under a row rule the loss, the targets and the index
    of each row, so that it can be replayed.

    Each line is on disk before the next batch begins. A resumed run keeps the lines up to its checkpoint, so that the
    trace has neither gaps nor doubles. A loss that is not finite is written as null.
    """

    def __init__(self) -> None:
        self.directory: Path | None = None
        self.has_rows = False
        self._files: dict[str, IO[str]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._close()
        directory = self.directory or Path(args.output_dir)
        names = [TRACE_NAME]
        if directory == Path(args.output_dir):
            names += [SKIPPED_NAME, *([DROPPED_NAME, ROW_TRACE_NAME] if self.has_rows else [])]
        kept, *_ = [cut_lines(directory / name, state.global_step) for name in names]
        if kept < state.global_step:
            trace = directory / TRACE_NAME
            logger.warning(f"{trace} holds {kept} of the {state.global_step} batches before this checkpoint.")
        self._files = {name: (directory / name).open("a", encoding="utf-8") for name in names}

    def on_outcome(
        self,
        args: Any,
        state: Any,
        control: Any,
        outcome: Outcome,
        ledger: ComputeLedger,
        learning_rate: float,
        seconds: float,
        times: BatchTimes,
        memory: int,
        excerpts: list[list[int]],
        rows: BatchRows | None = None,
        dropped_rows: Sequence[DroppedRow] = (),
        **kwargs: Any,
    ) -> None:
        if not self._files:
            return
        step = state.global_step
        losses = [_finite(loss) for loss in outcome.losses]
        line = {
            "step": step,
            "epoch": state.epoch,
            "progress": outcome.observation.progress,
            "passes": float(ledger.passes),
            "loss": losses[0],
            "losses": losses,
            "repeats": outcome.repeats,
            "reason": outcome.reason,
            "learning_rate": learning_rate,
            "seconds": seconds,
            "waiting_seconds": times.waiting,
            "memory": memory,
            **_seldom(outcome, times),
        }
        self._append(TRACE_NAME, line)
        if outcome.skipped:
            self._append(SKIPPED_NAME, {"step": step, "input_ids": excerpts})
        for row in dropped_rows:
            self._append(DROPPED_NAME, {"step": step, **row.as_line()})
        if rows is not None:
            columns = zip(rows.losses, rows.targets, rows.indices, rows.micro_batches, strict=True)
            told = [[_finite(loss), n, None if index == UNKNOWN else index, part] for loss, n, index, part in columns]
            self._append(ROW_TRACE_NAME, {"step": step, "rows": told})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._close()

    def _close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}

    def _append(self, name: str, line: dict[str, Any]) -> None:
        """Write a line, if this run has such a file."""
        if name in self._files:
            self._files[name].write(json.dumps(line) + "\n")
            self._files[name].flush()


def _seldom(outcome: Outcome, times: BatchTimes) -> dict[str, Any]:
    """Return what the trace tells of a batch under rules that ask for it, or replay."""
    seen = outcome.observation
    numbers = {"accuracy": seen.accuracy, "grad_norm": seen.grad_norm, "advantage": seen.advantage}
    told: dict[str, Any] = {
        name: value for name, value in numbers.items() if value is not None and math.isfinite(value)
    }
    if seen.times is not None:
        told |= {"working_seconds": seen.times.working, "pass_seconds": seen.times.one_pass}
    if outcome.drifts:
        told["policy"] = [{n: _finite(value) for n, value in asdict(drift).items()} for drift in outcome.drifts]
    if outcome.replayed:
        told["replayed"] = [{"step": batch + 1, "loss": _finite(loss)} for batch, loss in outcome.replayed]
    if times.generating:
        told["generating_seconds"] = times.generating
    if outcome.rows:
        told |= {"rows": outcome.rows, "rows_dropped": outcome.rows_dropped}
    return told


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def is_training_log(logs: Mapping[str, float] | None) -> bool:
    """Tell whether Trainer logs the batches since the last log: not an evaluation, and not the totals of the run."""
    return logs is not None and {"loss", "learning_rate"} <= logs.keys()


class ABRProgressCallback(ProgressCallback):
    """Trainer's progress bar, with updates a batch and perplexity; under a budget it counts passes or seconds."""

    def __init__(self, *args: Any, shows_perplexity: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._shows_perplexity = shows_perplexity

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._limit = limit_of(args)
        if self.training_bar is not None and self._limit is not None:
            self.training_bar.reset(total=self._limit.most)
            self.training_bar.unit = "s" if self._limit.counts_seconds else "pass"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._limit is None:
            super().on_step_end(args, state, control, **kwargs)

    def on_outcome(
        self, args: Any, state: Any, control: Any, outcome: Outcome, ledger: ComputeLedger, **kwargs: Any
    ) -> None:
        if self.training_bar is None:
            return
        loss = outcome.observation.loss
        level = {"perplexity": f"{perplexity_of(loss):.2f}"} if self._shows_perplexity else {"loss": f"{loss:.3f}"}
        counts = {"updates/batch": f"{ledger.repeats:.2f}", "skips": ledger.skips}
        dropped = {"rows_dropped": ledger.rows_dropped} if ledger.rows else {}
        self.training_bar.set_postfix(level | counts | dropped, refresh=False)
        if self._limit is not None:
            self.training_bar.update(round(self._limit.done(ledger), 2) - self.training_bar.n)


def last_evaluation(state: TrainerState) -> dict[str, float] | None:
    """Return the metrics of the last evaluation if nothing was trained since, or None."""
    logs = next((logs for logs in reversed(state.log_history) if "eval_loss" in logs), None)
    if logs is None or logs["step"] != state.global_step:
        return None
    return {name: value for name, value in logs.items() if name != "step"}
