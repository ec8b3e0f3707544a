"""Make report.md, report.html and plots/ of a comparison anew, from its comparison.json alone.

python scripts/report_comparison.py runs/cmp
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from abr_trainer.comparison.statistics import read_comparison
from abr_trainer.records.errors import one_line_errors
from abr_trainer.report.files import write_report
from abr_trainer.report.of_comparison import report_on_comparison, summary_lines


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="--out of compare_schedulers.py or compare_prompts.py")
    args = parser.parse_args(argv)
    with one_line_errors(ValueError, OSError):
        data = read_comparison(args.directory)
        write_report(report_on_comparison(data), args.directory)
    print(*summary_lines(data, args.directory), sep="\n")
    return data


if __name__ == "__main__":
    main()
