"""Repeat schedulers: pure rules over floats, importable without torch or transformers."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import sys
from typing import Any

from ..records.errors import find_named
from .base import Observation, Outcome, RepeatScheduler, WrappedScheduler
from .constant import ConstantScheduler
from .deferred import ReplayScheduler
from .easy import EasySkip
from .gain import GainScheduler
from .gradients import GradNormSkip
from .learnable import LearnableScheduler
from .outliers import ClassicOutlierSkip, OutlierSkip, RobustOutlierSkip
from .tail import RepeatUntil
from .threshold import ThresholdScheduler
from .uniform import UniformScheduler
from .window import WindowScheduler

__all__ = [
    "OUTLIER_RULES",
    "SCHEDULERS",
    "ClassicOutlierSkip",
    "ConstantScheduler",
    "EasySkip",
    "GainScheduler",
    "GradNormSkip",
    "LearnableScheduler",
    "Observation",
    "Outcome",
    "OutlierSkip",
    "RepeatScheduler",
    "RepeatUntil",
    "ReplayScheduler",
    "RobustOutlierSkip",
    "ThresholdScheduler",
    "UniformScheduler",
    "WindowScheduler",
    "WrappedScheduler",
    "find_repeat_scheduler",
    "get_outlier_rule",
    "get_repeat_scheduler",
    "reads_flag",
]

SCHEDULERS: dict[str, type[RepeatScheduler]] = {
    "abr": ThresholdScheduler,
    "baseline": ConstantScheduler,
    "easy": EasySkip,
    "fixed": ConstantScheduler,
    "gain": GainScheduler,
    "learnable": LearnableScheduler,
    "random": UniformScheduler,
    "replay": ReplayScheduler,
    "window": WindowScheduler,
}

OUTLIER_RULES: dict[str, type[OutlierSkip]] = {"classic": ClassicOutlierSkip, "robust": RobustOutlierSkip}


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
        return _import_scheduler(name)
    return find_named("repeat scheduler", name, SCHEDULERS)


def reads_flag(name: str, flag: str) -> bool:
    """Tell whether a rule has a use for a flag that is a parameter of rules, such as `max_repeats`."""
    if name in ("baseline", "fixed"):
        return (name, flag) == ("fixed", "max_repeats")
    return flag in inspect.signature(find_repeat_scheduler(name)).parameters


def get_outlier_rule(name: str, inner: RepeatScheduler, **kwargs: Any) -> OutlierSkip:
    """Wrap `inner` in an outlier rule by name, as `--skip_outliers` does."""
    return find_named("outlier rule", name, OUTLIER_RULES)(inner, **kwargs)


def _import_scheduler(path: str) -> type[RepeatScheduler]:
    module_name, _, class_name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # `python path/to/script.py` finds modules beside the script only
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"Cannot import repeat scheduler {path!r}: {error}.") from error
    if not (isinstance(found, type) and issubclass(found, RepeatScheduler)):
        raise ValueError(f"{path!r} is not a RepeatScheduler subclass.")
    return found
