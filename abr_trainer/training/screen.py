"""What a command shows while it trains: aligned lines, and in a terminal a bar below them."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import has_length

from ..report.times import SHOWN_WAITING, share_waited
from ..schedulers import BatchTimes, Outcome
from .budget import Limit, limit_of
from .callbacks import LogWindow, is_training_log
from .ledger import ComputeLedger
from .log_table import (
    PLAIN_WIDTH,
    LogTable,
    Score,
    log_columns,
    shown_duration,
    shown_passes,
    shown_score,
    shown_share,
)
from .summary import measured_before
from .tracking import name_of
from .waiting import Waiting

MANY_STEPS = 99_999
"""The column of steps is wide enough for so many where nobody knows how many there will be."""

REFRESH = 0.1
"""Seconds between two pictures of the bar. There is no thread that draws it: data loaders fork."""


class RunScreen(TrainerCallback):
    """Show a run: a line of numbers for each log and each evaluation, and in a terminal a bar.

    Args:
        score: What evaluations are read by.
        judges_rows: Whether a rule drops rows.
        shows_bar: Whether there may be a bar.
        console: Where the lines go. Default: stdout.
    """

    def __init__(
        self, score: Score, judges_rows: bool = False, shows_bar: bool = True, console: Console | None = None
    ) -> None:
        self._score = score
        self._judges_rows = judges_rows
        self.console = console or Console()
        bar_console = self.console if self.console.is_terminal else Console(stderr=True)
        self._bar = _Bar(bar_console) if shows_bar and bar_console.is_terminal else None
        self._table: LogTable | None = None
        self._limit: Limit | None = None
        self._ledger, self._window, self._waiting = ComputeLedger(), LogWindow(), Waiting()
        self._logged = (0, 0.0, 0.0)
        self._shows_waiting = False
        self._clock: tuple[float, float] | None = None

    # ---- Events ----

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._limit = limit_of(args)
        self._ledger, self._window, self._waiting = ComputeLedger(), LogWindow(), Waiting()
        self._logged, self._shows_waiting, self._clock = (0, 0.0, 0.0), False, None
        self._table = self._new_table(state)
        self._print("")
        if self._bar is not None:
            self._bar.begin("training", self._end(state), "batches" if self._limit is None else self._limit.unit)

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
        if self._clock is None:  # not earlier: the first batch is slow, and a resumed run has spent something already
            self._clock, self._logged = (time.monotonic(), self._done(state)), self._spent()
        if self._table is not None and self._bar is not None:
            self._bar.move("training", self._done(state), f"{self._time_left(state)} left")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._table is None or not is_training_log(logs):
            return
        window = self._window
        tokens, seconds, waiting = (now - before for now, before in zip(self._spent(), self._logged, strict=True))
        self._window, self._logged = LogWindow(), self._spent()
        if not self._shows_waiting and self._waiting.exceeds(SHOWN_WAITING):
            self._shows_waiting = True  # from here to the end: a column that came and went could not be read
            self._table = self._new_table(state)
        values = {
            **self._position(state),
            "loss": f"{logs['loss']:.3f}",
            "updates": f"{window.updates / window.batches:.2f}" if window.batches else "",
            "skipped": f"{window.skipped:,}",
            "rows_dropped": f"{window.rows_dropped:,}",
            "learning_rate": f"{logs['learning_rate']:.2e}",
            "speed": f"{tokens / seconds:,.0f}" if seconds else "",
            "waiting": shown_share(share_waited(waiting, seconds)),
            "left": self._time_left(state),
        }
        self._print_titles()
        self._print(self._table.line(values))

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self._bar is not None and has_length(eval_dataloader):
            self._bar.begin("evaluating", len(eval_dataloader), "batches")
            self._bar.move("evaluating")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self._end_bar("evaluating")
        value = (metrics or {}).get(self._score.key)
        if self._table is None or value is None:
            return
        before = measured_before(state.log_history, self._score.key) if state.global_step else None
        told = self._score.remark(metrics, before)
        self._print_titles()
        score = {"score": shown_score(value, self._score.digits)}
        name = name_of(state.global_step, state.epoch)
        self._print(
            self._table.remark(self._position(state) | score, f"{name}: {told}" if told else name), style="bold"
        )

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self._end_bar("evaluating")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._table = None  # what is evaluated later stands in the summary
        self._end_bar("training")

    # ---- Numbers ----

    def _position(self, state: Any) -> dict[str, str]:
        spent = float(getattr(self._ledger, self._unit))
        return {"step": f"{state.global_step:,}", "spent": shown_passes(spent)}

    @property
    def _unit(self) -> str:
        """What is shown of the ledger in each line."""
        return "passes" if self._limit is None else self._limit.unit

    def _widest(self, state: Any) -> tuple[int, float]:
        """Return the last step that there can be, and the most that can be spent."""
        if self._limit is None:
            return state.max_steps, 10 * state.max_steps  # a rule may repeat each batch
        return min(state.max_steps, MANY_STEPS) if self._limit.counts_seconds else state.max_steps, self._limit.most

    def _end(self, state: Any) -> float:
        """Return where the run ends, in the units of its budget, or in batches."""
        return state.max_steps if self._limit is None else self._limit.most

    def _spent(self) -> tuple[int, float, float]:
        return self._ledger.tokens, self._ledger.seconds, self._ledger.waiting_seconds

    def _done(self, state: Any) -> float:
        """Return how far the run is, in the same units."""
        return state.global_step if self._limit is None else self._limit.done(self._ledger)

    def _time_left(self, state: Any) -> str:
        """Return how long the rest takes, at the pace since the first batch of this call of `train`, evaluations
        included.
        """
        if self._clock is None:
            return ""
        begun, at = self._clock
        done = self._done(state)
        rest = self._end(state) - done
        return shown_duration((time.monotonic() - begun) * max(rest, 0.0) / (done - at)) if done > at else ""

    # ---- Lines ----

    def _new_table(self, state: Any) -> LogTable:
        columns = log_columns(
            self._score, *self._widest(state), self._judges_rows, self._unit, waits=self._shows_waiting
        )
        return LogTable(columns, self.console.width if self.console.is_terminal else PLAIN_WIDTH)

    def _print_titles(self) -> None:
        if self._table is not None and (titles := self._table.titles()):
            self._print(titles, style="dim")

    def _print(self, line: str, style: str = "") -> None:
        if self.console.is_terminal:
            self.console.print(Text(line, style=style, no_wrap=True, overflow="ellipsis"))
        else:
            print(line, flush=True)

    def _end_bar(self, name: str) -> None:
        if self._bar is not None:
            self._bar.end(name)

    def close(self) -> None:
        """Take the bar away, also where the run has failed."""
        if self._bar is not None:
            self._bar.close()


class _Bar:
    """A line at the bottom of a terminal for what is under way. What is printed meanwhile stands above it.

    A stream that does not go to a terminal is left alone.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._drawn = 0.0
        self._streams: list[tuple[logging.StreamHandler[Any], Any]] = []

    def begin(self, name: str, total: float, unit: str) -> None:
        """Show something that takes so many units, unless it is shown already."""
        if name in self._tasks:
            return
        if self._progress is None:
            self._open()
        assert self._progress is not None
        self._tasks[name] = self._progress.add_task(name, total=total, unit=unit, left="", done="0")
        self._progress.refresh()

    def move(self, name: str, done: float | None = None, left: str = "") -> None:
        """Show how far it is. Default: one unit further."""
        if self._progress is None or name not in self._tasks:
            return
        task = self._tasks[name]
        done = self._progress.tasks[self._progress.task_ids.index(task)].completed + 1 if done is None else done
        self._progress.update(task, completed=done, left=left, done=f"{done:,.1f}".removesuffix(".0"))
        if time.monotonic() - self._drawn > REFRESH:
            self._progress.refresh()
            self._drawn = time.monotonic()

    def end(self, name: str) -> None:
        if self._progress is not None and name in self._tasks:
            self._progress.remove_task(self._tasks.pop(name))
            if not self._tasks:
                self.close()

    def _open(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[done]}/{task.total:,.0f} {task.fields[unit]}  {task.fields[left]}"),
        )
        before = sys.stderr
        self._progress = Progress(
            *columns,
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=_is_terminal(sys.stdout),
            redirect_stderr=_is_terminal(before),
        )
        self._progress.start()
        self._console.show_cursor(True)  # or a run that is killed would leave the terminal without one
        if sys.stderr is before:
            return
        for handler in [*logging.root.handlers, *logging.getLogger("transformers").handlers]:
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                self._streams.append((handler, handler.setStream(sys.stderr)))

    def close(self) -> None:
        if self._progress is None:
            return
        for handler, stream in self._streams:
            handler.setStream(stream)
        self._progress.stop()
        self._progress, self._tasks, self._streams = None, {}, []


def _is_terminal(stream: Any) -> bool:
    """Tell whether a stream goes to a terminal. It may be None, or an object of somebody else."""
    return bool(getattr(stream, "isatty", lambda: False)())


def show_on(trainer: Any, screen: RunScreen) -> None:
    """Let a screen show what a trainer does, instead of the bar and the dictionaries of Trainer, and a summary the
    rest.
    """
    trainer.tells_if_worse = False
    for theirs in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(theirs)
    trainer.add_callback(screen)
