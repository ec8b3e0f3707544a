"""From a command line to arguments."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from transformers import HfArgumentParser

from ..records.flags import expand_flags_file


def parse_arguments(
    argument_classes: Any, argv: Sequence[str] | None = None, defaults: Mapping[str, Any] | None = None
) -> tuple[Any, ...]:
    """Parse a command line into these dataclasses, with `HfArgumentParser`.

    The first argument may be a `.yaml`, `.yml` or `.json` file of flags without their dashes; flags after it win.

    Args:
        defaults: Other defaults than those of the dataclasses, by flag without dashes; none that they do not have.

    Raises:
        ValueError: A flag is unknown or has a bad value.
    """
    argv = expand_flags_file(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(argument_classes)
    parser.set_defaults(**(defaults or {}))
    parser.error = _raise_value_error  # type: ignore[method-assign]
    known = [option for action in parser._actions for option in action.option_strings]
    for flag in (argument.partition("=")[0] for argument in argv if argument.startswith("--")):
        if flag not in known:
            close = difflib.get_close_matches(flag, known, n=1)
            raise ValueError(f"Unknown flag {flag}." + (f" Did you mean {close[0]}?" if close else " See --help."))
    return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)


def _raise_value_error(message: str) -> NoReturn:
    raise ValueError(message)
