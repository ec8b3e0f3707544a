"""How a name looks, and what of a figure can be drawn: the same in the pictures and on the page."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .figure import Figure, Number, Report, Series

MARKS_PER_LINE = 9


@dataclass(frozen=True, slots=True)
class Look:
    """What tells a name from the others: not colour alone, but a symbol and a dash as well.

    Attributes:
        light, dark: Colour on a light and on a dark ground.
        symbol: As d3 calls it.
        marker: The same, as matplotlib calls it.
        dash: Lengths of strokes and gaps, in pixels of a line 2 pixels wide. Empty: a solid line.
    """

    light: str
    dark: str
    symbol: str
    marker: str
    dash: tuple[float, ...]


# Each at least 3:1 against its ground, and apart from the others with protan, deutan and tritan vision simulated.
COLOURS = (
    *(("#00559e", "#4a9bea"), ("#d1570a", "#f08a45"), ("#1a9e7c", "#66e2b8")),
    *(("#23252f", "#f4f5f8"), ("#c76bb3", "#efa0d8"), ("#7d3c0a", "#b98a5e")),
)
# Of lengths without a common divisor with that of the colours: what shares a colour still differs.
SYMBOLS = (("circle", "o"), ("square", "s"), ("triangle", "^"), ("diamond2", "D"), ("cross", "P"))
DASHES: tuple[tuple[float, ...], ...] = ((), (8, 3), (2, 3), (9, 3, 2, 3), (16, 4), (5, 2, 2, 2, 2, 2), (4, 6))


def looks(report: Report) -> dict[str, Look]:
    """Give every name of a report its look: those in `report.names` first, then the others as they come.

    What is always drawn alone needs no look of its own.
    """
    together = (series.name for figure in report.figures if len(figure.series) > 1 for series in figure.series)
    look_of = {name: _look(index) for index, name in enumerate(dict.fromkeys((*report.names, *together)))}
    alone = (series.name for figure in report.figures for series in figure.series)
    return look_of | {name: _look(0) for name in alone if name not in look_of}


def _look(index: int) -> Look:
    light, dark = COLOURS[index % len(COLOURS)]
    symbol, marker = SYMBOLS[index % len(SYMBOLS)]
    return Look(light, dark, symbol, marker, DASHES[index % len(DASHES)])


def drawable(figure: Figure) -> Figure:
    """Return the figure without what its axes cannot show: infinite values, and on a log axis those not positive.

    Points whose x cannot be shown are left out; every other value that cannot becomes None.
    """
    clean = _drawable_intervals if figure.kind == "intervals" else _drawable_points
    reference = _shown(figure.reference, figure.x_log if figure.kind == "intervals" else figure.y_log)
    return replace(figure, series=tuple(clean(figure, series) for series in figure.series), reference=reference)


def is_empty(figure: Figure) -> bool:
    """Tell whether a drawable figure has nothing to draw."""
    if figure.kind != "intervals":
        return not any(value is not None for series in figure.series for value in series.y)
    return not any(series.x or series.low or series.center is not None for series in figure.series)


def counts_on_y(figure: Figure) -> bool:
    """Tell whether the points of a figure count something: no ticks between whole numbers then."""
    values = [value for series in figure.series for value in series.y if value is not None]
    return figure.kind == "points" and all(value == int(value) for value in values)


def marked(series: Series) -> tuple[int, ...]:
    """Pick the points of a line that get a symbol: some all along it, and those that no line reaches.

    >>> marked(Series("a", x=(0, 1, 2, 3), y=(5.0, None, 4.0, 3.0)))
    (0, 2, 3)
    """
    shown = [index for index, value in enumerate(series.y) if value is not None]
    steps = min(len(shown), MARKS_PER_LINE) - 1
    spread = [shown[round(step * (len(shown) - 1) / steps)] for step in range(steps + 1)] if steps > 0 else shown
    return tuple(sorted({*spread, *lonely(series)}))


def lonely(series: Series) -> tuple[int, ...]:
    """Pick the points without a neighbour: no line reaches them and no band shows at them.

    >>> lonely(Series("a", x=(0, 1, 2, 3), y=(5.0, None, 4.0, 3.0)))
    (0,)
    """
    around = (None, *series.y, None)
    return tuple(
        index
        for index, (before, value, after) in enumerate(zip(around, around[1:], around[2:], strict=False))
        if value is not None and before is None and after is None
    )


def _shown(value: Number, log: bool) -> Number:
    return value if value is not None and math.isfinite(value) and (value > 0 or not log) else None


def _drawable_intervals(figure: Figure, series: Series) -> Series:
    def shown(values: tuple[Number, ...]) -> tuple[float, ...]:
        return tuple(kept for kept in (_shown(value, figure.x_log) for value in values) if kept is not None)

    low, high, inner = shown(series.low), shown(series.high), shown(series.inner or ())
    return replace(
        series,
        x=shown(series.x),
        y=(),
        low=low if high else (),
        high=high if low else (),
        inner=(inner[0], inner[1]) if len(inner) == 2 else None,
        center=_shown(series.center, figure.x_log),
    )


def _drawable_points(figure: Figure, series: Series) -> Series:
    kept = [index for index, value in enumerate(series.x) if _shown(value, figure.x_log) is not None]

    def shown(values: tuple[Number, ...]) -> tuple[Number, ...]:
        return tuple(_shown(values[index], figure.y_log) for index in kept) if values else ()

    labels = tuple(series.labels[index] for index in kept) if series.labels else ()
    x = tuple(series.x[index] for index in kept)
    return replace(series, x=x, y=shown(series.y), low=shown(series.low), high=shown(series.high), labels=labels)
