"""What a report shows, apart from how it is drawn: the pictures and the page are both made from these."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Literal

Kind = Literal["good", "bad", "neutral", "warning"]

Number = float | None
"""A value that may be missing: None is left out of a picture and shown as a dash in a table."""


@dataclass(frozen=True)
class Series:
    """What goes by one name in a figure.

    Attributes:
        name: Shown in the legend. The same name has the same colour in all figures of a report.
        x: For "lines" and "points", where along the abscissa. For "intervals", the values of the single seeds.
        y: As many, for "lines" and "points". None interrupts a line.
        low, high: For "lines", the band around `y`, as many. For "intervals", one number each: the ends.
        inner: For "intervals", a second interval, drawn within the first.
        center: For "intervals", the mean.
        labels: For "points", what to say of each.
    """

    name: str
    x: tuple[float, ...] = ()
    y: tuple[Number, ...] = ()
    low: tuple[Number, ...] = ()
    high: tuple[Number, ...] = ()
    inner: tuple[float, float] | None = None
    center: Number = None
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Figure:
    """One diagram.

    Attributes:
        name: File name without suffix, and anchor in the page.
        title: What is plotted, in a few words.
        description: What a reader sees in it, in a sentence or two; stands in for the picture where it cannot be seen.
        kind: "lines" over an abscissa, with bands; "points"; or "intervals", one row a series, along the abscissa.
        reference: A value to draw a line at: across "intervals", along "lines".
        whole_x: The abscissa counts something: no ticks between whole numbers.
        range_label, inner_label: What `low` to `high` is, and `inner`.
    """

    name: str
    title: str
    description: str
    kind: Literal["lines", "points", "intervals"]
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    x_log: bool = False
    y_log: bool = False
    whole_x: bool = False
    reference: float | None = None
    range_label: str = "band"
    inner_label: str = "inner interval"

    @property
    def x_title(self) -> str:
        """What stands at the abscissa: the label, and whether the scale is logarithmic."""
        return f"{self.x_label} (log scale)" if self.x_log else self.x_label

    @property
    def y_title(self) -> str:
        """The same, of the ordinate."""
        return f"{self.y_label} (log scale)" if self.y_log else self.y_label


@dataclass(frozen=True)
class Table:
    """Rows of text under columns. The first column names its row.

    Attributes:
        caption: What the rows are.
        notes: Below the table, a paragraph each.
        emphasised: Indices of rows that stand out.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    emphasised: tuple[int, ...] = ()


@dataclass(frozen=True)
class Excerpts:
    """Texts from data, each under what is to be said of it.

    Attributes:
        items: `(what is said, text)`; the text may be empty.
        open: How many are shown at once; the others are folded.
    """

    items: tuple[tuple[str, str], ...]
    open: int = 10


@dataclass(frozen=True)
class Commands:
    """Commands to paste, one a line, or other text where line breaks and blanks count."""

    caption: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Notice:
    """A sentence that must not be overlooked.

    Attributes:
        kind: "good", "bad", "neutral", or "warning". Never told by colour alone: the text says it too.
        badge: The verdict in a word or two, shown before the sentence.
        detail: The numbers behind the sentence, shown below it.
    """

    kind: Kind
    text: str
    badge: str = ""
    detail: str = ""

    def plain(self, width: int) -> list[str]:
        """Return it as lines of a terminal, the numbers on lines of their own."""
        said = f"{self.badge}: {self.text}" if self.badge else self.text
        return [
            *textwrap.wrap(said, width),
            *textwrap.wrap(self.detail, width, initial_indent="    ", subsequent_indent="    "),
        ]


@dataclass(frozen=True)
class Facts:
    """The few numbers to know first: `(what, value)`."""

    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Fold:
    """Blocks that are shown on demand.

    Attributes:
        summary: What they are, in a few words.
    """

    summary: str
    blocks: tuple[str | Table | Commands, ...]


Block = str | Figure | Table | Excerpts | Commands | Notice | Facts | Fold


@dataclass(frozen=True)
class Section:
    """A part of a report under a heading."""

    heading: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Report:
    """A report, start to end.

    Attributes:
        lead: What to know if nothing else is read.
        names: The names that keep one colour throughout, in the order of the palette.
    """

    title: str
    lead: tuple[str | Notice | Facts, ...]
    sections: tuple[Section, ...]
    names: tuple[str, ...] = ()

    @property
    def figures(self) -> tuple[Figure, ...]:
        return tuple(block for section in self.sections for block in section.blocks if isinstance(block, Figure))
