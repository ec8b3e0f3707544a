"""Text as both the page and the Markdown write it: numbers, code between backticks, columns of figures."""

from __future__ import annotations

import math
import re
import shutil
import statistics
import unicodedata
from collections.abc import Iterable

from .figure import Number, Table

DASH = "—"
"""Stands for a number that is missing."""

WIDEST = 100
"""Columns of text, however wide the terminal is."""

LIKE_A_NUMBER = re.compile(r"[^\w\s]?\s*[\d.][\d.,]*\s*(%|e[+-]?\d+)?(\s+(to|of|±|\()\s*.*)?")


def number(value: Number, digits: int = 4) -> str:
    """Write a number with so many significant digits; whole ones, and the whole part of long ones, to the last digit.

    >>> [number(value) for value in (12.34567, 5.0, 123456.7, 0.00001234, 2.5e15, -0.5, None)]
    ['12.35', '5', '123,457', '1.234e-5', '2.5e15', '-0.5', '—']
    """
    if value is None or not math.isfinite(value):
        return DASH
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1e9 or size < 1e-3:
        factor, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{float(factor):g}e{int(exponent)}"
    if size >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def amount(value: float) -> str:
    """Write how much was counted: whole numbers without a decimal, means and fractions with one.

    >>> amount(378.0), amount(1234.56)
    ('378', '1,234.6')
    """
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def decimals(values: Iterable[Number], digits: int = 4) -> int:
    """Return how many decimals the middle one of some values needs for so many significant digits.

    A column whose numbers have the same decimals can be read at a glance.

    >>> decimals([19.2, 21.4, 1e9]), decimals([0.699]), decimals([0.0, None])
    (2, 4, 0)
    """
    sizes = [abs(value) for value in values if value is not None and math.isfinite(value) and value != 0]
    return max(0, digits - 1 - math.floor(math.log10(statistics.median(sizes)))) if sizes else 0


def fixed(value: float, places: int, sign: str = "") -> str:
    """Write a number with so many decimals; a very large one as `number` does.

    >>> fixed(20.0, 2), fixed(0.79, 3, "+"), fixed(1e9, 2)
    ('20.00', '+0.790', '1e9')
    """
    return f"{value:{sign},.{places}f}" if abs(value) < 1e6 else number(value)


def share(part: float, whole: float) -> str:
    """Write a part of a whole in percent.

    >>> share(3, 72), share(1, 300), share(0, 0)
    ('4.2 %', '0.33 %', '0 %')
    """
    percent = 100 * part / whole if whole else 0.0
    return f"{percent:.{1 if percent >= 1 else 2}f} %" if percent else "0 %"


def terminal_width() -> int:
    """Return how many columns to write in: those of the terminal, up to a width that can be read."""
    return min(shutil.get_terminal_size().columns, WIDEST)


def escaped(text: str) -> str:
    r"""Return a text from a data set with an escape for each character that would do something to a terminal.

    Spaces, tabs and line feeds stay.

    >>> escaped("\x1b[31mred\nand \u202eback")
    '\\x1b[31mred\nand \\u202eback'
    """
    return "".join(
        letter
        if letter.isprintable() or letter in "\n\t" or unicodedata.category(letter) == "Zs"
        else letter.encode("unicode_escape").decode()
        for letter in text
    )


def printable(text: str) -> str:
    r"""Return a text from a data set on one line, escaped.

    >>> printable("a\ttab,\r\nthen \x1b[31mred")
    'a tab, ⏎ then \\x1b[31mred'
    """
    lines = (re.sub(r"\s+", " ", line).strip() for line in text.splitlines())
    return escaped(" ⏎ ".join(lines)).strip()


def shortened(text: str, width: int) -> str:
    """Return the beginning of a text from a data set on one line, escaped.

    >>> shortened("one two three", 10), shortened("one two", 10)
    ('one two...', 'one two')
    """
    line = printable(text)
    return line if len(line) <= width else line[: width - 3].rstrip() + "..."


def both_ends(text: str, width: int) -> str:
    """Return the beginning and the end of a text from a data set on one line, escaped.

    >>> both_ends("one two three four five", 16), both_ends("one two", 16)
    ('one tw ... five', 'one two')
    """
    line, gap = printable(text), " ... "
    if len(line) <= width:
        return line
    end = (width - len(gap)) // 2
    return f"{line[: width - len(gap) - end].rstrip()}{gap}{line[-end:].lstrip()}"


def spans(text: str) -> list[tuple[bool, str]]:
    """Split into `(is code, text)`: what stands between two backticks is code. White space is collapsed.

    >>> spans("set `--max_passes` and  go")
    [(False, 'set '), (True, '--max_passes'), (False, ' and go')]
    """
    parts = re.split(r"`([^`]+)`", " ".join(text.split()))
    return [(index % 2 == 1, part) for index, part in enumerate(parts) if part]


def numeric_columns(table: Table) -> tuple[bool, ...]:
    """Tell which columns hold numbers only, and are thus aligned to the right. The first names its row.

    >>> numeric_columns(Table("", ("arm", "loss", "note"), (("a", "1.25 ± 0.1", "3 seeds were"), ("b", "—", "lost"))))
    (False, True, False)
    """
    cells = [[row[column] for row in table.rows] for column in range(len(table.columns))]
    return tuple(column > 0 and _is_numeric(cells[column]) for column in range(len(cells)))


def _is_numeric(cells: list[str]) -> bool:
    filled = [cell.strip() for cell in cells if cell.strip() not in ("", "-", "\N{EN DASH}", DASH)]
    return bool(filled) and all(LIKE_A_NUMBER.fullmatch(cell) for cell in filled)
