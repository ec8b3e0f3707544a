"""Which defaults of a run are not those of transformers' example scripts: people expect these, and should be told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from enum import Enum
from itertools import takewhile
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..records.flags import given_flags, is_flags_file, read_flags_file

THEIRS = {"use_lora": False, "skip_outliers": "none", "max_seq_length": 128}
"""What their scripts do where ours have a flag, beside the defaults of `TrainingArguments`."""


def describe_defaults(command: Sequence[str], args: TrainingArguments, others: Sequence[Any]) -> list[str]:
    """Return a line on the defaults that make this run another than the same flags would make with their scripts.

    Args:
        command: The command line, whatever stands before the flags included.
        others: Dataclasses of arguments beside those of the trainer.

    Returns:
        Nothing if there are none, or nothing is trained.
    """
    if not args.do_train:
        return []
    theirs = THEIRS | {field.name: field.default for field in fields(TrainingArguments)}
    ours = {field.name: field.default for field in fields(args)}
    values = {name: getattr(each, name) for name in theirs for each in (args, *others) if hasattr(each, name)}
    given = _names_given(command)
    told = [
        f"--{name} {_shown(value)} ({_shown(theirs[name])})"
        for name, value in values.items()
        if (name in THEIRS or ours[name] != theirs[name])
        and not {name, f"no_{name}"} & given
        and _shown(value) != _shown(theirs[name])
    ]
    return [f"defaults here (in transformers' scripts): {', '.join(told)}"] if told else []


def _names_given(command: Sequence[str]) -> set[str]:
    """Return the flags that stand in a command or in its file of flags, without their dashes."""
    words = list(takewhile(lambda word: not word.startswith("--"), command))
    in_file = [flag for word in words if is_flags_file(word) for flag in read_flags_file(Path(word))]
    return {name[2:] for name in (*given_flags(in_file), *given_flags(command))}


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, Enum):
        return str(value.value)
    return f"{value:g}" if isinstance(value, float) else str(value)
