"""What a run needs later, checked before its first batch; and what to say where the disk gets full all the same."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from ..records.errors import one_line
from ..records.files import has_state, last_complete_checkpoint, newest_first
from .config import ABRConfig

logger = logging.get_logger(__name__)

SWITCHES = {"do_sample", "num_beams", "return_dict_in_generate", "use_cache"}
"""Settings of generation that others need: without them, those others are ignored, and refused where it is saved."""


def mend_generation_config(model: Any) -> None:
    """Unset what a model's generation config holds but `generate` ignores: transformers refuses to save such a config.

    Raises:
        ValueError: It cannot be saved for another reason.
    """
    config = getattr(model, "generation_config", None)
    if config is None or not isinstance(model, PreTrainedModel) or not model.can_generate():
        return  # an adapter is saved without it
    unset = []
    while error := _refusal(config):
        named = re.findall(r"`(\w+)`", error) if "GenerationConfig is invalid" in error else []
        ignored = [each for each in named if each not in SWITCHES and getattr(config, each, None) is not None]
        if not ignored:
            raise ValueError(f"The model could not be saved: {error} Mend its generation_config.json.")
        unset.append(f"{ignored[0]} {getattr(config, ignored[0])}")
        setattr(config, ignored[0], None)
    if unset:
        logger.warning(
            f"generation_config.json will be saved without {', '.join(unset)}, which the model ignores as it is: "
            "transformers refuses to save that. To keep sampling settings, set do_sample to true there."
        )


def _refusal(config: Any) -> str | None:
    """Return why a generation config cannot be saved, or None."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            config.save_pretrained(scratch)
        except ValueError as error:
            return one_line(error, width=10_000)
    return None


def check_disk(args: ABRConfig, model: Any) -> None:
    """Refuse an output directory whose disk does not hold one checkpoint, and warn if it does not hold two.

    Raises:
        ValueError: It does not.
    """
    sizes: list[tuple[int, int, bool]] = [
        (getattr(each, "ds_numel", each.numel()), each.element_size(), each.requires_grad)
        for each in model.parameters()
    ]
    is_adapter = not isinstance(model, PreTrainedModel) and any(not trained for _, _, trained in sizes)
    weights = sum(count * size for count, size, trained in sizes if trained or not is_adapter)
    saves = args.save_strategy != "no" or args.save_passes is not None
    checkpoint = weights
    if saves and not args.save_only_model:
        checkpoint += sum(
            count * moments_of(getattr(args.optim, "value", args.optim), size)
            for count, size, trained in sizes
            if trained
        )
    directory = Path(str(args.output_dir)).absolute()
    disk = shutil.disk_usage(next(each for each in (directory, *directory.parents) if each.exists()))
    if not args.should_save or not disk.total:  # another rank writes there, or the file system does not say
        return
    free = disk.free
    if free < checkpoint:
        raise ValueError(
            f"--output_dir {args.output_dir}: its disk has {gigabytes(free)} free, and "
            f"{'a checkpoint' if saves else 'the model'} takes at least {gigabytes(checkpoint)}. Free some, or give "
            "another directory."
        )
    if saves and free < 2 * checkpoint + weights:
        logger.warning(
            f"The disk of {args.output_dir} has {gigabytes(free)} free, and a checkpoint takes at least "
            f"{gigabytes(checkpoint)}. It may get full; --save_total_limit 1 keeps the last one only."
        )


def moments_of(optimizer: str, size: int) -> int:
    """Return the bytes that an optimizer keeps of a parameter of so many bytes, at least.

    >>> moments_of("adamw_torch_fused", 4), moments_of("adamw_bnb_8bit", 4), moments_of("sgd", 4)
    (8, 2, 0)
    >>> moments_of("adamw_torch_4bit", 4), moments_of("paged_adamw_32bit", 4)
    (1, 8)
    """
    if not re.match("(paged_)?adamw", optimizer):
        return 0
    by_bits = {"4bit": 1, "8bit": 2}
    return next((count for bits, count in by_bits.items() if optimizer.endswith(bits)), 2 * size)


def gigabytes(count: int) -> str:
    """Return a number of bytes in words.

    >>> gigabytes(13_500_000_000), gigabytes(2_500_000)
    ('13.5 GB', '0.003 GB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e9:.3f} GB"


@contextlib.contextmanager
def telling_of_a_failing_disk(args: ABRConfig) -> Iterator[None]:
    """End the program with one line if the disk is full, read-only or broken, and remove the checkpoint that was cut.

    Raises:
        SystemExit: The disk failed.
    """
    begun = time.time()
    try:
        yield
    except Exception as error:
        path = Path(str(args.output_dir))
        full, failure = is_full(error, path), failure_of(error, path)
        if not full and failure is None:
            raise
        elsewhere = getattr(error, "filename", None)
        if full and elsewhere and not _is_inside(elsewhere, path):
            raise SystemExit(f"error: the disk of {elsewhere} is full. Free some of it.") from error
        removed = ""
        checkpoint = next(iter(newest_first(path)), None)
        is_cut = checkpoint is not None and not has_state(checkpoint) and checkpoint.stat().st_mtime >= begun
        if args.process_index == 0 and checkpoint is not None and is_cut:
            shutil.rmtree(checkpoint, ignore_errors=True)
            removed = "" if checkpoint.exists() else f" {checkpoint.name}, cut off, is removed."
        what = f"the disk of {path} is full." if full else f"{path} cannot be written to: {failure}."
        newest = last_complete_checkpoint(path)
        go_on = f"--resume_from_checkpoint true goes on from {newest}" if newest else "start again"
        raise SystemExit(f"error: {what}{removed} {'Free some of it' if full else 'Mend that'}; {go_on}.") from error


def is_full(error: BaseException, path: Path) -> bool:
    """Tell whether an error is that of a full disk: each library has its own."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    if re.search(r"No space left on device|Disk quota exceeded|os error 28\b", text):
        return True
    return "inline_container.cc" in text and shutil.disk_usage(path).free < 1 << 20


def failure_of(error: BaseException, path: Path) -> str | None:
    """Return why nothing can be written to a directory any more, if that is what an error says; None if it is not."""
    named = getattr(error, "filename", None)
    if named is not None and not _is_inside(named, path):
        return None
    text = str(error)
    of_rust = re.search(r"\(os error (\d+)\)", text)  # as of safetensors
    number = error.errno if isinstance(error, OSError) else int(of_rust[1]) if of_rust else None
    if number in (errno.EROFS, errno.EIO, errno.EFBIG) or (number in (errno.EACCES, errno.EPERM) and named):
        return os.strerror(number)
    if named is not None and number == errno.ENOENT and not path.exists():
        return "it is not there any more"
    if re.search(rf"File {re.escape(str(path))}\S* cannot be opened|PytorchStreamWriter failed", text):
        return one_line(error)
    return None


def _is_inside(name: Any, path: Path) -> bool:
    return Path(os.fsdecode(name)).absolute().is_relative_to(path.absolute())
