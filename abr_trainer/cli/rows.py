"""List the broken rows of a run, worst first, or write a file without them.

abr rows runs/demo                                     # rows that a run with --skip_rows dropped
abr rows runs/demo --all --limit 50                    # all rows of a run with --rank_rows, by their last loss
abr rows runs/demo --csv > broken.csv
abr rows runs/demo --clean notes.jsonl clean.jsonl     # write notes.jsonl without the dropped rows to clean.jsonl
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import math
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..records.errors import one_line_errors
from ..records.files import PROVENANCE, ROW_LOSSES_NAME
from ..report.cleaning import doubtful_row, rows_to_remove
from ..report.rows import (
    CUT_TO_BLOCKS,
    JUDGED_ALONE,
    RunRow,
    broken_rows,
    has_row_rule,
    ranked_rows,
    read_described,
    read_drops,
    read_row_losses,
    rows_judged,
)
from ..report.text import escaped, number, printable, share, shortened, terminal_width
from ..report.why import read_trace

MOST = 20
"""Number of rows to list by default."""

NAMED = 10
"""Most row numbers in a sentence; all are named where nothing else lists them."""

COLUMNS = (
    *("run", "index", "source", "first_row", "last_row", "loss", "limit", "targets", "reason", "drops", "visits"),
    *("steps", "text"),
)


FORMULAS = ("=", "+", "-", "@")
"""What a formula begins with in a spreadsheet."""


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser("abr rows", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", nargs="+", help="--output_dir of one or more runs")
    parser.add_argument(
        "--all", action="store_true", help="rank all rows by their last loss, highest first; needs --rank_rows"
    )
    parser.add_argument("--lowest", action="store_true", help="with --all: lowest loss first, e.g. duplicated text")
    parser.add_argument(
        "--limit", type=int, help=f"most rows to show of each run; 0: all. Default: {MOST}, or all for JSON and CSV"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print all fields of each row as JSON")
    form.add_argument("--csv", action="store_true", help="print all fields of each row as CSV, with a header")
    form.add_argument(
        "--clean",
        nargs=2,
        metavar=("FILE", "OUT"),
        help="write the training file FILE without the dropped rows to OUT, in the same format",
    )
    parser.add_argument("--overwrite", action="store_true", help="let --clean replace OUT if it exists")
    args = parser.parse_args(argv)
    directories = [Path(run) for run in args.run]
    with one_line_errors(ValueError, OSError):
        if args.limit is not None and args.limit < 0:
            raise ValueError(f"--limit must be at least 0, got {args.limit}.")
        if args.clean and args.all:
            raise ValueError("--clean removes the rows that were dropped, so it cannot be used with --all.")
        if args.clean and args.limit is not None:
            raise ValueError("--clean removes all rows that were dropped, so it cannot be used with --limit.")
        if args.lowest and not args.all:
            raise ValueError("--lowest needs --all.")
        if args.overwrite and not args.clean:
            raise ValueError("--overwrite needs --clean FILE OUT.")
        found = [Found.of(directory, args.all, args.lowest) for directory in directories]
        if args.clean:
            file, out = map(Path, args.clean)
            print(*clean(directories, file, out, args.overwrite, terminal_width()), sep="\n")
            return []
        limit = MOST if args.limit is None and not (args.json or args.csv) else args.limit or None
        rows = [fields_of(each, row) for each in found for row in each.rows[:limit]]
    if args.json:
        print(json.dumps(rows, indent=1))
    elif args.csv:
        print(as_csv(rows), end="")
    else:
        print("\n\n".join("\n".join(each.lines(limit, terminal_width())) for each in found))
    return rows


@dataclasses.dataclass(frozen=True)
class Found:
    """The rows of a run, worst first.

    Attributes:
        about: A line about all of them.
    """

    directory: Path
    rows: list[RunRow]
    about: str

    @classmethod
    def of(cls, directory: Path, all_rows: bool, lowest_first: bool) -> Found:
        """Find the rows that a run dropped, or all rows that it saw.

        Raises:
            ValueError: The directory contains no run, or the run had no rule for rows.
        """
        if not directory.is_dir():
            raise ValueError(f"{directory} is not a directory.")
        trace, losses = read_trace(directory), read_row_losses(directory)
        dropped = broken_rows(directory)
        if all_rows:
            if losses is None:
                raise ValueError(f"{directory} has no {ROW_LOSSES_NAME}. --all needs a run with --rank_rows.")
            described = [*read_described(directory), *dropped]
            rows, count = ranked_rows(losses, described, lowest_first=lowest_first), len(losses["visits"])
            first = "lowest" if lowest_first else "highest"
            about = f"{len(rows):,} of {count:,} rows were seen; by their last loss, {first} first"
            return cls(directory, rows, about)
        if not has_row_rule(directory):
            hint = " --all ranks its rows." if losses is not None else ""
            raise ValueError(f"{directory} has no dropped rows: it was trained without --skip_rows.{hint}")
        judged, drops = rows_judged(trace), len(read_drops(directory))
        about = f"{judged:,} rows judged in {len(trace):,} batches, {drops:,} dropped ({share(drops, judged)})"
        if drops:
            about += f": {len(dropped):,} different row{'s' * (len(dropped) != 1)}, worst first"
        return cls(directory, dropped, about)

    def lines(self, limit: int | None, width: int) -> Iterator[str]:
        """Yield the lines to show on a terminal of that width."""
        yield f"{self.directory}: {self.about}"
        if any(row.is_block for row in self.rows):
            yield from textwrap.wrap(f"{CUT_TO_BLOCKS} One block can hold good and broken text. {JUDGED_ALONE}", width)
        for row in self.rows[:limit]:
            yield ""
            yield row.place
            text = f"{printable(row.text)} ..." if row.left_out else printable(row.text)
            for part in (f"{row.numbers}; {row.fate}", text, row.left_out):
                yield from textwrap.wrap(part, width, initial_indent=" " * 4, subsequent_indent=" " * 4)
        left = 0 if limit is None else len(self.rows) - limit
        if left > 0:
            yield ""
            yield f"{left:,} more: --limit 0 shows all."


def fields_of(found: Found, row: RunRow) -> dict[str, Any]:
    """Return all fields of a row, by name."""
    known = dataclasses.asdict(row) | {"run": str(found.directory), "drops": len(row.steps), "steps": list(row.steps)}
    return {name: known[name] for name in COLUMNS}


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as CSV, with full texts. Control characters are escaped, and no text is taken for a formula."""
    written = io.StringIO()
    writer = csv.DictWriter(written, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        steps = " ".join(map(str, row["steps"]))
        texts = {name: _as_cell(row[name]) for name in ("run", "source", "text") if row[name] is not None}
        writer.writerow(row | texts | {"steps": steps})
    return written.getvalue()


def _as_cell(text: str) -> str:
    """Return a text that no spreadsheet takes for a formula: as is usual, one that could be has a `'` before it.

    >>> _as_cell("=1+1"), _as_cell("1+1=2")
    ("'=1+1", '1+1=2')
    """
    return f"'{escaped(text)}" if text.lstrip().startswith(FORMULAS) else escaped(text)


# ---- Removing the broken rows ----


def clean(directories: Sequence[Path], file: Path, out: Path, overwrite: bool, width: int) -> list[str]:
    """Write a file without the rows that runs dropped, and return lines about the result.

    Args:
        width: Columns at which long lines are wrapped.

    Raises:
        ValueError: The runs did not use the file, or it has changed; `out` exists already, or cannot be written.
    """
    if not file.is_file():
        raise ValueError(f"--clean {file} {'is a directory, but must be a file' if file.is_dir() else 'is missing'}.")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ValueError(
            f"--clean: {out} {'is a directory' if out.is_dir() else 'is in a directory that does not exist'}."
        )
    if out.exists() and out.samefile(file):
        raise ValueError(f"--clean would overwrite {file}, but the numbers of the dropped rows refer to it.")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists. Give another name, or --overwrite.")
    removal = rows_to_remove(directories, file)
    if not removal.whole and not removal.partly and (unknown := removal.elsewhere[""]):
        unsaid = f"The source of {unknown:,} dropped rows is not known, e.g. because of --packing"
        raise ValueError(f"{unsaid}, and no other dropped row is from {file}. abr rows shows their text.")
    from ..data.cleaning import copy_without, has_empty_lines, texts_in  # slow to import

    if len(removal.count_empty_lines) > 1 and has_empty_lines(file):
        alike = "the runs differ in this" if len(directories) > 1 else f"{directories[0]} does not record it"
        raise ValueError(
            f"{file} has empty lines, and it is not known whether these count as rows: {alike}. Remove the rows that "
            "abr rows lists by hand."
        )
    empty = True in removal.count_empty_lines
    is_newer = any(file.stat().st_mtime > begun for begun in _beginnings(directories))
    doubtful = doubtful_row(texts_in(file, {row for row, _ in removal.texts}, empty), removal.texts)
    if doubtful is not None:
        row, text = doubtful
        told = shortened(text, 60)
        raise ValueError(f"{file} has changed since the run: its row {row:,} is not the row that was dropped: {told}")
    count = copy_without(file, out, removal.whole, empty)
    whole, partly = removal.whole, removal.partly
    removed = _named([f"{number:,}" for number in sorted(whole)], None if removal.has_blocks else NAMED)
    lines = [f"{out}: {file.name} without {len(whole):,} of its {count:,} rows{removed}"]
    if is_newer and not removal.texts:
        lines.append(
            f"{file} was written after the run began. Check that it still has the same rows in the same order."
        )
    if removal.has_blocks and (whole or partly):
        neighbours = "Removed rows may include good neighbours of broken ones. " if whole else ""
        lines += textwrap.wrap(f"{CUT_TO_BLOCKS} {neighbours}{JUDGED_ALONE}", width)
    if partly:
        most = sorted(partly, key=lambda number: (-partly[number], -removal.highest[number], number))
        stay = f"Kept {len(partly):,} row{'s' * (len(partly) != 1)} that may be only partly in dropped blocks"
        numbers = [f"{number:,} ({partly[number]:,}, {_loss(removal.highest[number])})" for number in most]
        told = f"{stay}, the most suspicious first, with the number of these blocks and their highest loss"
        lines += textwrap.wrap(f"{told}{_named(numbers, None)}.", width)
        lines.append(f"To see these blocks: abr rows {shlex.quote(str(directories[0]))}")
    if removal.elsewhere:
        named = ", ".join(
            f"{count:,} from {printable(source) or 'unknown source'}" for source, count in removal.elsewhere.items()
        )
        lines.append(f"Dropped rows that are not from {file.name}: {named}")
    return lines


def _beginnings(directories: Sequence[Path]) -> Iterator[float]:
    """Yield the start time of each run that was started from the command line."""
    records = (directory / PROVENANCE for directory in directories)
    return (record.stat().st_mtime for record in records if record.is_file())


def _loss(loss: float) -> str:
    return number(loss) if math.isfinite(loss) else "not finite"


def _named(rows: Sequence[str], most: int | None) -> str:
    """Return these rows after a colon, the first `most` of them; None: all."""
    left_out = most is not None and len(rows) > most
    return f": {', '.join(rows[:most])}{', ...' * left_out}" if rows else ""
