"""Write the report of a run, finished or not, or of a comparison, from the files in its directory.

abr report runs/demo    # writes runs/demo/_report/report.html and its plots
abr report runs/cmp     # writes report.html, report.md and plots/, from comparison.json only
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..comparison.collecting import read_comparison
from ..records.errors import one_line_errors
from ..records.files import COMPARISON, REPORT_FOLDER, TRACE_NAME
from ..report.files import write_report
from ..report.of_comparison import report_on_comparison
from ..report.of_run import report_on_run
from ..report.verdicts import summary_lines


def main(argv: Sequence[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser("abr report", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path, help="--output_dir of a run, or --out of a comparison")
    args = parser.parse_args(argv)
    with one_line_errors(ValueError, OSError):
        lines = report_in(args.directory)
    print(*lines, sep="\n")
    return lines


def report_in(directory: Path) -> list[str]:
    """Write the report of the run or comparison in a directory, and return lines with its result and its path.

    Raises:
        ValueError: It is not a directory, or contains neither a run nor a comparison.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory.")
    if (directory / COMPARISON).is_file():
        data = read_comparison(directory)
        write_report(report_on_comparison(data), directory)
        return list(summary_lines(data, directory))
    if not (directory / TRACE_NAME).is_file():
        raise ValueError(
            f"{directory} contains neither a run (no {TRACE_NAME}) nor finished runs to compare (no {COMPARISON})."
        )
    folder = directory / REPORT_FOLDER
    write_report(report_on_run(directory), folder)
    return [str(folder / "report.html")]
