"""Errors that are for the user: one line, no traceback."""

from __future__ import annotations

import contextlib
import sys
import textwrap
from collections.abc import Iterator


def one_line(error: BaseException, width: int = 300) -> str:
    """Return the message of an error on one line, cut at `width` characters; its kind if it has none."""
    return textwrap.shorten(str(error).strip() or type(error).__name__, width, placeholder=" ...")


@contextlib.contextmanager
def one_line_errors(*kinds: type[Exception], when_interrupted: str = "") -> Iterator[None]:
    """End the program with the message of an exception of these kinds, on one line, instead of a traceback.

    Args:
        when_interrupted: What to do after an interrupt.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        advice = when_interrupted or "--resume_from_checkpoint true goes on from the last checkpoint"
        raise SystemExit(f"interrupted: {advice}") from error
    except kinds as error:
        raise SystemExit(f"error: {one_line(error, width=sys.maxsize)}") from error
