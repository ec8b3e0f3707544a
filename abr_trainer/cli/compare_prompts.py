"""Compare prompts before the rows of a classifier: train with each prompt and several seeds, on the same rows.

    abr compare-prompts --prompts none perfect "Do both sentences say the same?" --seeds 5 \
        --out runs/prompts -- --task_name mrpc --model_name_or_path my/model --num_train_epochs 3

After `--` come flags of `abr classify`. If a comparison is stopped, run the same command again to continue; finished
runs are kept. The report is in --out: report.html, report.md and plots/, made from comparison.json. Files that
describe the model are there, too: config.json, quant_config.json and adapter_config.json.
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
    named = f"{', '.join(PROMPTS)}, or any text in quotation marks; default: these four prompts"
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS), metavar="PROMPT", help=named)
    parser.add_argument(
        "--reference", help="prompt to compare the others with; default: the prompt none, or the first"
    )
    add_arguments(parser)
    return compare("compare-prompts", "classify", parser, asked, argv)
