"""Trainer's bar and table in a notebook, with what repeats and skips add. Imported only where Trainer uses its own."""

from __future__ import annotations

import re
from typing import Any

from transformers.utils.notebook import NotebookProgressCallback, NotebookTrainingTracker

from ..perplexity.windows import perplexity_of
from ..report.times import SHOWN_WAITING, share_waited
from ..schedulers import BatchTimes, Outcome
from .budget import limit_of
from .callbacks import LogWindow, is_training_log
from .ledger import ComputeLedger
from .log_table import shown_passes, shown_score, shown_share
from .waiting import Waiting


class ABRNotebookProgressCallback(NotebookProgressCallback):
    """A row for each log, and for each evaluation, in the columns of our other logs. Under a budget the bar counts
    passes or seconds.

    Args:
        shows_perplexity: Whether exp of the training loss is a perplexity.
        judges_rows: Whether a rule drops rows.
    """

    def __init__(self, shows_perplexity: bool = True, judges_rows: bool = False) -> None:
        super().__init__()
        self._shows_perplexity, self._judges_rows = shows_perplexity, judges_rows
        self._ledger, self._window, self._waiting = ComputeLedger(), LogWindow(), Waiting()
        self._seconds, self._shows_waiting = 0.0, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._limit = limit_of(args)
        self._unit = "passes" if self._limit is None else self._limit.unit
        self._ledger, self._window, self._waiting = ComputeLedger(), LogWindow(), Waiting()
        self._seconds, self._shows_waiting = 0.0, False
        perplexity = ["Perplexity"] if self._shows_perplexity else []
        dropped = ["Rows dropped"] if self._judges_rows else []
        columns = ["Step", self._unit.capitalize(), "Training loss", *perplexity, "Updates/batch", "Skipped", *dropped]
        self.training_tracker = _Tracker(state.max_steps if self._limit is None else self._limit.most, columns)

    def on_outcome(
        self,
        args: Any,
        state: Any,
        control: Any,
        outcome: Outcome,
        ledger: ComputeLedger,
        seconds: float,
        times: BatchTimes,
        **kwargs: Any,
    ) -> None:
        self._ledger = ledger
        self._window.observe(outcome, times)
        self._waiting.observe(seconds, times.waiting)
        self._seconds += seconds
        self._show(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave it to `on_outcome`, which knows what the batch has cost."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_tracker is None or not is_training_log(logs):
            return
        window, self._window = self._window, LogWindow()
        seconds, self._seconds = self._seconds, 0.0
        values = {"Training loss": f"{logs['loss']:.3f}"}
        if self._shows_perplexity:
            values["Perplexity"] = shown_score(perplexity_of(window.mean_loss))
        values["Updates/batch"] = f"{window.updates / window.batches:.2f}" if window.batches else ""
        values |= {"Skipped": str(window.skipped), "Rows dropped": str(window.rows_dropped)}
        if not self._judges_rows:
            del values["Rows dropped"]
        self._shows_waiting = self._shows_waiting or self._waiting.exceeds(SHOWN_WAITING)
        if self._shows_waiting:
            values["Waiting"] = shown_share(share_waited(window.waiting_seconds, seconds))
        self._write(state, values)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if self.training_tracker is None:
            super().on_evaluate(args, state, control, metrics=metrics, **kwargs)
            return
        prefix = next((key.removesuffix("loss") for key in metrics or {} if key.endswith("_loss")), "eval_")
        hidden = ("runtime", "samples_per_second", "steps_per_second", "preparation_time", "target_tokens")
        values = {
            _title(key, prefix): shown_score(value, digits=4 if value < 10 else 2)
            for key, value in (metrics or {}).items()
            if key.startswith(prefix) and not key.endswith(hidden) and isinstance(value, int | float)
        }
        self._write(state, values)
        self.training_tracker.remove_child()
        self.prediction_bar = None
        self._force_next_update = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._force_next_update = True
        self._show(state)
        self.training_tracker = None

    def _show(self, state: Any) -> None:
        if self.training_tracker is None:
            return
        done = state.global_step if self._limit is None else self._limit.done(self._ledger)
        counts = f"{self._ledger.repeats:.2f} updates/batch, {self._ledger.skips:,} skipped"
        unit = "batches" if self._limit is None else self._limit.unit
        self.training_tracker.update(round(done, 1), comment=f"{unit}, {counts}", force_update=self._force_next_update)
        self._force_next_update = False

    def _write(self, state: Any, values: dict[str, Any]) -> None:
        assert self.training_tracker is not None
        spent = float(getattr(self._ledger, self._unit))
        position = {"Step": state.global_step, self._unit.capitalize(): shown_passes(spent)}
        self.training_tracker.write_line(position | values)


class _Tracker(NotebookTrainingTracker):
    """Trainer's table, with nothing in it where there is nothing."""

    def write_line(self, values: dict[str, Any]) -> None:
        assert self.inner_table is not None
        columns = self.inner_table[0]
        columns += [name for name in values if name not in columns]
        *above, last = self.inner_table
        if above and last[0] == values[columns[0]]:  # the log and the evaluation of a step share a row
            last += [""] * (len(columns) - len(last))
            values = {**dict(zip(columns, last, strict=True)), **values}
            self.inner_table.pop()
        self.inner_table.append([values.get(name, "") for name in columns])
        for row in self.inner_table[1:]:
            row += [""] * (len(columns) - len(row))
        self.display()


def _title(key: str, prefix: str) -> str:
    """Return the column of a metric of an evaluation.

    >>> _title("eval_loss", "eval_"), _title("eval_perplexity", "eval_"), _title("eval_wanda_perplexity", "eval_")
    ('Validation loss', 'Validation perplexity', 'Validation wanda perplexity')
    """
    name = key.removeprefix(prefix).replace("_", " ")
    split = "" if prefix == "eval_" else " (" + re.sub("^eval_|_$", "", prefix) + ")"
    return f"Validation {name}{split}"
