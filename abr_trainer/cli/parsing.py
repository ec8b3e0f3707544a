"""What all parsers of command lines share, without torch and transformers."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Sequence
from typing import Any, NoReturn

from .upstream import FALSE, TRUE, accepted

WRONG_USAGE = 2
"""Exit status."""


def prepared(parser: ArgumentParser, argv: Sequence[str]) -> list[str]:
    """Let a parser raise `ValueError` where it would end the program, and return what it is to parse.

    Raises:
        ValueError: A flag is unknown.
    """
    parser.error = _raise_value_error  # type: ignore[method-assign]
    return accepted(argv, names_in(parser))


def names_in(parser: ArgumentParser) -> list[str]:
    """Return all flags that a parser knows."""
    return [name for action in parser._actions for name in action.option_strings]


def refuse_rest(rest: Sequence[str]) -> None:
    """Refuse what a parser has left over.

    Raises:
        ValueError: It has left something over.
    """
    if rest:
        raise ValueError(
            f"{rest[0]} does not belong to a flag: flags begin with --, and those before it are complete."
        )


def wanted_splits(args: Any) -> list[str]:
    """Return the splits that a run needs.

    Raises:
        ValueError: It needs none.
    """
    work = {"train": args.do_train, "validation": args.do_eval, "test": args.do_predict}
    splits = [split for split, wanted in work.items() if wanted]
    if not splits:
        raise ValueError("Nothing to do: give --do_train, --do_eval or --do_predict.")
    return splits


def boolean(text: str) -> bool:
    """Return what a command line, or a file of flags, writes for true or false."""
    if text.lower() in (*TRUE, *FALSE):
        return text.lower() in TRUE
    raise ArgumentTypeError(f"{text!r} is neither true nor false")


SWITCH: dict[str, Any] = {"type": boolean, "nargs": "?", "const": True, "default": False}
"""How argparse takes a flag that is on or off, alone or with true or false behind it, as files of flags have it."""


def _raise_value_error(message: str) -> NoReturn:
    raise ValueError(message)


def seeds_of(given: Sequence[int]) -> list[int]:
    """Return the seeds that `--seeds` asks for: one number is a count, several are the seeds.

    >>> seeds_of([2]), seeds_of([7, 9])
    ([0, 1], [7, 9])
    """
    return list(range(given[0])) if len(given) == 1 else list(given)
