"""Show help, and report mistyped flags, unknown rules and missing files, before importing torch and transformers."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..comparison.arms import parse_arm
from ..data.tasks import BY_NAME, find_prompt
from ..records.errors import WRONG_USAGE, find_named, one_line, refuse_missing_directory, refuse_missing_files
from ..records.flags import complete_flags, complete_prompt_flags, expand_flags_file, given_flags, parse_tuning
from ..schedulers import SCHEDULERS, build_rule
from ..schedulers.registry import refuse_unread
from .help_page import help_page
from .parsing import boolean, names_in, prepared, refuse_not_finite, refuse_rest, seeds_of, wanted_splits
from .upstream import unknown

FLAGS_FILE = Path(__file__).with_name("flags.json")
"""Written by `describe.py`."""

INPUTS = ("train_file", "validation_file", "test_file", "primer_file", "text_file")
"""Flags for a file to read."""

MAY_BE_PATHS = (
    *("model_name_or_path", "adapter_name_or_path", "config_name", "tokenizer_name", "dataset_name", "chat_template"),
)
"""Flags for something on the Hub or on this machine. A name that begins like a path is on this machine."""

OPTIONS = ("action", "choices", "const", "default", "metavar", "nargs", "required", "type")
"""Options of argparse in `flags.json`."""

OF_RUNS = {"compare": "train", "compare-prompts": "classify"}
"""Verbs that start runs, and the verb whose flags they take after `--`."""


def check(verb: str, argv: Sequence[str]) -> None:
    """Show help, or report errors in a command line; else return.

    It uses the same parsers, rules and checks as the command, so it refuses only what the command would refuse. It
    leaves to the command all checks that need a model, the data or the Hub.

    Raises:
        SystemExit: Help was shown, or the command line is wrong (status 2).
    """
    known = json.loads(FLAGS_FILE.read_text(encoding="utf-8"))
    if verb not in known["verbs"]:
        return
    own = list(argv[: argv.index("--")]) if verb in OF_RUNS and "--" in argv else list(argv)
    if not {"--help", "-h", "--help-all"}.isdisjoint(own):
        print(help_page(verb, known, _runs_of(verb, own), whole="--help-all" in own))
        raise SystemExit(0)
    try:
        if verb in OF_RUNS:
            _check_comparison(verb, own, argv[len(own) + 1 :], known)
        else:
            _check_run(verb, own, known)
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error, width=sys.maxsize)}", file=sys.stderr)
        raise SystemExit(WRONG_USAGE) from None


def _runs_of(verb: str, own: Sequence[str]) -> str | None:
    """Return the verb whose flags come after `--`, if any."""
    named = given_flags(own).get("--command", [])
    return named[0] if verb == "compare" and named[:1] in (["train"], ["sft"]) else OF_RUNS.get(verb)


def _check_run(verb: str, argv: Sequence[str], known: dict[str, Any], is_alone: bool = True) -> None:
    """Check the flags, files and rule of one run.

    Args:
        is_alone: It is no run of a comparison, where some flags are for the rules of other runs.

    Raises:
        ValueError: One of them is wrong.
    """
    parsed = _parse(verb, expand_flags_file(argv), known)
    if parsed is None:
        return
    refuse_not_finite(parsed)
    refuse_missing_files(parsed, *(name for name in INPUTS if hasattr(parsed, name)))
    if hasattr(parsed, "output_file"):
        refuse_missing_directory(parsed, "output_file")
    for name in MAY_BE_PATHS:
        value = getattr(parsed, name, None)
        if value and value.startswith(("/", "./", "../")) and not Path(value).exists():
            raise ValueError(f"--{name} {value} does not exist.")
    if hasattr(parsed, "directory") and not Path(parsed.directory).is_dir():
        raise ValueError(f"{parsed.directory} is not a directory.")
    if getattr(parsed, "task_name", None):
        find_named("--task_name", parsed.task_name.lower(), BY_NAME)
    if hasattr(parsed, "prompt"):
        find_prompt(parsed.prompt)
    if not _is_own(getattr(parsed, "repeat_scheduler", ":")):
        build_rule(vars(parsed))
        if is_alone and not _is_own(parsed.skip_rows):
            refuse_unread(vars(parsed))
    if all(isinstance(getattr(parsed, name, None), bool) for name in ("do_train", "do_eval", "do_predict")):
        wanted_splits(parsed)


def _check_comparison(verb: str, own: Sequence[str], behind: Sequence[str], known: dict[str, Any]) -> None:
    """Check the flags of a comparison, and the flags of its runs.

    Raises:
        ValueError: One of them is wrong.
    """
    own = expand_flags_file(own)
    runs = _runs_of(verb, own) or verb
    args = _parse(verb, own, known)
    rest = expand_flags_file(behind)
    added: list[Sequence[str]] = [[]]
    if args is not None and verb == "compare":
        added += [parse_arm(text).arguments for text in args.schedulers if not _is_own(text)]
        rest = complete_flags(rest, args.match, args.evaluations)
    elif args is not None:
        rest = complete_prompt_flags(rest)
    for name, values in parse_tuning(args.tune if args is not None else []).items():
        added += [[f"--{name}", value] for value in values]
    seeds = [0] if args is None else seeds_of(args.seeds)
    for flags in added:
        each = (tuple(part.replace("{seed}", str(seed)) for part in (*rest, *flags)) for seed in seeds)
        for argv in dict.fromkeys(each):  # most comparisons give the same flags to all seeds
            _check_run(runs, argv, known, is_alone=False)


def _is_own(rule: str) -> bool:
    """Tell whether a rule is the user's own, `package.module:ClassName`, which may import anything."""
    return ":" in rule and rule.partition(":")[0] not in SCHEDULERS


