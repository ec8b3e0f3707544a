"""Names of the files of runs and comparisons, and functions to read them without torch and transformers."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from .shapes import ANY, Each, Shape, misfit

PROVENANCE = "run.json"
FINISHED = "finished"
"""Where `run.json` of a run from Python holds what it has spent and which model it has kept; None until its end."""

RESULTS = "all_results.json"
TRAINER_STATE = "trainer_state.json"
COMPARISON = "comparison.json"
CHECKPOINT_PREFIX = "checkpoint-"

ABR_STATE_NAME = "abr_state.json"
ABR_STATE_KEYS = {"ledger", "repeat_scheduler", "skips_in_a_row", "batches_in_epoch", "log"}

CHECKSUMS_NAME = "abr_checksums.json"
"""Sizes and checksums of the other files of a checkpoint, written last."""

CHECKED_PART = 1 << 26
"""Bytes of a file for each of its checksums."""

REPLACED_PREFIX = "_replaced-"
"""Of a checkpoint that is saved anew for the same step, until that is done."""

LOCK_NAME = "_lock"
"""The process that uses a directory. `Trainer` does not push this file, because its name begins with `_`."""

PUSH_PREFIX = "_push"
"""Of files that say where to push, and of folders with what is pushed."""

TRACE_NAME = "abr_trace.jsonl"
HISTORY_NAME = "perplexity_history.json"

SUMMARY_NAME = "abr_summary.json"

TASK_NAME = "task.json"
"""The task of a classifier: the flags that its predictions depend on."""

QUANT_CONFIG_NAME = "quant_config.json"
CONFIGS = ("config.json", QUANT_CONFIG_NAME, "adapter_config.json")
"""Files that describe the model of a run."""

PREDICTIONS_NAME = "{split}_predictions.jsonl"

ROW_LOSSES_NAME = "_row_losses.npz"
"""The last loss of each row of the training set: `loss`, `visits` and `step`, by index."""

RANKED_NAME = "_ranked_rows.jsonl"
"""Text and source of the rows with the highest and the lowest losses."""

SKIPPED_NAME = "_skipped_batches.jsonl"
DROPPED_NAME = "_dropped_rows.jsonl"
ROW_TRACE_NAME = "_row_trace.jsonl"
SAMPLES_NAME = "_samples.jsonl"
REPORT_FOLDER = "_report"
"""These contain text of the training set. `Trainer` pushes no file of the output directory that begins with `_`."""

ANYTHING: Shape = Each(ANY)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file atomically: if the process is killed, the old content stays."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that replaces another one at the end, atomically: until then, the old content stays."""
    replacement = path.with_name(f"{path.name}.tmp")
    with replacement.open("wb") as file:
        yield file
    replacement.replace(path)


class Damaged(ValueError):
    """A file that a run wrote, and that was changed since; the message says which file, where, and what is wrong."""


def read_json(path: Path, shape: Shape = None) -> Any:
    """Return the content of a JSON file, or None if it is missing or incomplete.

    Args:
        shape: What it must look like.

    Raises:
        Damaged: It looks otherwise.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if shape is not None and (wrong := misfit(value, shape)):
        raise Damaged(f"{path} is damaged: {wrong}.")
    return value


def read_lines(path: str | os.PathLike[str], shape: Shape = ANYTHING) -> Iterator[dict[str, Any]]:
    """Yield the objects in the lines of a trace. Stop before a last line that a killed run did not finish.

    Args:
        shape: What each of them must look like.

    Raises:
        Damaged: A line does not.
    """
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                value = json.loads(line)
                wrong = misfit(value, shape)
            except (ValueError, RecursionError):
                wrong = "it is no JSON object"
            if wrong:
                raise Damaged(f"Line {number} of {path} is damaged: {wrong}.")
            yield value


def sound_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects in the lines of a trace as `read_lines` does, without lines that a broken disk has damaged."""
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with contextlib.suppress(ValueError):
                batch = json.loads(line)
                if line.endswith("\n") and isinstance(batch, dict) and "step" in batch:
                    yield batch


def updates_of(batch: dict[str, Any]) -> int:
    """Return the number of updates in a line of a trace, including those on replayed batches."""
    return int(batch["repeats"]) + sum(earlier["loss"] is not None for earlier in batch.get("replayed", ()))


def cut_lines(path: Path, step: int) -> int:
    """Remove the batches after `step` from a trace, atomically, and return the number of batches left.

    Lines that are damaged are removed, too.
    """
    kept = [batch for batch in sound_lines(path) if batch["step"] <= step] if step and path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(batch) + "\n" for batch in kept))
    return len(kept)


def is_unused(directory: Path) -> bool:
    """Tell whether a directory does not exist, or contains no more than a run leaves that is killed at its start."""
    left = {LOCK_NAME, f"{PROVENANCE}.tmp"}
    return not directory.exists() or all(
        path.name in left or path.name.startswith(PUSH_PREFIX) for path in directory.iterdir()
    )


def unused(path: Path) -> Path:
    """Return this path, or the first with a number after it that is not in use."""
    names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(2))
    return path if not path.exists() else next(name for name in names if not name.exists())


