"""The common part of the verbs that compare: their command line, their runs and their report."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..comparison.collecting import collect, copy_configs, write_comparison
from ..comparison.experiment import Experiment, RunFailed
from ..comparison.processes import interruptible
from ..records.commands import command
from ..records.errors import MissingPackage, one_line_errors
from ..records.flags import asks_to_save, expand_flags_file, parse_tuning
from ..report.files import write_report
from ..report.of_comparison import report_on_comparison
from ..report.tensorboard import write_events
from ..report.verdicts import summary_lines
from .main import VERBS
from .parsing import SWITCH, seeds_of

OF_A_RUN = (
    *("classification.sentences", "classification.trainer", "models.loading", "perplexity.measurement"),
    *("training.tracking", "training.trainer", "cli.command_line", "cli.job"),
)
PRELOAD = [f"abr_trainer.{name}" for name in (*OF_A_RUN, "cli.comparing")]
"""Modules of a run that are slow to import, and this one, because a fork imports the main module again."""

OF_TRL = ["abr_trainer.integrations.trl"]
"""Slow modules that only runs of `abr sft` import."""

Asked = Callable[[argparse.Namespace, list[str]], dict[str, Any]]
"""Maps the arguments before and after `--` to the arguments of an `Experiment` that differ between the verbs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every comparison."""
    add = parser.add_argument
    add("--seeds", nargs="+", type=int, default=[5], help="one number N: seeds 0 to N-1; several numbers: these seeds")
    add("--out", type=Path, required=True, help="directory for the runs and the report")
    add(
        "--tune",
        nargs="+",
        action="append",
        default=[],
        metavar=("FLAG", "VALUE"),
        help="try these values of a flag, choose one for each arm on the validation split, and report the test split; "
        "may be given several times",
    )
    add("--tune_seeds", type=int, help="number of seeds for choosing these values; default: all")
    add("--jobs", type=int, default=1, help="number of runs at a time")
    add("--launcher", default="", help="command that starts each run, e.g. 'accelerate launch --num_processes 8'")
    add("--keep-going", **SWITCH, help="leave out runs that fail, instead of stopping")


def split(argv: Sequence[str], parser: argparse.ArgumentParser, of_runs: str) -> tuple[argparse.Namespace, list[str]]:
    """Parse the arguments before `--`, and return them with the arguments after it."""
    argv = expand_flags_file(argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    args, unknown = parser.parse_known_args(argv[:cut])
    if unknown:
        of_runs = getattr(args, "command", of_runs)
        parser.error(f"{unknown[0]} is not an argument of this command. Put flags of abr {of_runs} after --.")
    return args, list(argv[cut + 1 :])


def compare(
    verb: str, of_runs: str, parser: argparse.ArgumentParser, asked: Asked, argv: Sequence[str] | None = None
) -> dict[str, Any]:
    """Run the comparison of a command line, write the report, and return its data.

    Args:
        verb: The verb that compares.
        of_runs: The verb of each run.
        parser: The parser for the arguments before `--`.
        asked: Returns `arms`, `flags`, `reference` and other arguments of `Experiment`.

    Raises:
        SystemExit: With one line, if there was an error or an interrupt, or if failed runs were left out.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    args, rest = split(given, parser, of_runs)
    of_runs = getattr(args, "command", of_runs)
    with one_line_errors(ValueError, OSError, RunFailed, when_interrupted="run the same command again to continue"):
        rest = expand_flags_file(rest)
        seeds = seeds_of(args.seeds)
        experiment = Experiment(
            out=args.out,
            check=check_arguments,
            preload=[*PRELOAD, *OF_TRL] if of_runs == "sft" else PRELOAD,
            module=VERBS[of_runs].module,
            seeds=seeds,
            tune=parse_tuning(args.tune),
            tune_seeds=seeds if args.tune_seeds is None else seeds[: args.tune_seeds],
            launcher=args.launcher,
            jobs=args.jobs,
            keep_going=args.keep_going,
            keeps_checkpoints=asks_to_save(rest),
            **asked(args, rest),
        )
        with experiment.locked(), interruptible():
            experiment.prepare()
            try:
                experiment.carry_out(getattr(args, "controls", False))
            except (RunFailed, KeyboardInterrupt):
                write_up(experiment, command(verb, given))
                raise
            data = write_up(experiment, command(verb, given))
    print(*summary_lines(data, args.out), sep="\n")
    if experiment.failures:
        raise SystemExit(1)
    return data


def check_arguments(module: str, arguments: list[list[str]], sender: Any) -> None:
    """Parse these command lines as the module does, and send the settings of the first one, or a `ValueError`.

    The settings are `device`, `devices` (number of GPUs), `max_passes`, `max_seconds`, `max_steps` and `epochs`. The
    module must have its argument dataclasses in `ARGUMENTS`; the last one must be an `ABRConfig`.
    """
    import torch  # imported only in the process that checks, so that mistyped flags are reported at once

    from .command_line import parse_arguments

    found: dict[str, Any] | ValueError
    try:
        argument_classes = importlib.import_module(module).ARGUMENTS
        first, *_ = [parse_arguments(argument_classes, argv)[-1] for argv in arguments]
        found = {
            "device": first.device.type,
            "devices": torch.cuda.device_count(),
            "max_passes": first.max_passes,
            "max_seconds": first.max_seconds,
            "max_steps": first.most_batches,
            "epochs": first.num_train_epochs,
        }
    except (ValueError, MissingPackage) as error:
        found = ValueError(str(error))
    with contextlib.suppress(OSError):  # the comparison was interrupted
        sender.send(found)


def write_up(experiment: Experiment, argv: Sequence[str]) -> dict[str, Any]:
    """Write the report and all other files made from finished runs, if there are any."""
    data = collect(experiment, argv)
    if data["runs"]:
        write_comparison(data, experiment.out)
        if experiment.varied == "prompt":
            copy_configs(data, experiment.out)
        write_report(report_on_comparison(data), experiment.out)
        write_events(data, experiment.out)
    return data
