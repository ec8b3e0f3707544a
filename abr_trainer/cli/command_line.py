"""Parse command lines into dataclasses."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import HfArgumentParser

from ..records.flags import expand_flags_file
from .bars import take_bars_away
from .parsing import prepared, refuse_not_finite, refuse_rest


def parse_arguments(
    argument_classes: Any, argv: Sequence[str] | None = None, defaults: Mapping[str, Any] | None = None
) -> tuple[Any, ...]:
    """Parse a command line into these dataclasses, with `HfArgumentParser`.

    The first argument may be a `.yaml`, `.yml` or `.json` file of flags without their dashes. Flags after it override
    those in the file.

    Args:
        defaults: Defaults that replace those of the dataclasses, by flag without dashes.

    Raises:
        ValueError: A flag is unknown or has a bad value.
    """
    take_bars_away()  # here, because all commands that load a model come by
    argv = expand_flags_file(sys.argv[1:] if argv is None else argv)
    parser = build_parser(argument_classes)
    parser.set_defaults(**(defaults or {}))
    *parsed, rest = parser.parse_args_into_dataclasses(
        prepared(parser, argv), look_for_args_file=False, return_remaining_strings=True
    )
    refuse_rest(rest)
    refuse_not_finite(*parsed)
    return tuple(parsed)


def build_parser(argument_classes: Any) -> HfArgumentParser:
    """Return the parser for these dataclasses. The help of `--no_X` says that it is the opposite of `--X`."""
    parser = HfArgumentParser(argument_classes)
    for action in parser._actions:
        if action.const is False and action.nargs == 0:
            action.help = f"The opposite of --{action.dest}."
    return parser
