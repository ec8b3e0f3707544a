"""The log of a run as aligned lines: which columns there are, and how their numbers are written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from ..report.text import DASH

PLAIN_WIDTH = 100
"""Of what is written into a file."""

TITLES_EVERY = 25
"""Lines after which the titles are written again."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column.

    Attributes:
        short: Its title where there is no room for all titles in full.
        width: Characters of the numbers in it.
        may_go: Whether it can be left out where even short titles do not fit.
    """

    title: str
    short: str
    width: int
    may_go: bool = False


@dataclass(frozen=True, slots=True)
class Score:
    """What evaluations are read by.

    Attributes:
        key: Its name among the metrics.
        title: Of its column.
        more: Other metrics that are written behind it, by what they are called.
    """

    key: str = "eval_perplexity"
    title: str = "perplexity"
    digits: int = 2
    is_perplexity: bool = True
    more: Mapping[str, str] | None = None

    def remark(self, metrics: Mapping[str, float], before: float | None) -> str:
        """Return what stands behind the number of an evaluation.

        Args:
            before: What was measured before the first batch; None where nothing was, or this is it.
        """
        others = ", ".join(f"{name} {metrics[key]:.4f}" for key, name in (self.more or {}).items() if key in metrics)
        if not self.is_perplexity or before is None:
            return others
        return f"{shown_change(metrics[self.key], before)} since before training"


def log_columns(
    score: Score,
    most_steps: int,
    most_spent: float,
    judges_rows: bool,
    unit: str = "passes",
    waits: bool = False,
) -> dict[str, Column]:
    """Return the columns of a run, by name.

    Args:
        score: What evaluations are read by.
        most_steps: The last step that there can be.
        most_spent: The most passes that can be spent, or seconds.
        judges_rows: Whether rows are dropped by a rule.
        unit: "passes" or "seconds": what tells how much is spent.
        waits: Whether the run waits for its data.
    """
    dropped = {"rows_dropped": Column("rows dropped", "dropped", 6)} if judges_rows else {}
    waiting = {"waiting": Column("waiting", "waiting", 5)} if waits else {}
    return {
        "step": Column("step", "step", len(f"{most_steps:,}")),
        "spent": Column(unit, unit, len(shown_passes(most_spent))),
        "loss": Column("loss", "loss", 7),
        "score": Column(score.title, score.title, 9),
        "updates": Column("updates/batch", "upd/batch", 5),
        "skipped": Column("skipped", "skipped", 5),
        **dropped,
        "learning_rate": Column("learning rate", "rate", 8, may_go=True),
        "speed": Column("tokens/s", "tokens/s", 8, may_go=True),
        **waiting,
        "left": Column("time left", "left", 7),
    }


class LogTable:
    """Lines of equal columns, numbers to the right.

    Args:
        columns: By name, from left to right.
        width: Of the screen. Titles are shortened where they do not fit, then columns are left out, from the right.
    """

    def __init__(self, columns: Mapping[str, Column], width: int) -> None:
        kept = dict(columns)
        optional = [name for name, column in columns.items() if column.may_go]
        self._lay_out(kept, "title", gap=2)
        for style, gap in (("short", 2), ("short", 1)):
            if self.width > width:
                self._lay_out(kept, style, gap)
        while self.width > width and optional:
            del kept[optional.pop()]
            self._lay_out(kept, "short", gap=1)
        self._lines = 0

    def _lay_out(self, columns: Mapping[str, Column], style: str, gap: int) -> None:
        self._titles: dict[str, str] = {name: getattr(column, style) for name, column in columns.items()}
        self._widths = {name: max(len(self._titles[name]), column.width) for name, column in columns.items()}
        self._gap = " " * gap
        self.width = sum(self._widths.values()) + gap * (len(columns) - 1)

    def titles(self) -> str | None:
        """Return the line of titles where one is due before the next line, and count that line."""
        self._lines += 1
        return self._row(self._titles) if self._lines % TITLES_EVERY == 1 else None

    def line(self, values: Mapping[str, str]) -> str:
        """Return a line of numbers; nothing stands where there is none."""
        return self._row(values)

    def remark(self, values: Mapping[str, str], text: str) -> str:
        """Return a line of numbers in the first columns, up to the last that has one, and a text behind it."""
        names = list(self._widths)
        last = max((names.index(name) for name in values), default=-1)
        return f"{self._row(values, names[: last + 1])}{self._gap}{text}"

    def _row(self, values: Mapping[str, str], names: Sequence[str] | None = None) -> str:
        shown = list(self._widths) if names is None else names
        return self._gap.join(f"{values.get(name, ''):>{self._widths[name]}}" for name in shown).rstrip()


# ---- How numbers are written ----


def shown_passes(passes: float) -> str:
    """Write passes, of which a skipped batch costs a part.

    >>> shown_passes(1234.0), shown_passes(17.5)
    ('1,234.0', '17.5')
    """
    return f"{passes:,.1f}"


def shown_score(value: float, digits: int = 2) -> str:
    """Write a perplexity or a score so that it fits into a column.

    >>> [shown_score(value) for value in (8.1823, 123456.7, 1.5e9, float("nan"))]
    ['8.18', '123,457', '1.5e+09', 'nan']
    """
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1e7:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:,.{digits}f}"


def shown_change(now: float, before: float) -> str:
    """Write by which share a number has changed.

    >>> shown_change(6.17, 8.18), shown_change(float("inf"), 8.0)
    ('-24.6 %', '—')
    """
    changed = now / before - 1 if before else math.nan
    return f"{100 * changed:+.1f} %" if math.isfinite(changed) else DASH


def shown_share(share: float) -> str:
    """Write a share in whole percent.

    >>> shown_share(0.348)
    '35 %'
    """
    return f"{100 * share:.0f} %"


def shown_duration(seconds: float) -> str:
    """Write a duration as hours, minutes and seconds.

    >>> shown_duration(14.4), shown_duration(3723)
    ('0:14', '1:02:03')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# ---- The table at the end ----


def end_table(console: Console, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, its first column to the left and numbers to the right, with a rule in a terminal."""
    rule, gap = (box.SIMPLE_HEAD, 1) if console.is_terminal else (None, 2)  # a box adds a space
    table = Table(box=rule, show_edge=False, pad_edge=False, padding=(0, gap, 0, 0))
    for title in titles:
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print()
    console.print(table)


def stdout_console(console: Console | None = None) -> Console:
    """Return the console of stdout, as wide as a file is to be where that is none."""
    console = console or Console()
    return console if console.is_terminal else Console(file=console.file, width=PLAIN_WIDTH)
