"""List the defaults of a run that differ from those of the scripts of transformers or TRL, which users may expect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from enum import Enum
from typing import Any

from transformers import TrainingArguments

from ..records.commands import arguments_in
from ..records.flags import flags_file_in, given_flags, read_flags_file
from ..training.config import ABRConfig

THEIRS = {"use_lora": False, "skip_outliers": "none", "max_seq_length": 128}
"""Behaviour of their scripts for our own flags, in addition to the defaults of `TrainingArguments`."""


def describe_defaults(command: Sequence[str], args: TrainingArguments, others: Sequence[Any]) -> list[str]:
    """Return a line about the defaults of this run that differ from those of their scripts.

    Args:
        command: The command in the form that runs record.
        others: Dataclasses of arguments, without those of the trainer.

    Returns:
        An empty list if there are none, or if nothing is trained.
    """
    if not args.do_train:
        return []
    stock: Any = next(kind for kind in type(args).__mro__ if not issubclass(kind, ABRConfig))
    theirs = THEIRS | {field.name: field.default for field in fields(stock)}
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
    scripts = "transformers' scripts" if stock is TrainingArguments else "TRL's script"
    return [f"defaults here (in {scripts}): {', '.join(told)}"] if told else []


def _names_given(command: Sequence[str]) -> set[str]:
    """Return the flags in a command and in its file of flags, without their dashes."""
    path, _ = flags_file_in(arguments_in(command))
    in_file = [] if path is None else read_flags_file(path)
    return {name[2:] for name in (*given_flags(in_file), *given_flags(command))}


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, Enum):
        return str(value.value)
    return f"{value:g}" if isinstance(value, float) else str(value)
