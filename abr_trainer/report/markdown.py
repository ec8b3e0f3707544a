"""A report as GitHub-flavoured Markdown."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from html import escape
from itertools import starmap

from .figure import Block, Commands, Excerpts, Facts, Figure, Fold, Notice, Report, Table
from .text import escaped, numeric_columns, printable, spans

WIDTH = 100
"""Of texts from data, which a page on GitHub does not wrap."""

SIGNS = {"good": "✓", "bad": "✗", "neutral": "•", "warning": "⚠"}

# An underscore within a word stays: it is no emphasis there, and names are full of them.
MARKUP = re.compile(r"[\\`*<>\[\]~$&]|(?<![^\W_])_|_(?![^\W_])")
LIST_OR_HEADING = re.compile(r"^(\d*)([#.)+=-])")


def render_markdown(report: Report, pictures: str = "plots") -> str:
    """Render a report; its pictures are looked for in the folder of that name beside it."""
    parts = [f"# {_escaped(report.title)}", *(_block(block, pictures) for block in report.lead)]
    for section in report.sections:
        parts += [f"## {_escaped(section.heading)}", *(_block(block, pictures) for block in section.blocks)]
    return "\n\n".join(parts) + "\n"


def _block(block: Block, pictures: str) -> str:
    match block:
        case str():
            return _paragraph(block)
        case Notice():
            return _notice(block)
        case Facts():
            return "\n".join(f"- {_line(what)}: {_bold(_escaped(value))}" for what, value in block.items)
        case Figure():
            picture = f"![{_escaped(block.description)}]({pictures}/{block.name}.png)"
            return f"{_bold(_escaped(block.title))}\n\n{picture}"
        case Excerpts():
            return _excerpts(block)
        case Commands():
            return _commands(block)
        case Table():
            return _table(block)
        case Fold():
            return _folded(block.summary, [_block(each, pictures) for each in block.blocks])


def _notice(notice: Notice) -> str:
    sign = SIGNS[notice.kind]
    if not notice.badge:
        return f"> {sign} {_bold(_escaped(notice.text))}"
    said = f"> {sign} {_bold(_escaped(notice.badge.capitalize()))}: {_escaped(notice.text)}"
    return f"{said}\n> {_line(notice.detail)}" if notice.detail else said


def _folded(summary: str, parts: Iterable[str]) -> str:
    # HTML, which neither GitHub nor Sphinx reads Markdown in: a summary is our own text, in plain words.
    return "\n\n".join((f"<details>\n<summary>{escape(escaped(summary))}</summary>", *parts, "</details>"))


def _table(table: Table) -> str:
    header = _row(table.columns)
    rule = "|" + "|".join(" ---: " if numeric else " --- " for numeric in numeric_columns(table)) + "|"
    rows = [_row(row, bold=index in table.emphasised) for index, row in enumerate(table.rows)]
    return "\n\n".join(
        (_bold(_escaped(table.caption)), "\n".join((header, rule, *rows)), *map(_paragraph, table.notes))
    )


def _row(cells: Iterable[str], bold: bool = False) -> str:
    texts = (_escaped(cell).replace("|", "\\|") for cell in cells)
    return "| " + " | ".join(_bold(text) if bold else text for text in texts) + " |"


def _excerpts(excerpts: Excerpts) -> str:
    parts = [
        f"{_paragraph(said)}\n\n{fenced(textwrap.wrap(text, WIDTH))}" if text else _paragraph(said)
        for said, text in excerpts.items
    ]
    shown, folded = parts[: excerpts.open], parts[excerpts.open :]
    if folded:
        shown.append(_folded(f"{len(folded):,} more", folded))
    return "\n\n".join(shown)


def _commands(commands: Commands) -> str:
    return f"{_line(commands.caption)}\n\n{fenced(commands.lines)}"


def fenced(lines: Iterable[str], language: str = "text") -> str:
    """Put a fence around lines that is longer than any in them."""
    lines = tuple(map(escaped, lines))
    fence = "`" * max(3, _longest_fence("\n".join(lines)) + 1)
    return "\n".join((f"{fence}{language}", *lines, fence))


def plain(text: str) -> str:
    r"""Return a text from data on one line, without anything that Markdown or a table of it would read as markup.

    >>> print(plain("<b>\n# a | `b`"))
    \<b\> ⏎ # a \| \`b\`
    """
    return MARKUP.sub(r"\\\g<0>", printable(text)).replace("|", "\\|")


def code(text: str) -> str:
    """Return a text as code within a line.

    >>> print(code("a `b`"))
    `` a `b` ``
    """
    text = printable(text)
    fence, space = "`" * (_longest_fence(text) + 1), " " * ("`" in text)
    return f"{fence}{space}{text}{space}{fence}"


def _longest_fence(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _paragraph(text: str) -> str:
    return "\n".join(map(_line, text.splitlines()))


def _line(text: str) -> str:
    """Return a text that begins a line, escaped."""
    return LIST_OR_HEADING.sub(r"\1\\\2", _escaped(text.strip()))


def _bold(text: str) -> str:
    return f"**{text}**" if text else ""


def _escaped(text: str) -> str:
    """Return a text on one line, without what Markdown would read as markup, but for code between backticks.

    >>> print(_escaped("`a_b` of <b>_x_</b> and max_repeats=2*3"))
    `a_b` of \\<b\\>\\_x\\_\\</b\\> and max_repeats=2\\*3
    """
    return "".join(starmap(_span, spans(escaped(" ".join(text.splitlines())))))


def _span(is_code: bool, text: str) -> str:
    return f"`{text}`" if is_code else MARKUP.sub(r"\\\g<0>", text)