# ---- Checkpoints ----


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """Return the newest checkpoint that a run can resume from, or None.

    A killed run, a full disk or an interrupted copy can leave a newer checkpoint that is damaged.
    """
    return next((str(checkpoint) for checkpoint in newest_first(output_dir) if is_complete(checkpoint)), None)


def judged(output_dir: str | os.PathLike[str]) -> Iterator[tuple[Path, str | None]]:
    """Yield the checkpoints in a directory, the newest first, and what is wrong with each after reading all of it."""
    return ((checkpoint, flaw_in(checkpoint)) for checkpoint in newest_first(output_dir))


def last_state(output_dir: str | os.PathLike[str]) -> str | None:
    """Return the newest checkpoint whose `trainer_state.json` can be read, which is enough for a report; or None."""
    return next((str(checkpoint) for checkpoint in newest_first(output_dir) if has_state(checkpoint)), None)


def newest_first(output_dir: str | os.PathLike[str]) -> list[Path]:
    """Return the checkpoints in a directory. One that was being replaced comes after the one that replaces it."""
    run = Path(output_dir)
    found = [*run.glob(f"{CHECKPOINT_PREFIX}*"), *run.glob(f"{REPLACED_PREFIX}{CHECKPOINT_PREFIX}*")]
    return sorted(found, key=lambda path: (step_of(path), path.name.startswith(CHECKPOINT_PREFIX)), reverse=True)


def step_of(checkpoint: Path) -> int:
    """Return the number of batches in the name of a checkpoint, or -1 if there is none."""
    step = checkpoint.name.rpartition("-")[2]
    return int(step) if step.isdigit() else -1


def is_complete(checkpoint: Path) -> bool:
    """Tell whether a run can resume exactly from a checkpoint."""
    return flaw_of(checkpoint) is None


def flaw_of(checkpoint: Path) -> str | None:
    """Return which file of a checkpoint is missing or damaged; None if a run can resume from it.

    Reads only the beginning and the end of each file, so that large checkpoints do not take longer.
    """
    if not checkpoint.is_dir():
        return "it is not a directory"
    if not (checkpoint / TRAINER_STATE).exists():
        return f"{TRAINER_STATE} is missing"
    if not has_state(checkpoint):
        return f"{TRAINER_STATE} is damaged"
    state = checkpoint / ABR_STATE_NAME  # stock Trainer writes none
    if state.exists() and not ABR_STATE_KEYS.issubset(read_json(state) or ()):
        return f"{ABR_STATE_NAME} is damaged"
    for pattern, is_whole in WHOLE.items():
        for path in sorted(checkpoint.glob(pattern)):
            if not is_whole(path):
                return f"{path.relative_to(checkpoint)} is {'damaged' if path.stat().st_size else 'empty'}"
    return _missing(checkpoint) or _other_size(checkpoint)


def flaw_in(checkpoint: Path) -> str | None:
    """Return what `flaw_of` does, after reading every byte: also a file that was changed in its middle."""
    if flaw := flaw_of(checkpoint):
        return flaw
    saved = _saved_files(checkpoint)
    for name, described in saved.items():
        if _checksums(*_version_of(checkpoint / name)) != described["crc32"]:
            return f"{name} was changed after it was saved"
    for path in files_to_check(checkpoint) if not saved else ():
        if zipfile.is_zipfile(path) and not _has_sound_archive(*_version_of(path)):
            return f"{path.relative_to(checkpoint)} is damaged"
    return None


def write_checksums(checkpoint: Path) -> None:
    """Write down size and checksums of each file that a resumed run reads."""
    saved: dict[str, dict[str, Any]] = {}
    for path in files_to_check(checkpoint):
        version = _version_of(path)
        saved[path.relative_to(checkpoint).as_posix()] = {"bytes": version[1], "crc32": _checksums(*version)}
    write_whole(checkpoint / CHECKSUMS_NAME, json.dumps({"format": 1, "files": saved}, indent=1) + "\n")


def files_to_check(checkpoint: Path) -> list[Path]:
    """Return the files of a checkpoint that a resumed run reads."""
    patterns = (*WHOLE, TRAINER_STATE, ABR_STATE_NAME, TASK_NAME, "latest", "*/**/*")
    return sorted({path for pattern in patterns for path in checkpoint.glob(pattern) if path.is_file()})


