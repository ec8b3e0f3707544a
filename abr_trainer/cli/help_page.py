"""Build the pages of `abr VERB --help` and `--help-all`, and of the flags in the documentation, from `flags.json`."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any

INDENT = 2
COLUMN = 34
"""Column of the help texts."""

NARROWEST, WIDEST = 80, 100

SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!\.\.)\.\s+")

Flag = dict[str, Any]


def help_page(verb: str, known: dict[str, Any], runs: str | None, whole: bool) -> str:
    """Return the help page of a verb.

    Args:
        known: The content of `flags.json`.
        runs: The verb whose flags come after `--`, if any.
        whole: Show all flags with their full help, not only the common ones with their first sentence.
    """
    described = known["verbs"][verb]
    width = min(max(shutil.get_terminal_size().columns, NARROWEST), WIDEST)
    inherited = {flag["dest"] for flag in known["trainer"]} - {flag["dest"] for flag in described["flags"]}
    inherited |= set(described.get("of_trl", ()))
    short = {name: text for name, text in known["short"].items() if name in inherited}
    groups = _all_groups(described, known) if whole else _usual_groups(described, known)
    what, _, examples = described["description"].partition("\n\n")
    blocks = [[f"usage: {_usage(verb, described, runs)}"], textwrap.wrap(" ".join(what.split()), width)]
    if examples and (whole or not described["usual"]):
        blocks.append(examples.splitlines())
    for name, flags in groups.items():
        lines = [_lines(flag, width, whole, short.get(flag["dest"])) for flag in flags]
        blocks.append([name, *itertools.chain.from_iterable(lines)])
    return "\n\n".join("\n".join(block) for block in [*blocks, list(_hints(verb, described, runs, whole))] if block)


def _usage(verb: str, described: dict[str, Any], runs: str | None) -> str:
    positional = [flag["dest"].upper() for flag in described["flags"] if not flag["names"]]
    first = "[FILE.yaml] " if described["exact"] or runs else ""
    behind = f" -- [flags of abr {runs}]" if runs else ""
    flags = f"{first}[--flag value ...]{behind}" if len(positional) < len(described["flags"]) else ""
    return " ".join(filter(None, [f"abr {verb}", *positional, flags]))


def _hints(verb: str, described: dict[str, Any], runs: str | None, whole: bool) -> Iterator[str]:
    if described["usual"] and not whole:
        yield f"abr {verb} --help-all shows all flags. FILE.yaml contains flags without their dashes."
    if described["exact"]:
        yield "Boolean flags may be followed by true or false: --bf16, --bf16 true, --use_lora false."
    if runs:
        yield f"abr {runs} --help shows the flags of the runs."


def _flags(described: dict[str, Any], known: dict[str, Any]) -> dict[str, Flag]:
    """Return the flags by the argument that they set; `--no_X` is left out."""
    flags: dict[str, Flag] = {}
    trainer = known["trainer"] if described["takes_trainer"] else []
    for flag in itertools.chain(described["flags"], trainer):
        flags.setdefault(flag["dest"], flag)
    return flags


def _usual_groups(described: dict[str, Any], known: dict[str, Any]) -> dict[str, list[Flag]]:
    flags = _flags(described, known)
    if described["usual"]:
        return {group: [flags[name] for name in names] for group, names in described["usual"].items()}
    return _all_groups(described, known)


def _all_groups(described: dict[str, Any], known: dict[str, Any]) -> dict[str, list[Flag]]:
    groups: dict[str, list[Flag]] = {group: [] for group in described["usual"]}
    for flag in _flags(described, known).values():
        groups.setdefault(flag.get("group", "flags" if flag["names"] else "arguments"), []).append(flag)
    for group, names in described["usual"].items():
        groups[group].sort(key=lambda flag: names.index(flag["dest"]) if flag["dest"] in names else len(names))
    return groups


def _lines(flag: Flag, width: int, whole: bool, short: str | None) -> list[str]:
    """Return the lines of one flag: its name, what it does, its default.

    Args:
        short: Text for the short page instead of the first sentence of its help.
    """
    name = " ".join(filter(None, (flag["names"][0] if flag["names"] else flag["dest"], _value_of(flag))))
    said = re.sub(r"\s+", " ", flag.get("help", "")).strip()
    text = " ".join([said, *_choices(flag, said)]) if whole else _first_sentence(short or said)
    lines = textwrap.wrap(" ".join([text, *_default(flag, said, text)]), width - COLUMN, break_on_hyphens=False)
    left = " " * INDENT + name
    if len(left) > COLUMN - 1:
        return [left, *(" " * COLUMN + line for line in lines)]
    first, *others = lines or [""]
    return [f"{left:{COLUMN}}{first}".rstrip(), *(" " * COLUMN + line for line in others)]


def _value_of(flag: Flag) -> str:
    """Return the placeholder for the value of a flag; empty for a flag that needs no value."""
    if not flag["names"] or flag.get("nargs") == "?" or flag.get("action", "").startswith("store_"):
        return ""
    if "metavar" in flag:
        return " ".join(flag["metavar"]) if isinstance(flag["metavar"], list) else flag["metavar"]
    kinds = {"int": "N", "float": "X", "bool": "true|false"}
    named = {"_file": "FILE", "_dir": "DIR", "_path": "NAME", "_name": "NAME"}
    value = kinds.get(flag.get("type", "")) or next(
        (shown for end, shown in named.items() if flag["dest"].endswith(end)), "VALUE"
    )
    return f"{value} ..." if flag.get("nargs") in ("+", "*") else value


def _choices(flag: Flag, said: str) -> list[str]:
    choices = [str(choice) for choice in flag.get("choices", ())]
    if not choices or all(choice in said for choice in choices):
        return []
    return [f"One of {', '.join(choices)}."]


def _first_sentence(said: str) -> str:
    return SENTENCE_END.split(said, maxsplit=1)[0].rstrip(".")


def _default(flag: Flag, said: str, shown: str) -> list[str]:
    """Return the default in brackets, unless the text already contains it."""
    default = flag.get("default")
    if isinstance(default, bool):
        return ["[on]" if default else "[off]"]
    if default not in (None, "", []):
        listed = default if isinstance(default, list) else [default]
        return [f"[{' '.join(f'{each:g}' if isinstance(each, float) else str(each) for each in listed)}]"]
    if default is None and flag.get("nargs") == "?" and "efault: " not in said:
        return ["[off]"]
    told = re.search(r"[Dd]efault: (.+?)(?:\.(?:\s+[A-Z]|$)|$)", said)
    return [f"[{told[1].partition(',')[0]}]"] if told and told[0] not in shown else []


# ---- The page of the documentation ----

ABOUT_FLAGS = """\
# Flags

