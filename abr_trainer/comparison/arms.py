"""The alternatives of a comparison: a rule or a prompt, and flags for the run."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..records.flags import given_flags
from ..schedulers import SCHEDULERS, FollowScheduler, find_repeat_scheduler, get_repeat_scheduler
from ..schedulers.registry import why_unread


@dataclass(frozen=True)
class Arm:
    """One of the alternatives to compare.

    Attributes:
        name: As typed; used in tables and plots.
        rule: Value of `--repeat_scheduler`; empty to use the flags that all runs share.
        parameters: Parameters of the rule, as JSON; empty for none.
        flags: Other arguments that it adds to the command line.
    """

    name: str
    rule: str = ""
    parameters: str = ""
    flags: tuple[str, ...] = ()

    @property
    def arguments(self) -> list[str]:
        rule = ["--repeat_scheduler", self.rule] if self.rule else []
        parameters = ["--repeat_scheduler_kwargs", self.parameters] if self.parameters else []
        return [*rule, *parameters, *self.flags]

    @property
    def folder(self) -> str:
        """A name for its directory. Texts get a digest, so that different texts have different directories."""
        safe = re.sub(r"[^\w.=-]+", "-", self.name).strip("-")
        if self.rule or re.fullmatch(r"\w{1,40}", self.name):
            return safe
        return f"{safe[:40].strip('.-')}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}".lstrip("-")

    @property
    def fingerprint(self) -> str:
        """A digest of the file with the user's own rule, or of the trace that it follows; empty for other rules."""
        file: str | Path | None = None
        if self.rule == "follow" and self.parameters:
            file = FollowScheduler(**json.loads(self.parameters)).path
        elif self.rule and self.rule not in SCHEDULERS:
            file = inspect.getsourcefile(find_repeat_scheduler(self.rule))
        return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""

    @property
    def decides(self) -> bool:
        """Whether its rule uses the loss of a batch to decide how often to train on it."""
        return self.rule not in ("", "baseline", "fixed", "random")

    def reads(self, flag: str, shared: Sequence[str] = ()) -> bool:
        """Tell whether a run of this arm has a use for a flag, given without dashes.

        Args:
            shared: Flags that all runs get.
        """
        given = given_flags([*shared, *self.arguments])
        return why_unread(flag, {name[2:]: values[-1] for name, values in given.items() if values}) is None

    def leaves_open(self, flag: str, shared: Sequence[str] = ()) -> bool:
        """Tell whether a flag of the run, given without dashes, has an effect on this arm.

        Args:
            shared: Flags that all runs get.
        """
        own = json.loads(self.parameters or "{}")
        if flag in own or f"--{flag}" in given_flags(self.flags):
            return False
        return self.reads(flag, shared) and not (self.rule == "fixed" and flag == "max_repeats" and "repeats" in own)

    def controls(self, mean: float, states_most: bool) -> list[Arm]:
        """Return two arms with this mean number of repeats and the same flags: one even, one random.

        Args:
            states_most: Set `max_repeats` even if it has its default value.
        """
        pairs = zip(self.flags[::2], self.flags[1::2], strict=True)
        settings = "".join(f",{flag[2:]}={value}" for flag, value in pairs)
        most = max(5, math.ceil(mean))
        at_random = f"random:mean_repeats={mean:g}" + f",max_repeats={most}" * (states_most or most > 5)
        return [parse_arm(f"fixed:{mean:g}{settings}"), parse_arm(at_random + settings)]


def parse_arm(text: str) -> Arm:
    """Parse `name`, `name:value`, `name:parameter=value,...` or `module:Class:parameter=value,...`.

    A value without a name is for the rule's first parameter. A parameter that the rule does not have is a flag of the
    run, without its dashes.

    Raises:
        ValueError: There is no such rule, or it does not accept the value.

    >>> parse_arm("abr:loss_threshold=2.0,skip_outliers=none").arguments[2:]
    ['--repeat_scheduler_kwargs', '{"loss_threshold": 2.0}', '--skip_outliers', 'none']
    """
    pieces = text.split(":")
    is_own = len(pieces) > 1 and pieces[0] not in SCHEDULERS and pieces[1].isidentifier()
    rule, settings = ":".join(pieces[: 1 + is_own]), ":".join(pieces[1 + is_own :])
    takes = [] if rule == "baseline" else list(inspect.signature(find_repeat_scheduler(rule)).parameters)
    parameters: dict[str, Any] = {}
    flags: list[str] = []
    for setting in filter(None, settings.split(",")):
        key, has_key, value = setting.partition("=")
        if not has_key:
            if not takes:
                raise ValueError(f"--schedulers {text}: {rule} has no parameters, so {setting} cannot be one.")
            key, value = takes[0], setting
        if key in takes:
            parameters[key] = _as_json(value)
        elif close := difflib.get_close_matches(key, takes, n=1, cutoff=0.8):
            raise ValueError(f"--schedulers {text}: {rule} has no parameter {key}. Did you mean {close[0]}?")
        else:
            flags += [f"--{key}", value]
    if parameters:
        get_repeat_scheduler(rule, **parameters)
    return Arm(text, rule, json.dumps(parameters) if parameters else "", tuple(flags))


def prompt_arm(text: str) -> Arm:
    """Return the arm that puts this prompt before each row: a name that `abr classify` knows, or any text.

    Raises:
        ValueError: The text is blank.

    >>> prompt_arm("none").folder, prompt_arm("Same meaning?").folder, prompt_arm("Same meaning!").folder
    ('none', 'Same-meaning-1ae089a4', 'Same-meaning-3ce8dbcf')
    """
    if not text.strip():
        raise ValueError("--prompts contains an empty prompt. Write none for no prompt.")
    return Arm(text, flags=("--prompt", text))


def quoted(name: str) -> str:
    """Put a name of several words into quotation marks, for use in a sentence.

    >>> print(quoted("none"), quoted("Same meaning?"))
    none "Same meaning?"
    """
    return f'"{name}"' if re.search(r"\s", name) else name


def _as_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
