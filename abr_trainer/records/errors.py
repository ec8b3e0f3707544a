"""Errors that are for the user: one line, no traceback."""

from __future__ import annotations

import contextlib
import difflib
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

Named = TypeVar("Named")


class BadRow(ValueError):
    """Data cannot be trained on; the message says where they are, and what is wrong."""

    def __str__(self) -> str:
        # A worker of a loader puts its traceback, which ends with the message, where the message was.
        return super().__str__().rpartition(f"{type(self).__name__}: ")[2].strip()


class MissingPackage(ImportError):
    """A package is not installed that only some of our commands need; the message says how to install it."""


def one_line(error: BaseException, width: int = 300) -> str:
    """Return the message of an error on one line, cut at `width` characters; its kind if it has none."""
    return textwrap.shorten(str(error).strip() or type(error).__name__, width, placeholder=" ...")


def find_named(kind: str, name: str, known: Mapping[str, Named]) -> Named:
    """Return what goes by a name.

    Args:
        kind: What it is the name of, for the message.

    Raises:
        ValueError: Nothing does; the message says what may have been meant.
    """
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"Unknown {kind} {name!r}.{hint} Choose from: {', '.join(known)}.")
    return known[name]


def refuse_below(arguments: object, least: Mapping[str, float]) -> None:
    """Refuse flags that are given and below the least that they can be.

    Raises:
        ValueError: One of them is.
    """
    for flag, value in least.items():
        given = getattr(arguments, flag)
        if given is not None and given < value:
            raise ValueError(f"--{flag} must be at least {value}, got {given}.")


def refuse_missing_files(arguments: object, *flags: str) -> None:
    """Refuse flags that name a file which is not there, or a directory.

    Raises:
        ValueError: One of them does.
    """
    for flag in flags:
        path = getattr(arguments, flag)
        if path is None or Path(path).is_file():
            continue
        if not Path(path).is_dir():
            raise ValueError(f"--{flag} {path} does not exist.")
        hint = " Give a directory of data as --dataset_name." if hasattr(arguments, "dataset_name") else ""
        raise ValueError(f"--{flag} {path} is a directory, and must be a file.{hint}")


def refuse_missing_directory(arguments: object, flag: str) -> None:
    """Refuse a flag that names a file to write, in a directory which is not there.

    Raises:
        ValueError: It does.
    """
    path = getattr(arguments, flag)
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise ValueError(f"--{flag} {path}: its directory does not exist.")


@contextlib.contextmanager
def one_line_errors(*kinds: type[Exception], when_interrupted: str = "") -> Iterator[None]:
    """End the program with the message of an exception of these kinds, on one line, instead of a traceback.

    Args:
        when_interrupted: What to do after an interrupt.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        advice = when_interrupted or (
            "--resume_from_checkpoint true goes on from the last checkpoint. If none was saved, "
            "--overwrite_output_dir starts over"
        )
        raise SystemExit(f"interrupted: {advice}") from error
    except BrokenPipeError:  # nobody reads what is printed: no error of the user, see `cli/main.py`
        raise
    except kinds as error:
        raise SystemExit(f"error: {one_line(error, width=sys.maxsize)}") from error
