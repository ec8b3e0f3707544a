"""Rules by name, and the rule that the flags of a run describe."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ..records.errors import find_named
from .base import RepeatScheduler
from .constant import ConstantScheduler
from .deferred import ReplayScheduler
from .easy import EasySkip
from .following import FollowScheduler
from .gain import GainScheduler
from .gradients import GradNormSkip
from .learnable import LearnableScheduler
from .outliers import ClassicOutlierSkip, OutlierSkip, RobustOutlierSkip
from .policy import KLScheduler
from .robust_rows import RobustRows
from .rows import RowRule
from .tail import RepeatUntil
from .threshold import ThresholdScheduler
from .uniform import UniformScheduler
from .waiting import WaitScheduler
from .window import WindowScheduler

FIXED_REPEATS = 2
"""How many updates 'fixed' makes on a batch where nothing else is said."""

RULE_FIELDS: dict[str, Any] = {
    "repeat_scheduler": "baseline",
    "repeat_scheduler_kwargs": None,
    "loss_threshold": None,
    "max_repeats": None,
    "repeat_until": None,
    "trace": None,
    "skip_outliers": "robust",
    "outlier_sigmas": None,
    "outlier_window": None,
    "skip_grad_norm": None,
    "skip_rows": "none",
    "row_sigmas": None,
    "row_window": None,
    "seed": 42,
}
"""The fields of `ABRConfig` that make a rule, or a rule for rows, with their defaults."""

PARAMETERS = {
    "repeat_scheduler": ("loss_threshold", "max_repeats", "repeat_until", "trace"),
    "skip_outliers": ("outlier_sigmas", "outlier_window"),
    "skip_rows": ("row_sigmas", "row_window"),
}
"""Flags that name a rule, and the flags that are parameters of some of these rules."""

SCHEDULERS: dict[str, type[RepeatScheduler]] = {
    "abr": ThresholdScheduler,
    "baseline": ConstantScheduler,
    "easy": EasySkip,
    "fixed": ConstantScheduler,
    "follow": FollowScheduler,
    "gain": GainScheduler,
    "kl": KLScheduler,
    "learnable": LearnableScheduler,
    "random": UniformScheduler,
    "replay": ReplayScheduler,
    "wait": WaitScheduler,
    "window": WindowScheduler,
}

ROW_RULES: dict[str, type[RowRule]] = {"robust": RobustRows}

OUTLIER_RULES: dict[str, type[OutlierSkip]] = {"classic": ClassicOutlierSkip, "robust": RobustOutlierSkip}

NEVER_REPEAT = ("baseline", "easy")
"""Rules that make no more than one update on a batch, and never come back to it."""


def get_repeat_scheduler(name: str, **kwargs: Any) -> RepeatScheduler:
    """Build a scheduler by registered name or as `package.module:ClassName`, as `--repeat_scheduler` does.

    Raises:
        ValueError: `name` is unknown, cannot be imported or is no scheduler, or does not take one of `kwargs`.
    """
    scheduler_class = find_repeat_scheduler(name)
    if dataclasses.is_dataclass(scheduler_class):
        known = [field.name for field in dataclasses.fields(scheduler_class) if field.init]
        if unknown := sorted(set(kwargs) - set(known)):
            takes = ", ".join(known) or "none"
            raise ValueError(f"Repeat scheduler {name!r} has no parameter {unknown[0]!r}. It takes: {takes}.")
    try:
        return scheduler_class(**kwargs)
    except TypeError as error:
        raise ValueError(f"Repeat scheduler {name!r} cannot be built from {kwargs}: {error}.") from error


def find_repeat_scheduler(name: str) -> type[RepeatScheduler]:
    """Return the class that goes by a registered name or by `package.module:ClassName`."""
    if ":" in name:
        found: type[RepeatScheduler] = import_class(name, RepeatScheduler)
        return found
    return find_named("repeat scheduler", name, SCHEDULERS)


def reads_flag(name: str, flag: str) -> bool:
    """Tell whether a repeat scheduler has a use for a flag that is a parameter of rules, such as `max_repeats`."""
    if flag == "repeat_until":
        return name not in (*NEVER_REPEAT, "follow")
    if name in ("baseline", "fixed"):
        return (name, flag) == ("fixed", "max_repeats")
    return flag in inspect.signature(find_repeat_scheduler(name)).parameters


def why_unread(flag: str, settings: Mapping[str, Any]) -> str | None:
    """Return which rule does not read a flag, and which rules would; None if it is read.

    Args:
        flag: Without its dashes.
        settings: Values by the names of `RULE_FIELDS`; other names are ignored, missing ones have their defaults.

    >>> why_unread("loss_threshold", {"repeat_scheduler": "fixed"})
    'means nothing to --repeat_scheduler fixed: leave it out. It is for abr, learnable.'
    >>> why_unread("loss_threshold", {"repeat_scheduler": "abr"})

    Raises:
        ValueError: There is no such rule.
    """
    of = next((setting for setting, flags in PARAMETERS.items() if flag in flags), None)
    if of is None:
        return None
    name, (reads, known) = settings.get(of, RULE_FIELDS[of]), READERS[of]
    if reads(name, flag):
        return None
    readers = ", ".join(known for known in sorted(known) if reads(known, flag))
    return f"means nothing to --{of} {name}: leave it out. It is for {readers}."


def refuse_unread(settings: Mapping[str, Any]) -> None:
    """Refuse flags that were given, and that no rule of the run reads.

    Args:
        settings: As for `why_unread`. A flag was given if its value is not its default.

    Raises:
        ValueError: There is one.
    """
    for flag in (flag for flags in PARAMETERS.values() for flag in flags):
        value = settings.get(flag)
        if value != RULE_FIELDS[flag] and (why := why_unread(flag, settings)):
            raise ValueError(f"--{flag} {value} {why}")


def get_outlier_rule(name: str, inner: RepeatScheduler, **kwargs: Any) -> OutlierSkip:
    """Wrap `inner` in an outlier rule by name, as `--skip_outliers` does."""
    return find_named("outlier rule", name, OUTLIER_RULES)(inner, **kwargs)


def build_row_rule(settings: Mapping[str, Any]) -> RowRule | None:
    """Return the rule for rows that these flags describe; None if no rows are to be dropped.

    Args:
        settings: Values by the names of `RULE_FIELDS`; other names are ignored, missing ones have their defaults.

    Raises:
        ValueError: The name is unknown, or a parameter out of range.
    """
    name = settings.get("skip_rows", RULE_FIELDS["skip_rows"])
    if name == "none":
        return None
    rule_class = _find_row_rule(name)
    takes = inspect.signature(rule_class).parameters
    given = {"sigmas": settings.get("row_sigmas"), "window": settings.get("row_window")}
    return rule_class(**{name: value for name, value in given.items() if name in takes and value is not None})


def _find_row_rule(name: str) -> type[RowRule]:
    found: type[RowRule] = import_class(name, RowRule) if ":" in name else find_named("row rule", name, ROW_RULES)
    return found


def _row_rule_reads(name: str, flag: str) -> bool:
    return name != "none" and flag.removeprefix("row_") in inspect.signature(_find_row_rule(name)).parameters


def import_class(path: str, base: type[Any]) -> Any:
    """Return the class at `module:ClassName`, also if the module is in the current directory.

    Raises:
        ValueError: There is none, or it is not a subclass of `base`.
    """
    what = "row rule" if base is RowRule else "repeat scheduler"
    module_name, _, class_name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # `abr` finds modules that are installed only
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # it is somebody else's code
        raise ValueError(f"Cannot import {what} {path!r}: {_why_not(module_name, class_name, base, error)}") from error
    if not hasattr(module, class_name):
        rules = _rules_in(module, base, class_name)
        raise ValueError(f"Cannot import {what} {path!r}: {module_name} has no {class_name!r}. {rules}")
    found = getattr(module, class_name)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{path!r} is not a {base.__name__} subclass. {_rules_in(module, base, class_name)}")
    return found


def _why_not(module_name: str, class_name: str, base: type[Any], error: Exception) -> str:
    """Return why a module cannot be imported, and what to do."""
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing is None or not f"{module_name}.".startswith(f"{missing}."):
        frame = traceback.extract_tb(error.__traceback__)[-1]
        is_known = isinstance(error, ImportError | SyntaxError | ValueError)
        place = "" if is_known else f" ({Path(frame.filename).name}, line {frame.lineno})"
        return f"{type(error).__name__}: {error}{place}."
    if module_name.endswith(".py"):
        return f"Give a module, not a file: {module_name.removesuffix('.py').replace('/', '.')}:{class_name}."
    known: Iterable[str] = ROW_RULES if base is RowRule else SCHEDULERS
    close = difflib.get_close_matches(module_name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"There is no module {missing!r} in {os.getcwd()} or among the installed packages.{hint}"


def _rules_in(module: ModuleType, base: type[Any], class_name: str) -> str:
    """Return which rules a module has: its own, or else those that it imports."""
    rules = {
        name: kind
        for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, base) and not inspect.isabstract(kind)
    }
    own = [name for name, kind in rules.items() if kind.__module__ == module.__name__] or list(rules)
    if not own:
        return f"It has no {base.__name__} subclass."
    close = difflib.get_close_matches(class_name, own, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"Its {base.__name__} subclasses: {', '.join(own)}.{hint}"


def build_rule(settings: Mapping[str, Any]) -> RepeatScheduler:
    """Return the rule that these flags describe, outlier skipping included.

    Args:
        settings: Values by the names of `RULE_FIELDS`; other names are ignored, missing ones have their defaults.

    Raises:
        ValueError: A name is unknown, or a parameter out of range.
    """
    given = {name: settings.get(name, default) for name, default in RULE_FIELDS.items()}
    rule = get_repeat_scheduler(given["repeat_scheduler"], **_parameters(given))
    if isinstance(rule, FollowScheduler):
        _refuse_judging_again(given)
        return rule
    if given["repeat_until"] is not None:
        rule = RepeatUntil(rule, until=given["repeat_until"])
    if given["skip_grad_norm"] is not None:
        rule = GradNormSkip(rule, sigmas=given["skip_grad_norm"])
    if given["skip_outliers"] == "none":
        return rule
    told = {name: given[f"outlier_{name}"] for name in ("sigmas", "window")}
    told = {name: value for name, value in told.items() if value is not None}
    return get_outlier_rule(given["skip_outliers"], rule, **told)


def _refuse_judging_again(given: Mapping[str, Any]) -> None:
    """Refuse flags that would judge batches of which a trace says what to do.

    `--skip_outliers robust` is the default, and cannot be told from it.

    Raises:
        ValueError: There is one.
    """
    judging = ("skip_outliers", "outlier_sigmas", "outlier_window", "skip_grad_norm")
    for flag in judging:
        if given[flag] not in (RULE_FIELDS[flag], "none"):
            raise ValueError(
                f"--{flag} {given[flag]} means nothing to --repeat_scheduler follow: leave it out. The trace says "
                "which batches are skipped."
            )


def _parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags that the named rule takes, under the explicit `repeat_scheduler_kwargs`."""
    name = given["repeat_scheduler"]
    flags: dict[str, Any] = {flag: given[flag] for flag in ("loss_threshold", "max_repeats", "trace")}
    if name == "fixed":
        flags["repeats"] = given["max_repeats"] or FIXED_REPEATS
    rule_class = find_repeat_scheduler(name)
    if rule_class in SCHEDULERS.values() or given["seed"] != RULE_FIELDS["seed"]:
        flags["seed"] = given["seed"]  # a rule of one's own keeps its own default
    takes = inspect.signature(rule_class).parameters
    explicit = given["repeat_scheduler_kwargs"] or {}
    if isinstance(explicit, str):
        explicit = _parse_json_object("--repeat_scheduler_kwargs", explicit)
    return {name: value for name, value in flags.items() if name in takes and value is not None} | explicit


def _parse_json_object(flag: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{flag} is not valid JSON: {error}. Got: {text}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{flag} must be a JSON object such as '{{\"max_repeats\": 3}}', got: {text}")
    return value


READERS: dict[str, tuple[Callable[[str, str], bool], Iterable[str]]] = {
    "repeat_scheduler": (reads_flag, SCHEDULERS),
    "skip_outliers": (lambda name, flag: name != "none", OUTLIER_RULES),
    "skip_rows": (_row_rule_reads, ROW_RULES),
}
"""How to tell whether a rule reads a flag, and the rules there are."""
