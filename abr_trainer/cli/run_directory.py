"""The output directory of a run: one run in it, and where to resume it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers.utils import logging

from ..hub.repository import fetch_checkpoint
from ..models.devices import provenance_of
from ..records.errors import one_line_errors
from ..records.files import (
    CHECKPOINT_PREFIX,
    DROPPED_NAME,
    HISTORY_NAME,
    LOCK_NAME,
    PREDICTIONS_NAME,
    PROVENANCE,
    QUANT_CONFIG_NAME,
    RANKED_NAME,
    REPLACED_PREFIX,
    REPORT_FOLDER,
    ROW_LOSSES_NAME,
    ROW_TRACE_NAME,
    SAMPLES_NAME,
    SKIPPED_NAME,
    SUMMARY_NAME,
    TASK_NAME,
    TRACE_NAME,
    TRAINER_STATE,
    is_unused,
    last_complete_checkpoint,
    read_json,
    step_of,
    unused,
    write_whole,
)
from ..records.locking import locked
from ..training.checkpoints import UnfitCheckpoint, agreed, newest_checkpoint, sound_checkpoint
from ..training.config import ABRConfig

logger = logging.get_logger(__name__)

RUN_FILES = (
    *("checkpoint-*", "abandoned-checkpoint-*", f"{REPLACED_PREFIX}*", "runs", "*_results.json", TRAINER_STATE),
    *(
        "_push*",
        TRACE_NAME,
        HISTORY_NAME,
        SUMMARY_NAME,
        SKIPPED_NAME,
        DROPPED_NAME,
        ROW_TRACE_NAME,
        RANKED_NAME,
        ROW_LOSSES_NAME,
        SAMPLES_NAME,
        REPORT_FOLDER,
    ),
    *(PROVENANCE, "adapter_*", "model*.safetensors*", "config.json", "generation_config.json", "training_args.bin"),
    *("chat_template.jinja", "additional_chat_templates"),
    *(TASK_NAME, QUANT_CONFIG_NAME, PREDICTIONS_NAME.format(split="*")),
)
"""What a run leaves in its output directory. An adapter left beside full weights would be loaded on top of them, and a
chat template of an earlier run would be taken for that of this one.
"""

PREVIOUS = "_previous-run"

MAY_DIFFER = (
    *("output_dir", "resume_from_checkpoint", "overwrite_output_dir", "do_", "logging_", "log_", "save_", "eval_"),
    *(
        "push_to_hub",
        "hub_",
        "report_to",
        "run_name",
        "disable_tqdm",
        "max_steps",
        "preprocessing_num_workers",
        "overwrite_cache",
        "sample_prompts",
        "generation_metrics",
    ),
)
"""Beginnings of the names of arguments that a resumed run may change without changing the training."""


@contextlib.contextmanager
def only_run_in(config: ABRConfig) -> Iterator[None]:
    """Keep other runs out of the output directory, from before the first check to the end.

    The main process holds the lock; the others are told if it cannot.

    Raises:
        SystemExit: Another run is at work there, or nothing can be written there.
    """
    path = Path(str(config.output_dir))
    with contextlib.ExitStack() as held:
        with one_line_errors(ValueError, OSError):
            refused: list[str | None] = [None]
            if config.process_index == 0 and (path.is_dir() or not path.exists()):  # a file is refused below
                try:
                    held.enter_context(locked(path, "--output_dir"))
                except ValueError as error:
                    refused[0] = str(error)
            if config.world_size > 1:
                broadcast_object_list(refused)
            if refused[0] is not None:
                raise ValueError(refused[0])
        yield


def check_output_dir(config: ABRConfig, model_path: str, adapter: str | None = None) -> None:
    """Refuse what would mix two runs in one directory, or destroy what is no run, or what this one starts from.

    Raises:
        ValueError: The directory is in use, and the run neither resumes nor may overwrite it.
    """
    path = Path(str(config.output_dir))
    if path.exists() and not path.is_dir():
        raise ValueError(f"--output_dir {path} is a file.")
    if config.process_index != 0 or is_unused(path):
        return
    if path.resolve() == Path(model_path).resolve():
        raise ValueError(f"--output_dir {path} is the directory of --model_name_or_path. Give another one.")
    if adapter is not None and Path(adapter).exists() and Path(adapter).resolve().is_relative_to(path.resolve()):
        raise ValueError(f"--output_dir {path} holds --adapter_name_or_path {adapter}. Give another one.")
    if not config.do_train:
        if any((path / name).exists() for name in ("adapter_config.json", "config.json")):
            raise ValueError(
                f"--output_dir {path} holds a trained model, and without --do_train the one evaluated would be "
                f"{model_path}. Give another --output_dir."
            )
    elif config.overwrite_output_dir and not config.resume_from_checkpoint:
        if not (path / PROVENANCE).exists() and not any(path.glob(f"{PREVIOUS}*")):
            raise ValueError(f"--overwrite_output_dir: {path} holds no run (no {PROVENANCE}). Clear it yourself.")
    elif not config.resume_from_checkpoint:
        can_go_on = last_complete_checkpoint(path) is not None
        go_on = "--resume_from_checkpoint true to go on with the run in it, " if can_go_on else ""
        raise ValueError(
            f"--output_dir {path} is not empty. Give {go_on}--overwrite_output_dir to start over, or another "
            "directory."
        )
    for file in [file for pattern in RUN_FILES for file in path.glob(pattern)]:
        if not os.access(file, os.W_OK):
            raise ValueError(f"--output_dir {path}: {file.name} cannot be written to. Change its permissions.")


@contextlib.contextmanager
def replacing_previous_run(config: ABRConfig) -> Iterator[None]:
    """With `overwrite_output_dir`, move the run in the directory aside, and delete it when this one has been trained.

    If training fails, the previous run stays in `_previous-run/` until a run in this directory ends well. Files that
    no run makes are not touched.
    """
    path = Path(str(config.output_dir))
    if config.process_index != 0 or not config.do_train or is_unused(path):
        yield
        return
    previous, unfinished = path / PREVIOUS, path / f"{PREVIOUS}.unfinished"
    if config.overwrite_output_dir and not config.resume_from_checkpoint:
        ours = [old for pattern in RUN_FILES for old in path.glob(pattern)]
        if previous.exists():  # what lies beside a previous run is what a failed attempt has left
            for old in ours:
                _remove(old)
        else:
            unfinished.mkdir(exist_ok=True)  # if this was interrupted before, a part of the run is there already
            for old in ours:
                old.rename(unfinished / old.name)
            unfinished.rename(previous)
    try:
        yield
    except BaseException:
        if previous.exists():
            logger.warning(f"The previous run is kept in {previous}.")
        raise
    if previous.exists():  # also where the attempt that replaces it was interrupted, and has been resumed
        _remove(previous)


def clear(directory: Path) -> None:
    """Remove all that a directory holds, but a lock."""
    for path in directory.iterdir():
        if path.name != LOCK_NAME:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def write_provenance(config: ABRConfig, argv: Sequence[str], *others: Any) -> None:
    """Write `run.json`: the command line, all arguments, versions, code and machine that made this run.

    A resumed run keeps what stands there, adds its own command line, and warns of every argument that has changed.

    Args:
        config: The arguments of the trainer; tokens in it are masked.
        argv: The command line, the program first.
        others: Further dataclasses of arguments.
    """
    path = Path(str(config.output_dir), PROVENANCE)
    arguments = {**config.to_dict(), **{name: value for other in others for name, value in vars(other).items()}}
    provenance = read_json(path) if config.resume_from_checkpoint else None
    if provenance is not None:
        for name, before in provenance["arguments"].items():
            now = json.loads(json.dumps(arguments.get(name), default=str))
            if now != before and not name.startswith(MAY_DIFFER):
                logger.warning(f"This run is resumed with --{name} {now}; it was begun with {before}.")
        provenance.setdefault("resumed", []).append(list(argv))
    else:
        provenance = {
            "argv": list(argv),
            **provenance_of(config.device, config.world_size),
            "arguments": arguments,
        }
    write_whole(path, json.dumps(provenance, indent=2, default=str) + "\n")


def find_checkpoint(args: ABRConfig) -> str | None:
    """Return the checkpoint that `resume_from_checkpoint` names; `true` is the last complete one in the output
    directory, and `auto` is the same if there is one. What is no directory is looked for on the Hub, and downloaded
    into the output directory.

    Raises:
        ValueError: There is no such checkpoint, or the run cannot go on from it.
    """
    if str(args.resume_from_checkpoint).lower() == "auto":
        found = agreed(lambda: newest_or_none(str(args.output_dir)), args)
        args.resume_from_checkpoint = "true" if found else None
        return found or None
    wanted = args.resume_from_checkpoint
    if not wanted:
        return None
    if str(wanted).lower() == "true":
        return agreed(lambda: newest_checkpoint(str(args.output_dir)), args)
    if not Path(wanted).exists():
        return agreed(lambda: fetch_checkpoint(str(wanted), Path(str(args.output_dir))), args)
    return agreed(lambda: sound_checkpoint(str(wanted)), args)


def newest_or_none(output_dir: str) -> str:
    """Return the last complete checkpoint in an output directory; an empty text if there is none, with a warning of
    those that are damaged.
    """
    try:
        return newest_checkpoint(output_dir)
    except UnfitCheckpoint as error:
        if any(Path(output_dir).glob(f"{CHECKPOINT_PREFIX}*")):
            logger.warning(f"{str(error).replace('true', 'auto', 1)} The run begins anew.")
        return ""


def set_aside_later_checkpoints(args: ABRConfig, checkpoint: str) -> None:
    """Rename the checkpoints after this one to `abandoned-...`: a run that goes back must not be resumed from them."""
    if args.process_index == 0 and Path(checkpoint).resolve().parent == Path(str(args.output_dir)).resolve():
        for later in Path(checkpoint).parent.glob(f"{CHECKPOINT_PREFIX}*"):
            if step_of(later) > step_of(Path(checkpoint)):
                aside = unused(later.with_name(f"abandoned-{later.name}"))
                logger.warning(f"Going back to {checkpoint}: {later} is renamed to {aside.name}.")
                later.rename(aside)
