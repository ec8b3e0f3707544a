"""Explain why a batch of a run was repeated or skipped: its losses, and the numbers that the rule used.

abr why runs/demo 37
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..records.errors import one_line_errors
from ..report.text import terminal_width
from ..report.why import explain_batch, wrapped


def main(argv: Sequence[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser("abr why", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path, help="--output_dir of a run")
    parser.add_argument("step", type=int, help="number of the batch, from 1: its `step` in the trace")
    args = parser.parse_args(argv)
    with one_line_errors(ValueError, OSError):
        lines = explain_batch(args.directory, args.step)
    lines = wrapped(lines, terminal_width())
    print(*lines, sep="\n")
    return lines
