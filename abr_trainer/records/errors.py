"""Errors for the user: one line, no traceback."""

from __future__ import annotations

import contextlib
import difflib
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

Named = TypeVar("Named")

MOST_OF_A_NAME = 200
"""Characters of a file name in a message."""

WRONG_USAGE = 2
"""Exit status if the command line is wrong, or a file that it names."""


class Failure(RuntimeError):
    """A run or a push has failed, although the command line and its files are right."""


class Refused(SystemExit):
    """The end of a program that could do nothing with its command line or with a file that it names."""


@contextlib.contextmanager
def exit_statuses() -> Iterator[None]:
    """End the program with status 2 if it was `Refused`, and 1 if it has failed, after the message of the error.

    Python's own status is 1 for both.
    """
    try:
        yield
    except Refused as refused:
        print(refused, file=sys.stderr)
        raise SystemExit(WRONG_USAGE) from None


class BadRow(ValueError):
    """A row that cannot be used; the message says which row, and what is wrong."""

    def __str__(self) -> str:
        # A worker of a data loader replaces the message by its traceback, which ends with the message.
        return super().__str__().rpartition(f"{type(self).__name__}: ")[2].strip()


class MissingPackage(ImportError):
    """An optional package is not installed; the message says how to install it."""


def one_line(error: BaseException, width: int = 300) -> str:
    """Return the message of an error on one line, cut at `width` characters; its class name if it has none.

    >>> one_line(FileNotFoundError(2, "No such file or directory", "notes.txt"))
    'notes.txt: No such file or directory.'
    """
    text = str(error)
    if isinstance(error, OSError) and error.errno and error.strerror and error.filename:
        name = str(error.filename)
        text = f"{name if len(name) <= MOST_OF_A_NAME else f'{name[:MOST_OF_A_NAME]}...'}: {error.strerror}."
    return textwrap.shorten(text.strip() or type(error).__name__, width, placeholder=" ...")


def find_named(kind: str, name: str, known: Mapping[str, Named]) -> Named:
    """Return the entry of `known` with this name.

    Args:
        kind: The kind of thing, for the message.

    Raises:
        ValueError: There is none; the message suggests a similar name.
    """
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"Unknown {kind} {name!r}.{hint} Choose from: {', '.join(known)}.")
    return known[name]


def refuse_below(arguments: object, least: Mapping[str, float]) -> None:
    """Refuse flags below their least value.

    Raises:
        ValueError: One of them is.
    """
    for flag, value in least.items():
        given = getattr(arguments, flag)
        if given is not None and not given >= value:  # NaN is not
            raise ValueError(f"--{flag} must be at least {value}, got {given}.")


def refuse_missing_files(arguments: object, *flags: str) -> None:
    """Refuse flags whose file does not exist or is a directory.

    Raises:
        ValueError: There is such a flag.
    """
    for flag in flags:
        path = getattr(arguments, flag)
        if path is None or Path(path).is_file():
            continue
        if not Path(path).is_dir():
            raise ValueError(f"--{flag} {path} does not exist.")
        hint = " Give a directory of data as --dataset_name." if hasattr(arguments, "dataset_name") else ""
        raise ValueError(f"--{flag} {path} is a directory, but must be a file.{hint}")


def refuse_missing_directory(arguments: object, flag: str) -> None:
    """Refuse a flag for an output file whose directory does not exist.

    Raises:
        ValueError: It does not exist.
    """
    path = getattr(arguments, flag)
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise ValueError(f"--{flag} {path}: its directory does not exist.")


@contextlib.contextmanager
def one_line_errors(*kinds: type[Exception], when_interrupted: str = "") -> Iterator[None]:
    """End the program with the message of an exception of these kinds, on one line, instead of a traceback.

    Args:
        when_interrupted: Advice after an interrupt.

    Raises:
        SystemExit: There was one. It is `Refused` unless the error is a `Failure` or an interrupt.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        advice = when_interrupted or (
            "--resume_from_checkpoint true continues from the last checkpoint. If none was saved, "
            "--overwrite_output_dir starts again"
        )
        raise SystemExit(f"interrupted: {advice}") from error
    except BrokenPipeError:  # the reader of the output is gone, which `cli/main.py` handles
        raise
    except kinds as error:
        ends = SystemExit if isinstance(error, Failure) else Refused
        raise ends(f"error: {one_line(error, width=sys.maxsize)}") from error
