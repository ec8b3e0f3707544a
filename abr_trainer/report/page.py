"""A report as one HTML file: everything in it, nothing fetched, readable without JavaScript too."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import asdict
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from .figure import Commands, Excerpts, Facts, Figure, Fold, Notice, Report, Series, Table
from .look import Look, counts_on_y, drawable, is_empty, lonely, looks, marked
from .text import number, numeric_columns, spans

MAX_ROWS = 200
"""Rows of one series in the table below a figure; longer ones are thinned."""

LONG_WORD = 24
"""Letters from which on a word may break."""

BREAKABLE = re.compile(r"(?<=[,:/])(?=[^\W\d_])|(?<==)(?=\w)")
"""Where a name of a scheduler may break: these are long and have no blanks. Numbers stay whole."""

PERCENT = re.compile(r"(?<=\d) (?=%)")
"""The blank before a percent sign, where no line ends."""

SIGNS = {
    "good": "M4 10.5l4 4 8-9",
    "bad": "M5 5l10 10M15 5l-10 10",
    "neutral": "M4 7.5h12M4 12.5h12",
    "warning": "M10 2.5l8 14.5h-16zM10 8v4.2M10 14.2v.6",
}
"""Paths drawn before a notice, on a square of 20."""

SCRIPTS = ("d3.min.js", "plot.umd.min.js", "page.js")


def render_page(report: Report) -> str:
    """Render a report as a page that runs no script but ours, whatever the names in it are."""
    look_of = looks(report)
    scripts = [_asset(name) for name in SCRIPTS]
    return _template().render(
        report=report,
        figures=report.figures,
        charts=[_chart(figure, look_of) for figure in report.figures],
        hashes=" ".join(_hash(script) for script in scripts),
        scripts=[Markup(script) for script in scripts],
        style=Markup(_asset("page.css")),
        light=_palette([look.light for look in look_of.values()]),
        dark=_palette([look.dark for look in look_of.values()]),
    )


def numbers(figure: Figure) -> Table:
    """Tabulate what a figure shows, one row for each point, or for each interval."""
    if figure.kind == "intervals":
        rows = map(_interval, figure.series)
        columns: tuple[str, ...] = ("name", "mean", figure.range_label, figure.inner_label, "single seeds")
        return Table(figure.title, columns, tuple(rows))
    extra = figure.range_label if figure.kind == "lines" else "what"
    with_extra = any(series.low or series.labels for series in figure.series)
    columns = ("name", figure.x_label, figure.y_label, *([extra] if with_extra else []))
    points: list[tuple[str, ...]] = []
    notes = []
    for series in figure.series:
        kept = _thinned(len(series.x))
        points += [_point(series, index)[: len(columns)] for index in kept]
        if len(kept) < len(series.x):
            notes.append(f"Of {series.name}, {len(kept)} of {len(series.x):,} rows are shown, evenly spaced.")
    return Table(figure.title, columns, tuple(points), tuple(notes))


def _point(series: Series, index: int) -> tuple[str, ...]:
    if series.labels:
        extra = series.labels[index]
    else:
        extra = _range(series.low[index], series.high[index]) if series.low and series.high else ""
    return series.name, number(series.x[index]), number(series.y[index]), extra


def _interval(series: Series) -> tuple[str, ...]:
    outer = _range(series.low[0], series.high[0]) if series.low and series.high else ""
    inner = _range(*series.inner) if series.inner else ""
    return series.name, number(series.center), outer, inner, "; ".join(map(number, series.x))


def _range(low: float | None, high: float | None) -> str:
    return number(None) if low is None or high is None else f"{number(low)} to {number(high)}"


def _thinned(length: int) -> list[int]:
    """Pick at most `MAX_ROWS` indices, evenly spaced, the first and the last among them."""
    if length <= MAX_ROWS:
        return list(range(length))
    return [round(row * (length - 1) / (MAX_ROWS - 1)) for row in range(MAX_ROWS)]


def _chart(figure: Figure, look_of: dict[str, Look]) -> dict[str, Any]:
    """Return what page.js draws: the figure, with a look for each series, named by its place in the palette."""
    shown = drawable(figure)
    chart = asdict(shown) | {"empty": is_empty(shown), "whole_y": counts_on_y(shown)}
    chart |= {"x_title": shown.x_title, "y_title": shown.y_title}
    places = {name: place for place, name in enumerate(look_of)}
    for series, drawn in zip(chart["series"], shown.series, strict=True):
        look = look_of[drawn.name]
        series["look"] = {"colour": f"var(--name-{places[drawn.name]})", "symbol": look.symbol, "dash": look.dash}
        if figure.kind == "lines":
            series |= {"marked": marked(drawn), "lonely": lonely(drawn)}
    return chart


def _palette(colours: list[str]) -> Markup:
    return Markup(" ").join(f"--name-{place}: {colour};" for place, colour in enumerate(colours))


def _prose(text: str) -> Markup:
    """Escape a text; what stands between backticks becomes code, and long names may break after punctuation."""
    code = Markup("<code>{}</code>")
    joined = ((is_code, PERCENT.sub("\N{NO-BREAK SPACE}", part)) for is_code, part in spans(text))
    parts = ((is_code, Markup(" ").join(map(_word, part.split(" ")))) for is_code, part in joined)
    return Markup("").join(code.format(part) if is_code else part for is_code, part in parts)


def _word(word: str) -> Markup:
    if len(word) < LONG_WORD:
        return escape(word)
    # As a block of its own it goes to the next line as a whole first, and breaks only if that is too short as well.
    parts = Markup("<wbr>").join(map(escape, BREAKABLE.split(word)))
    return Markup('<span class="long">{}</span>').format(parts)


def _flags(line: str) -> Markup:
    """Escape a command, and keep its flags from breaking after their hyphens."""
    flag = Markup('<span class="flag">{}</span>')
    parts = enumerate(re.split(r"(?<!\S)(--[\w-]{1,40})(?!\S)", line))
    return Markup("").join(flag.format(part) if index % 2 else escape(part) for index, part in parts)


def _hash(script: str) -> str:
    """Name a script in a Content-Security-Policy: no other one runs, even if it got into the page."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


@cache
def _asset(name: str) -> str:
    return resources.files(__package__).joinpath("assets", name).read_text(encoding="utf-8")


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader(__package__, "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"prose": _prose, "flags": _flags}
    environment.globals |= {"numbers": numbers, "numeric_columns": numeric_columns}
    environment.globals |= {"signs": SIGNS}
    environment.tests["commands"] = lambda block: isinstance(block, Commands)
    environment.tests["excerpts"] = lambda block: isinstance(block, Excerpts)
    environment.tests["facts"] = lambda block: isinstance(block, Facts)
    environment.tests["fold"] = lambda block: isinstance(block, Fold)
    environment.tests["figure"] = lambda block: isinstance(block, Figure)
    environment.tests["notice"] = lambda block: isinstance(block, Notice)
    return environment.get_template("page.html")
