"""Functions for all command line parsers. Needs neither torch nor transformers."""

from __future__ import annotations

import math
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Sequence
from typing import Any, NoReturn

from .upstream import FALSE, TRUE, accepted


def prepared(parser: ArgumentParser, argv: Sequence[str]) -> list[str]:
    """Make a parser raise `ValueError` instead of ending the program, and return the arguments for it.

    Raises:
        ValueError: A flag is unknown, or has the value `--`, which argparse would take away.
    """
    if lost := next((word for word in argv if word.startswith("--") and word.endswith("=--")), None):
        raise ValueError(f"{lost.partition('=')[0]} cannot have the value --.")
    parser.error = _raise_value_error  # type: ignore[method-assign]
    return accepted(argv, names_in(parser))


def names_in(parser: ArgumentParser) -> list[str]:
    """Return all flags of a parser."""
    return [name for action in parser._actions for name in action.option_strings]


def refuse_rest(rest: Sequence[str]) -> None:
    """Refuse arguments that a parser did not use.

    Raises:
        ValueError: There are any.
    """
    if rest:
        raise ValueError(f"{rest[0]} does not belong to any flag. Flags begin with --.")


def refuse_not_finite(*arguments: Any) -> None:
    """Refuse NaN and infinity as the value of a flag: no flag means anything by them, and training would break.

    Raises:
        ValueError: A flag has such a value.
    """
    for name, value in ((name, value) for each in arguments for name, value in vars(each).items()):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name} {value} is not a finite number.")


def wanted_splits(args: Any) -> list[str]:
    """Return the splits that a run needs.

    Raises:
        ValueError: It has nothing to do.
    """
    work = {"train": args.do_train, "validation": args.do_eval, "test": args.do_predict}
    splits = [split for split, wanted in work.items() if wanted]
    if not splits:
        raise ValueError("Nothing to do. Give --do_train, --do_eval or --do_predict.")
    return splits


def boolean(text: str) -> bool:
    """Parse true or false in a command line or a file of flags."""
    if text.lower() in (*TRUE, *FALSE):
        return text.lower() in TRUE
    raise ArgumentTypeError(f"{text!r} is neither true nor false")


SWITCH: dict[str, Any] = {"type": boolean, "nargs": "?", "const": True, "default": False}
"""Options of argparse for a boolean flag, alone or with true or false after it, as in files of flags."""


def _raise_value_error(message: str) -> NoReturn:
    raise ValueError(message)


def seeds_of(given: Sequence[int]) -> list[int]:
    """Return the seeds that `--seeds` asks for: one number is a count, several are the seeds.

    >>> seeds_of([2]), seeds_of([7, 9])
    ([0, 1], [7, 9])
    """
    return list(range(given[0])) if len(given) == 1 else list(given)