This page is written from the flags themselves, by `python -m abr_trainer.cli.describe`. In a terminal,
`abr VERB --help` shows the flags that people use, and `abr VERB --help-all` shows all.

- A file of flags, `.yaml` or `.json`, may come first where the help says `[FILE.yaml]`: `abr train run.yaml --seed 1`.
  It holds the flags without their dashes. A flag on the command line wins.
- In those verbs dashes and underscores in a name are the same, and a flag that is on or off takes `true` or `false`,
  too: `--bf16`, `--bf16 false`.
- In Python, a field of `ABRConfig` has the name of its flag.
"""


def reference_page(known: dict[str, Any]) -> str:
    """Return all flags of all verbs as Markdown.

    Args:
        known: What `flags.json` holds.
    """
    verbs = known["verbs"]
    trainings = [verb for verb, described in verbs.items() if described["takes_trainer"]]
    shared = set.intersection(*({json.dumps(flag) for flag in verbs[verb]["flags"]} for verb in trainings))
    named = _listed([f"`abr {verb}`" for verb in trainings])
    common = [flag for flag in verbs[trainings[0]]["flags"] if json.dumps(flag) in shared]
    parts = [
        ABOUT_FLAGS,
        f"## Flags of all trainings\n\n{named} take these, and [those of Trainer](#flags-of-trainer).\n",
        *_by_group(common, list(verbs[trainings[0]]["usual"])),
    ]
    for verb, described in verbs.items():
        what, _, examples = described["description"].partition("\n\n")
        parts.append(f"## abr {verb}\n\n{_marked(' '.join(what.split()))}\n")
        if examples:
            parts.append(f"```text\n{textwrap.dedent(examples)}\n```\n")
        if verb in trainings:
            parts.append("Beside [the flags of all trainings](#flags-of-all-trainings):\n")
        own = [flag for flag in described["flags"] if json.dumps(flag) not in shared or verb not in trainings]
        parts += _by_group(own, list(described["usual"]))
    parts += [
        "## Flags of Trainer\n\n"
        f"Those of `TrainingArguments` in transformers {known['transformers']}, in its own words. {named} take them. "
        "Where a verb has a flag of the same name, that of the verb holds.\n",
        *_by_group(known["trainer"], []),
    ]
    return "\n".join(parts)


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _by_group(flags: list[Flag], order: list[str]) -> Iterator[str]:
    """Yield a heading for each group of flags, if there is more than one, and the flags as a list of definitions."""
    groups: dict[str, dict[str, Flag]] = {group: {} for group in order}
    for flag in flags:
        groups.setdefault(flag.get("group", ""), {}).setdefault(flag["dest"], flag)  # `--no_X` is told where `--X` is
    groups = {group: found for group, found in groups.items() if found}
    for group, found in groups.items():
        if len(groups) > 1:
            yield f"### {group[:1].upper()}{group[1:]}\n"
        yield from map(_defined, found.values())


def _defined(flag: Flag) -> str:
    """Return a flag, with its value and its other names, and beneath it all that is said of it."""
    first, *others = flag["names"] or [flag["dest"].upper()]
    said = re.sub(r"\s+", " ", flag.get("help", "")).strip()
    text = " ".join([said, *_choices(flag, said)]).strip()
    value = _value_of(flag)
    aliases = [other for other in others if other.replace("-", "_") != first.replace("-", "_")]
    names = [f"`{f'{first} {value}'.strip()}`", *(f"`{alias}`" for alias in aliases)]
    default = "".join(_default(flag, said, text))[1:-1]
    ends = text and not text.endswith((".", "?", "!"))
    told = f"{_marked(text)}{'.' if ends else ''}" + (f" Default: `{default}`." if default else "")
    return f"{', '.join(names)}\n: {told.strip() or 'See `--help-all`.'}\n"


def _marked(text: str) -> str:
    """Return a text of a help as Markdown: names of flags as code, and nothing in it taken for markup."""
    parts = re.split(r"(`[^`]+`|(?<![\w-])--[a-z]\w*)", text)
    parts[::2] = [re.sub(r"([*_<\[\]~|$])", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [part if part.startswith("`") else f"`{part}`" for part in parts[1::2]]
    return "".join(parts)
