"""Find out whether the prompt before each row matters to a classifier: every prompt with every seed, on the same rows.

    abr compare-prompts --prompts none perfect "Do both sentences say the same?" --seeds 5 \
        --out runs/prompts -- --task_name mrpc --model_name_or_path my/model --num_train_epochs 3

What follows `--` are flags of `abr classify`. The same command goes on where it was stopped, and keeps what is
finished. The report lies in --out: report.html, report.md and plots/, made of comparison.json; beside it what
describes the model: config.json, quant_config.json and adapter_config.json.
"""

from __future__ import annotations

import argparse
from typing import Any

from ..comparison.arms import prompt_arm
from ..data.tasks import PROMPTS
from ..records.flags import complete_prompt_flags
from .comparing import add_arguments, compare


def asked(args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    return {
        "arms": [prompt_arm(text) for text in args.prompts],
        "flags": complete_prompt_flags(rest),
        "varied": "prompt",
        "match": "batches",
        "reference": args.reference or "",
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        "abr compare-prompts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    named = f"{', '.join(PROMPTS)}, or any text in quotation marks; default: these four"
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS), metavar="PROMPT", help=named)
    parser.add_argument("--reference", help="what the others are compared with; default: none, or the first")
    add_arguments(parser)
    return compare("compare-prompts", "classify", parser, asked, argv)