def _parse(verb: str, argv: Sequence[str], known: dict[str, Any]) -> Namespace | None:
    """Parse a command line as its command will, using only `flags.json`.

    Returns:
        None if that is not possible: `flags.json` was written for another version of transformers and there are flags
        that it does not know, or another version of a package whose flags the verb takes is installed.

    Raises:
        ValueError: A flag is unknown or has a bad value.
    """
    described = known["verbs"][verb]
    trainer = known["trainer"] if described["takes_trainer"] else []
    is_current = not trainer or importlib.metadata.version("transformers") == known["transformers"]
    needed = described.get("needs", {})
    if any(_version(package) not in (None, version) for package, version in needed.items()):
        return None
    own = {flag["dest"] for flag in described["flags"]}
    parser = ArgumentParser(add_help=False)
    for flag in described["flags"]:
        _add(parser, flag)
    for flag in trainer:
        if flag["dest"] not in own:
            _add(parser, flag if is_current else _lenient(flag))
    if described["exact"]:
        names = names_in(parser)
        if not is_current and any(each.startswith("--") and each.partition("=")[0] not in names for each in argv):
            return None
        parsed, rest = parser.parse_known_args(prepared(parser, argv))
        refuse_rest(rest)
        return parsed
    return _parse_plain(verb, parser, argv, known)


def _parse_plain(verb: str, parser: ArgumentParser, argv: Sequence[str], known: dict[str, Any]) -> Namespace:
    """Parse a command line of a verb that uses argparse directly, including abbreviated flags."""
    prepared(parser, [word for word in argv if word.endswith("=--")])
    parsed, rest = parser.parse_known_args(list(argv))
    if rest and rest[0].startswith("-"):
        flag = rest[0].partition("=")[0]
        runs = _runs_of(verb, argv) or verb
        of_runs = {name for each in (*known["verbs"][runs]["flags"], *known["trainer"]) for name in each["names"]}
        if runs != verb and flag in of_runs:
            raise ValueError(f"{flag} is a flag of abr {runs}. Put it after --.")
        raise ValueError(unknown(flag, names_in(parser)))
    refuse_rest(rest)
    return parsed


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _lenient(flag: dict[str, Any]) -> dict[str, Any]:
    """Return a flag that takes any value, for a version of transformers whose options are not known."""
    return {"names": flag["names"], "dest": flag["dest"], "nargs": "*", "default": flag.get("default")}


def _add(parser: ArgumentParser, flag: dict[str, Any]) -> None:
    """Add a flag of `flags.json` to a parser."""
    types: dict[str, Any] = {"int": int, "float": float, "bool": boolean}
    taken = ["action", "default"] if flag.get("action", "").startswith("store_") else OPTIONS
    options: dict[str, Any] = {name: flag[name] for name in taken if name in flag}
    options.setdefault("default", None)  # argparse's default for a switch is not None
    if isinstance(options.get("metavar"), list):
        options["metavar"] = tuple(options["metavar"])
    if "type" in options:
        options["type"] = types[flag["type"]]
    if flag["names"]:
        options["dest"] = flag["dest"]
    parser.add_argument(*(flag["names"] or [flag["dest"]]), **options)
