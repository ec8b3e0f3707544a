"""Push a finished run from its directory, e.g. after a push that failed or a run without a network.

abr push runs/mine
abr push runs/mine --hub_model_id me/mine --hub_private_repo --hub_base_model huggyllama/llama-7b

The Hub settings of the run are used unless flags override them. The token comes from HF_TOKEN or `hf auth login`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from huggingface_hub.utils import validate_repo_id
from transformers.hf_argparser import string_to_bool

from ..hub.repository import (
    PushError,
    Target,
    base_on_the_hub,
    push,
    remembered_target,
    stage,
    warn_of_local_base,
)
from ..records.errors import one_line_errors
from ..records.files import PROVENANCE, read_json
from ..records.flags import expand_flags_file


def target_of(directory: Path) -> Target:
    """Return where to push a run without a stored target: from its arguments, or a repository with its name."""
    told = (read_json(directory / PROVENANCE) or {}).get("arguments", {})
    name, revision, private, base = (
        told.get(f"hub_{name}") for name in ("model_id", "revision", "private_repo", "base_model")
    )
    return Target(
        name or directory.absolute().name, revision, private, base_on_the_hub(base_of(directory), base, directory)
    )


def base_of(directory: Path) -> str | None:
    adapter = read_json(directory / "adapter_config.json") or {}
    told = (read_json(directory / PROVENANCE) or {}).get("arguments", {})
    name: str | None = adapter.get("base_model_name_or_path") or told.get("model_name_or_path")
    return name


def main(argv: list[str] | None = None) -> Any:
    parser = argparse.ArgumentParser(
        "abr push", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="--output_dir of a run, or of any ABRTrainer")
    parser.add_argument("--hub_model_id", help="repository; default: as in the run, or the name of the directory")
    parser.add_argument("--hub_revision", help="branch, created if necessary; default: as in the run, or main")
    private: dict[str, Any] = {"type": string_to_bool, "nargs": "?", "const": True}
    parser.add_argument("--hub_private_repo", **private, help="create the repository as private, if it does not exist")
    parser.add_argument("--hub_base_model", help="id of the base model on the Hub")
    with one_line_errors(ValueError, OSError, PushError, when_interrupted="run the same command again"):
        args = parser.parse_args(expand_flags_file(sys.argv[1:] if argv is None else argv))
        if not args.directory.is_dir():
            raise ValueError(f"{args.directory} is not a directory.")
        told = remembered_target(args.directory) or target_of(args.directory)
        target = Target(
            args.hub_model_id or told.repository,
            args.hub_revision or told.revision,
            told.private if args.hub_private_repo is None else args.hub_private_repo,
            args.hub_base_model or told.base,
        )
        validate_repo_id(target.repository)
        if target.base is None:
            warn_of_local_base(base_of(args.directory))
        done = push(stage(args.directory, target), args.directory, target, "Push of a finished run")
    print(done.repo_url)
    return done
