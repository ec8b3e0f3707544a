"""Make a page on one run, finished or not, in the folder _report of its directory; or explain one batch.

python scripts/report_run.py runs/quickstart
python scripts/report_run.py runs/quickstart --why 37    # why batch 37 was repeated or skipped
"""

from __future__ import annotations

import argparse
from pathlib import Path

from abr_trainer.records.errors import one_line_errors
from abr_trainer.records.files import REPORT_FOLDER
from abr_trainer.report.files import write_report
from abr_trainer.report.of_run import report_on_run
from abr_trainer.report.why import explain_batch


def main(argv: list[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="--output_dir of run_clm_abr.py")
    parser.add_argument("--why", type=int, metavar="STEP", help="print why this batch was repeated or skipped")
    args = parser.parse_args(argv)
    with one_line_errors(ValueError, OSError):
        if args.why is not None:
            lines = explain_batch(args.directory, args.why)
        else:
            folder = args.directory / REPORT_FOLDER
            write_report(report_on_run(args.directory), folder)
            lines = [str(folder / "report.html")]
    print(*lines, sep="\n")
    return lines


if __name__ == "__main__":
    main()
