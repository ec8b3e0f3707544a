"""From a command line or a file of flags to arguments."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from .errors import one_line


def parse_arguments(argument_classes: Any, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Parse a command line into these dataclasses, with `HfArgumentParser`.

    The first argument may be a `.yaml`, `.yml` or `.json` file of flags without their dashes; flags after it win.

    Raises:
        ValueError: A flag is unknown or has a bad value.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(argument_classes)
    parser.error = _raise_value_error  # type: ignore[method-assign]
    known = {option: action for action in parser._actions for option in action.option_strings}
    if argv and Path(argv[0]).suffix in (".yaml", ".yml", ".json"):
        argv = [*_flags_from_file(Path(argv[0]), known), *argv[1:]]
    for flag in (argument.partition("=")[0] for argument in argv if argument.startswith("--")):
        if flag not in known:
            close = difflib.get_close_matches(flag, known, n=1)
            raise ValueError(f"Unknown flag {flag}." + (f" Did you mean {close[0]}?" if close else " See --help."))
    return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)


def _raise_value_error(message: str) -> NoReturn:
    raise ValueError(message)


def _flags_from_file(path: Path, known: dict[str, argparse.Action]) -> list[str]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of flags to values.")
    flags = []
    for name, value in values.items():
        if isinstance(value, bool) and getattr(known.get(f"--{name}"), "type", None) is not string_to_bool:
            value = "yes" if value else "no"  # YAML reads `save_strategy: no` as false
        if isinstance(value, dict):
            flags += [f"--{name}", json.dumps(value)]
        elif value is not None:
            flags += [f"--{name}", *(str(item) for item in (value if isinstance(value, list) else [value]))]
    return flags
