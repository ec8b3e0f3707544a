"""Commands of `abr` in the form that runs record and in a form to paste."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

PROGRAM = "abr"

PACKAGE = "abr_trainer"
"""The module that launchers start, because they cannot start `abr`."""


def command(verb: str, arguments: Sequence[str]) -> list[str]:
    """Return the words of a command in the form that runs record."""
    return [PROGRAM, verb, *arguments]


def commands_in(provenance: Mapping[str, Any]) -> list[list[str]]:
    """Return the command of a run, and those that resumed it; none of a run from Python."""
    resumed = [each for each in provenance.get("resumed", ()) if isinstance(each, list)]  # beside it: other rules
    return [provenance["argv"], *resumed] if "argv" in provenance else []


def arguments_in(recorded: Sequence[str]) -> list[str]:
    """Return the arguments of a recorded command: the words after `abr VERB`, or after the script in old records.

    >>> arguments_in(["abr", "train", "--bf16"]), arguments_in(["run_clm_abr.py", "--bf16"])
    (['--bf16'], ['--bf16'])
    """
    return list(recorded[2:] if _is_ours(recorded) else recorded[1:])


def pasted(recorded: Sequence[str], launcher: str = "") -> str:
    """Return a recorded command as a line to paste. Old records contain a script, which is started with `python`.

    Args:
        launcher: Launcher of the run, e.g. `accelerate launch`; empty for none.

    >>> pasted(["abr", "train", "--seed", "1"])
    'abr train --seed 1'
    >>> pasted(["abr", "train", "--seed", "1"], "accelerate launch --num_processes 8")
    'accelerate launch --num_processes 8 -m abr_trainer train --seed 1'
    >>> pasted(["run_clm_abr.py", "--seed", "1"])
    'python run_clm_abr.py --seed 1'
    """
    if not _is_ours(recorded):
        return shlex.join([*(shlex.split(launcher) or ["python"]), *recorded])
    if launcher:
        return shlex.join([*as_module(launcher, PACKAGE), *recorded[1:]])
    return shlex.join(recorded)


def as_module(launcher: str, module: str) -> list[str]:
    """Return the words of a launcher that starts a module.

    >>> as_module("torchrun --nproc_per_node 2", "run_clm_abr")
    ['torchrun', '--nproc_per_node', '2', '-m', 'run_clm_abr']
    """
    words = shlex.split(launcher)
    return [*words, "--module" if "deepspeed" in words[0] else "-m", module]


def _is_ours(recorded: Sequence[str]) -> bool:
    return bool(recorded) and recorded[0] == PROGRAM
