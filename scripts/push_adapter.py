"""Push what a run has left in its directory: after a push that failed, or from a machine without a network.

python scripts/push_adapter.py runs/mine
python scripts/push_adapter.py runs/mine --hub_model_id me/mine --hub_private_repo --hub_base_model huggyllama/llama-7b

What the run was told of the Hub holds unless flags say otherwise. The token is that of HF_TOKEN or `hf auth login`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from transformers.hf_argparser import string_to_bool

from abr_trainer.errors import one_line_errors
from abr_trainer.hub import PushError, Target, base_on_the_hub, push, stage
from abr_trainer.records import PROVENANCE, read_json


def main(argv: list[str] | None = None) -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="--output_dir of run_clm_abr.py, or of any ABRTrainer")
    parser.add_argument("--hub_model_id", help="where to; default: as in the run, or the name of the directory")
    parser.add_argument("--hub_revision", help="branch, made if there is none; default: as in the run, or main")
    private = {"type": string_to_bool, "nargs": "?", "const": True}
    parser.add_argument("--hub_private_repo", **private, help="make a private repository, where there is none")
    parser.add_argument("--hub_base_model", help="what the base model is called on the Hub")
    args = parser.parse_args(argv)
    with one_line_errors(ValueError, OSError, PushError, when_interrupted="nothing was pushed"):
        if not args.directory.is_dir():
            raise ValueError(f"{args.directory} is no directory.")
        told = (read_json(args.directory / PROVENANCE) or {}).get("arguments", {})
        wanted = {name: value for name, value in vars(args).items() if value is not None}
        adapter = read_json(args.directory / "adapter_config.json") or {}
        base = adapter.get("base_model_name_or_path") or told.get("model_name_or_path")
        found = {**{name: told.get(name) for name in vars(args)}, **wanted}
        target = Target(
            found["hub_model_id"] or args.directory.resolve().name,
            found["hub_revision"],
            found["hub_private_repo"],
            base_on_the_hub(base, found["hub_base_model"]),
        )
        done = push(stage(args.directory, target), args.directory, target, "Push of a finished run")
    print(done.repo_url)
    return done


if __name__ == "__main__":
    main()
