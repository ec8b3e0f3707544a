"""Find out which repeat scheduler pays on your model and data: every one with every seed, at equal compute.

    python scripts/compare_schedulers.py --schedulers baseline abr fixed:2 --seeds 5 --out runs/cmp -- \
        --dataset_name demo --block_size 128 --max_passes 200 --learning_rate 2e-3 --use_cpu

What follows `--` are arguments of run_clm_abr.py. The same command goes on where it was stopped, and keeps what is
finished. The report lies in --out: report.html, report.md and plots/, made of comparison.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from abr_trainer.arms import parse_arm
from abr_trainer.comparison import collect, write_comparison
from abr_trainer.errors import one_line_errors
from abr_trainer.experiment import Experiment, RunFailed
from abr_trainer.flags import asks_to_save, complete_flags, expand_flags_file, parse_tuning
from abr_trainer.processes import interruptible
from abr_trainer.report.files import write_report
from abr_trainer.report.of_comparison import report_on_comparison, summary_lines
from abr_trainer.report.tensorboard import write_events

SCRIPT = Path(__file__).resolve().parents[1] / "run_clm_abr.py"

HELP = {
    "schedulers": "name, name:value, name:parameter=value,... or module:Class:parameter=value,...; a parameter that "
    "the rule does not have is a flag of the script",
    "seeds": "one number: so many seeds, from 0; several: these seeds",
    "match": "passes: the same compute, --max_passes, and the same final learning rate; batches: the same data, "
    "whatever that costs (the published protocol)",
    "out": "directory of the runs and of the report",
    "reference": "what the others are compared with; default: baseline, or the first",
    "controls": "add, for each rule that decides, even and random repeats of the same mean",
    "tune": "try these values of a flag for each scheduler, choose by validation perplexity, report test perplexity; "
    "may be given several times",
    "tune_seeds": "choose by the first so many seeds; default: all",
    "evaluations": "evaluations in the course of a run",
    "jobs": "runs at a time",
    "launcher": "what starts each run, e.g. 'accelerate launch --num_processes 8'",
    "keep_going": "leave out runs that fail, instead of stopping",
}


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse what stands before `--`, and return it with what stands behind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name: str, **options: Any) -> None:
        parser.add_argument(f"--{name}", help=HELP[name], **options)

    add("schedulers", nargs="+", default=["baseline", "abr"])
    add("seeds", nargs="+", type=int, default=[5])
    add("match", choices=("passes", "batches"), default="passes")
    add("out", type=Path, required=True)
    add("reference")
    add("controls", action="store_true")
    add("tune", nargs="+", action="append", default=[], metavar=("FLAG", "VALUE"))
    add("tune_seeds", type=int)
    add("evaluations", type=int, default=10)
    add("jobs", type=int, default=1)
    add("launcher", default="")
    parser.add_argument("--keep-going", action="store_true", help=HELP["keep_going"])
    cut = argv.index("--") if "--" in argv else len(argv)
    args, unknown = parser.parse_known_args(argv[:cut])
    if unknown:
        parser.error(f"{unknown[0]} is no argument of this script. Those of run_clm_abr.py stand behind --.")
    return args, argv[cut + 1 :]


def write_up(experiment: Experiment, argv: list[str]) -> dict[str, Any]:
    """Write everything that is made of the runs that are finished, if there are any."""
    data = collect(experiment, ["scripts/compare_schedulers.py", *argv])
    if data["runs"]:
        write_comparison(data, experiment.out)
        write_report(report_on_comparison(data), experiment.out)
        write_events(data, experiment.out)
    return data


def main(argv: list[str] | None = None) -> dict[str, Any]:
    given = sys.argv[1:] if argv is None else argv
    args, rest = parse(given)
    with one_line_errors(ValueError, OSError, RunFailed, when_interrupted="the same command goes on"):
        rest = expand_flags_file(rest)
        seeds = list(range(args.seeds[0])) if len(args.seeds) == 1 else args.seeds
        experiment = Experiment(
            out=args.out,
            script=SCRIPT.relative_to(Path.cwd()) if SCRIPT.is_relative_to(Path.cwd()) else SCRIPT,
            arms=[parse_arm(text) for text in args.schedulers],
            seeds=seeds,
            flags=complete_flags(rest, args.match, args.evaluations),
            match=args.match,
            reference=args.reference or "",
            tune=parse_tuning(args.tune),
            tune_seeds=seeds if args.tune_seeds is None else seeds[: args.tune_seeds],
            launcher=args.launcher,
            jobs=args.jobs,
            keep_going=args.keep_going,
            keeps_checkpoints=asks_to_save(rest),
        )
        with experiment.locked(), interruptible():
            experiment.prepare()
            try:
                experiment.carry_out(args.controls)
            except (RunFailed, KeyboardInterrupt):
                write_up(experiment, given)
                raise
            data = write_up(experiment, given)
    print(*summary_lines(data, args.out), sep="\n")
    if experiment.failures:
        raise SystemExit(1)
    return data


if __name__ == "__main__":
    main()
