"""Compare repeat schedulers on your model and data: train each with several seeds, at equal compute.

    abr compare --schedulers baseline abr fixed:2 --seeds 5 --out runs/cmp -- \
        --dataset_name demo --block_size 128 --max_passes 200 --learning_rate 2e-3 --use_cpu

After `--` come flags of `abr train`; with `--command sft`, of `abr sft`. If a comparison is stopped, run the same
command again to continue; finished runs are kept. The report is in --out: report.html, report.md and plots/, made from
comparison.json. The first argument may be a file of flags, and so may the first one after `--`.
"""

from __future__ import annotations

import argparse
from typing import Any

from ..comparison.arms import parse_arm
from ..records.flags import complete_flags
from .comparing import add_arguments, compare
from .parsing import SWITCH

HELP = {
    "command": "verb of the runs: train, or sft for chats",
    "schedulers": "name, name:value, name:parameter=value,... or module:Class:parameter=value,...; a parameter that "
    "the rule does not have is used as a flag of the runs",
    "match": "passes: the same compute (--max_passes) and the same final learning rate; seconds: the same time "
    "(--max_seconds), which depends on the machine; batches: the same data at any compute (the published protocol)",
    "reference": "scheduler to compare the others with; default: baseline, or the first",
    "controls": "for each rule that decides, add controls with the same mean: even repeats and random repeats",
    "evaluations": "number of evaluations during a run",
}


def asked(args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    return {
        "arms": [parse_arm(text) for text in args.schedulers],
        "flags": complete_flags(rest, args.match, args.evaluations),
        "match": args.match,
        "reference": args.reference or "",
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        "abr compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--command", choices=("train", "sft"), default="train", help=HELP["command"])
    parser.add_argument("--schedulers", nargs="+", default=["baseline", "abr"], help=HELP["schedulers"])
    parser.add_argument("--match", choices=("passes", "seconds", "batches"), default="passes", help=HELP["match"])
    parser.add_argument("--reference", help=HELP["reference"])
    parser.add_argument("--controls", **SWITCH, help=HELP["controls"])
    parser.add_argument("--evaluations", type=int, default=10, help=HELP["evaluations"])
    add_arguments(parser)
    return compare("compare", "train", parser, asked, argv)