def _saved_files(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Return size and checksums by file, as they were saved; nothing for a checkpoint without them."""
    saved = read_json(checkpoint / CHECKSUMS_NAME) or {}
    files: dict[str, dict[str, Any]] = saved.get("files", {}) if isinstance(saved, dict) else {}
    return files


def _other_size(checkpoint: Path) -> str | None:
    """Return which file is missing, or of another size than it was saved with."""
    path = checkpoint / CHECKSUMS_NAME
    if path.exists() and not _is_whole_json(path):
        return f"{CHECKSUMS_NAME} is {'damaged' if path.stat().st_size else 'empty'}"
    for name, saved in _saved_files(checkpoint).items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if (checkpoint / name).stat().st_size != saved["bytes"]:
            return f"{name} was changed after it was saved"
    return None


def _version_of(path: Path) -> tuple[Path, int, int, int]:
    """Return what tells whether a file was changed since it was read: arguments of the two functions below."""
    found = path.stat()
    return path.absolute(), found.st_size, found.st_mtime_ns, found.st_ino


@functools.lru_cache(maxsize=1024)
def _checksums(path: Path, size: int, changed: int, inode: int) -> list[str]:
    """Return the checksum of each part of a file, made in several threads."""

    def checksum(begin: int) -> str:
        with path.open("rb") as file:
            file.seek(begin)
            return f"{zlib.crc32(file.read(CHECKED_PART)):08x}"

    begins = range(0, size, CHECKED_PART)
    if len(begins) < 2:
        return [checksum(begin) for begin in begins]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(checksum, begins))


@functools.lru_cache(maxsize=1024)
def _has_sound_archive(path: Path, size: int, changed: int, inode: int) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError, zlib.error):
        return False


def set_aside(checkpoint: Path) -> None:
    """Rename a checkpoint that is about to be saved anew, so that there is one at any time."""
    aside = checkpoint.with_name(f"{REPLACED_PREFIX}{checkpoint.name}")
    if checkpoint.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)


def settle_replaced(output_dir: str | os.PathLike[str]) -> None:
    """Remove the checkpoints that have been replaced; take back those that a killed run had begun to replace."""
    for aside in Path(output_dir).glob(f"{REPLACED_PREFIX}{CHECKPOINT_PREFIX}*"):
        checkpoint = aside.with_name(aside.name.removeprefix(REPLACED_PREFIX))
        if not is_complete(checkpoint) and is_complete(aside):
            shutil.rmtree(checkpoint, ignore_errors=True)
            aside.rename(checkpoint)
        shutil.rmtree(aside, ignore_errors=True)


def has_state(checkpoint: Path) -> bool:
    """Tell whether a checkpoint was completely written: the state of the trainer is written last."""
    state = read_json(checkpoint / TRAINER_STATE)
    return isinstance(state, dict) and "global_step" in state


def _missing(checkpoint: Path) -> str | None:
    """Return which file a checkpoint lacks, given its other files."""

    def has(*patterns: str) -> bool:
        return any(next(checkpoint.glob(pattern), None) for pattern in patterns)

    for index in sorted(checkpoint.glob("*.index.json")):
        for shard in sorted(set(read_json(index).get("weight_map", {}).values())):
            if not has(shard):
                return f"{shard} is missing"
    weights = "adapter_model.safetensors" if has("adapter_config.json") else "model.safetensors"
    needed = {
        "rng_state.pth": ("rng_state*.pth",),
        "optimizer.pt": ("optimizer*", "rank*-optimizer.pt"),
        "scheduler.pt": ("scheduler.pt",),
        weights: ("adapter_model.*", "*/adapter_model.*")
        if has("adapter_config.json")
        else ("model*.safetensors", "pytorch_model*", "*/adapter_model.*"),
    }
    if has("global_step*"):  # DeepSpeed stores the other files there
        needed = {"rng_state.pth": needed["rng_state.pth"]}
    missing = [name for name, patterns in needed.items() if not has(*patterns)]
    if {"rng_state.pth", "optimizer.pt"} <= set(missing):
        return "optimizer.pt and rng_state.pth are missing, as with --save_only_model"
    return f"{missing[0]} is missing" if missing else None


def _is_whole_json(path: Path) -> bool:
    return isinstance(read_json(path), dict)


def _is_whole_archive(path: Path) -> bool:
    """Tell whether a file of `torch.save` is complete: a zip file, whose directory is at its end, or an old pickle."""
    with path.open("rb") as file:
        begins = file.read(2)
    return zipfile.is_zipfile(path) if begins == b"PK" else begins.startswith(b"\x80")


def _is_whole_safetensors(path: Path) -> bool:
    return tensors_in(path) is not None


def tensors_in(path: Path) -> dict[str, dict[str, Any]] | None:
    """Return the header of a `.safetensors` file, by tensor; None if the file is incomplete."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 + length:
            return None
        try:
            header: dict[str, dict[str, Any]] = json.loads(file.read(length))
        except ValueError:
            return None
    header.pop("__metadata__", None)
    ends = [each["data_offsets"][1] for each in header.values()]
    return header if size == 8 + length + max(ends, default=0) else None


WHOLE = {
    "config.json": _is_whole_json,
    "adapter_config.json": _is_whole_json,
    "*.index.json": _is_whole_json,
    "*.safetensors": _is_whole_safetensors,
    "*/adapter_model.safetensors": _is_whole_safetensors,
    "optimizer*.pt": _is_whole_archive,
    "optimizer.bin": _is_whole_archive,
    "scheduler.pt": _is_whole_archive,
    "scaler.pt": _is_whole_archive,
    "rng_state*.pth": _is_whole_archive,
    ROW_LOSSES_NAME: _is_whole_archive,
    "pytorch_model*.bin": _is_whole_archive,
    "adapter_model.bin": _is_whole_archive,
    "global_step*/*.pt": _is_whole_archive,
}
"""Files that a resumed run reads, and functions that tell whether they are complete."""
