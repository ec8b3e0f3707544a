"""The figures of a report as pictures for a paper: PNG and SVG, the same bytes each time they are made."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure as Drawing
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ..records.files import write_whole
from .figure import Figure, Number, Report, Series
from .look import Look, counts_on_y, drawable, is_empty, lonely, looks, marked
from .text import number

INK, FAINT = "#23252f", "#8a8f9c"
WIDTH = 7.0  # inches
MAX_LETTERS = 80  # of the font below, in a line of that width
FORMATS: dict[str, dict[str, Any]] = {
    "png": {"dpi": 150, "metadata": {"Software": None}},
    "svg": {"metadata": {"Date": None, "Creator": None}},
}
STYLE: dict[str, Any] = {
    "axes.edgecolor": FAINT,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "font.family": ["DejaVu Sans"],  # comes with matplotlib: the same letters on every machine
    "font.size": 9.5,
    "grid.color": "#e4e6eb",
    "grid.linewidth": 0.7,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.dash_capstyle": "butt",
    "lines.solid_capstyle": "butt",
    "svg.hashsalt": "abr_trainer",  # or the ids in the file would differ each time
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
}


def save_pictures(report: Report, directory: Path) -> list[Path]:
    """Draw every figure of a report into `<name>.png` and `<name>.svg`. What else the directory holds stays."""
    directory.mkdir(parents=True, exist_ok=True)
    look_of = looks(report)
    paths = []
    for figure in report.figures:
        for suffix, content in _render(drawable(figure), look_of).items():
            paths.append(directory / f"{figure.name}.{suffix}")
            write_whole(paths[-1], content)
    return paths


def _render(figure: Figure, look_of: dict[str, Look]) -> dict[str, bytes]:
    contents = {}
    with matplotlib.style.context(["default", STYLE]):
        drawing = _draw(figure, look_of)
        for suffix, options in FORMATS.items():
            buffer = io.BytesIO()
            drawing.savefig(buffer, format=suffix, **options)
            contents[suffix] = buffer.getvalue()
    return contents


def _draw(figure: Figure, look_of: dict[str, Look]) -> Drawing:
    drawing = Drawing(figsize=(WIDTH, _height(figure)), layout="constrained")
    axes = drawing.add_subplot()
    axes.set_xlabel(_broken(figure.x_title, MAX_LETTERS))
    if is_empty(figure):
        axes.set_ylabel(_broken(figure.y_title, 42))
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", va="center", color=FAINT)
        return drawing
    axes.set_xscale("log" if figure.x_log else "linear")
    if figure.kind == "intervals":
        _draw_intervals(axes, figure, look_of)
    else:
        axes.set_yscale("log" if figure.y_log else "linear")
        _draw_points(axes, figure, look_of)
        _scale(axes.yaxis, axes.get_ylim(), figure.y_log, counts_on_y(figure))
    _scale(axes.xaxis, axes.get_xlim(), figure.x_log, figure.whole_x)
    return drawing


def _height(figure: Figure) -> float:
    if is_empty(figure):
        return 2.0
    if figure.kind == "intervals":
        return 1.3 + 0.5 * len(figure.series)
    names = _named(figure)
    return 3.6 + (0.2 * math.ceil(len(names) / _columns(names)) if names else 0)


def _draw_points(axes: Axes, figure: Figure, look_of: dict[str, Look]) -> None:
    axes.set_ylabel(_broken(figure.y_title, 42))
    if figure.reference is not None:
        axes.axhline(figure.reference, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    handles = []
    for series in figure.series:
        look = look_of[series.name]
        y = _holes(series.y)
        if figure.kind == "lines":
            _draw_band(axes, series, look)
            style = _line_style(look)
            axes.plot(series.x, y, **style, markevery=list(marked(series)))
        else:
            # Hollow: what lies below stays visible.
            hollow = {"markerfacecolor": "none", "markeredgecolor": look.light, "markeredgewidth": 1.1}
            style = _symbol(look) | hollow | {"linestyle": "none"}
            axes.plot(series.x, y, **style)
        handles.append(Line2D([], [], **style))
    handles = handles if _has_names(figure) else []
    if _has_band(figure):
        handles.append(Line2D([], [], color=INK, alpha=0.25, linewidth=7))
    _legend(axes, handles, _named(figure))


def _named(figure: Figure) -> list[str]:
    """Return the texts of the legend."""
    names = [series.name for series in figure.series] if _has_names(figure) else []
    return [*names, figure.range_label] if _has_band(figure) else names


def _has_names(figure: Figure) -> bool:
    """Tell whether a legend names the series. One line needs no name: its axis says what it is."""
    return figure.kind == "points" or len(figure.series) > 1


def _has_band(figure: Figure) -> bool:
    return figure.kind == "lines" and any(value is not None for series in figure.series for value in series.low)


def _draw_band(axes: Axes, series: Series, look: Look) -> None:
    if not (series.low and series.high):
        return
    low, high = _holes(series.low), _holes(series.high)
    axes.fill_between(series.x, low, high, color=look.light, alpha=0.13, linewidth=0)
    for index in lonely(series):
        axes.plot([series.x[index]] * 2, (low[index], high[index]), color=look.light, alpha=0.5, linewidth=1.4)


def _draw_intervals(axes: Axes, figure: Figure, look_of: dict[str, Look]) -> None:
    rows = range(len(figure.series))
    if figure.reference is not None:
        axes.axvline(figure.reference, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    for row, series in zip(rows, figure.series, strict=True):
        _draw_row(axes, row, series, look_of[series.name])
    axes.set_yticks(rows, [_broken(series.name, 28) for series in figure.series])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    _legend(axes, *_meanings(figure))


def _draw_row(axes: Axes, row: int, series: Series, look: Look) -> None:
    if series.low and series.high:
        ends = _holes((series.low[0], series.high[0]))
        axes.plot(ends, (row, row), color=look.light, linewidth=1.4, marker="|", markersize=9, markeredgewidth=1.4)
    if series.inner:
        axes.plot(series.inner, (row, row), color=look.light, linewidth=4.5)
    if series.center is not None:
        axes.plot([series.center], [row], **_symbol(look, size=7.5), linestyle="none", zorder=3)
    seeds: dict[str, Any] = dict(
        marker="o", markersize=3.6, markerfacecolor="none", markeredgecolor=look.light, linestyle="none"
    )
    axes.plot(series.x, [row + 0.27] * len(series.x), **seeds)
    if not (series.x or series.low or series.center is not None):
        axes.text(0.5, row, "no data", transform=axes.get_yaxis_transform(), ha="center", va="center", color=FAINT)


def _meanings(figure: Figure) -> tuple[list[Line2D], list[str]]:
    """Say what the marks of an interval mean, as far as the figure has them. The rows bear the names."""
    plain: dict[str, Any] = {"color": INK, "markeredgecolor": INK, "linestyle": "none"}
    marks: dict[str, tuple[bool, dict[str, Any]]] = {
        "mean": (any(series.center is not None for series in figure.series), {"marker": "o", "markersize": 6}),
        figure.inner_label: (any(series.inner for series in figure.series), {"linestyle": "-", "linewidth": 4.5}),
        figure.range_label: (any(series.low for series in figure.series), {"linestyle": "-", "linewidth": 1.4}),
        "single seeds": (
            any(series.x for series in figure.series),
            {"marker": "o", "markersize": 3.6, "markerfacecolor": "none"},
        ),
    }
    shown = {label: style for label, (is_there, style) in marks.items() if is_there}
    return [Line2D([], [], **plain | style) for style in shown.values()], list(shown)


def _legend(axes: Axes, handles: list[Line2D], labels: list[str]) -> None:
    """Put the legend under the axes, in as many columns as its longest label leaves room for."""
    if not labels:
        return
    texts = [_broken(label, MAX_LETTERS) for label in labels]
    figure = axes.get_figure(root=True)
    assert figure is not None
    # A label that begins with an underscore would be left out: the texts are set when the legend stands.
    blanks = ["x"] * len(texts)
    box = figure.legend(handles, blanks, loc="outside lower center", ncols=_columns(labels), handlelength=3.2)
    for text, label in zip(box.get_texts(), texts, strict=True):
        text.set_text(label)


def _columns(labels: list[str]) -> int:
    longest = min(MAX_LETTERS, max(map(len, labels), default=0))
    return max(1, min(len(labels), int(WIDTH * 13 / (longest + 8))))


def _line_style(look: Look) -> dict[str, Any]:
    width = 1.7
    # matplotlib counts dashes in widths of the line; a look counts pixels of a line that is 2 wide.
    dash = (0, tuple(length / 2 for length in look.dash)) if look.dash else "-"
    return {**_symbol(look, size=5), "color": look.light, "linewidth": width, "linestyle": dash}


def _symbol(look: Look, size: float = 6) -> dict[str, Any]:
    return {
        "marker": look.marker,
        "markersize": size,
        "markerfacecolor": look.light,
        "markeredgecolor": "white",
        "markeredgewidth": 0.6,
    }


def _scale(axis: Axis, limits: tuple[float, float], log: bool, whole: bool) -> None:
    """Set ticks at round numbers; on a log axis, where matplotlib has powers of ten, as many as the decades need."""
    low, high = limits
    decades = math.log10(high / low) if log else 0
    if decades > 1:
        axis.set_major_locator(LogLocator(subs=(1.0,) if decades > 3 else (1.0, 2.0, 5.0)))
    else:
        axis.set_major_locator(MaxNLocator("auto", integer=whole, steps=[1, 2, 2.5, 5, 10]))
    if log:
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(_log_tick))
    elif 1000 <= max(abs(low), abs(high)) < 1e7:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _log_tick(value: float, _: int) -> str:
    return number(value) if value < 1e6 else f"{value:.0e}".replace("e+0", "e").replace("e+", "e")


def _holes(values: tuple[Number, ...]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _broken(name: str, width: int) -> str:
    """Break a long name into lines of so many letters, after punctuation if it can be.

    >>> _broken("abr:loss_threshold=2.0,max_repeats=3", 24)
    'abr:loss_threshold=2.0,\\nmax_repeats=3'
    """
    lines = [""]
    for part in re.findall(rf"[^,:/\s]{{1,{width - 1}}}[,:/\s]*|[,:/\s]+", name):
        if lines[-1] and len(lines[-1] + part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)
