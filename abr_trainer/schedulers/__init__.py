"""Repeat schedulers: rules on floats alone, importable without torch or transformers."""

from __future__ import annotations

from .base import BatchTimes, Observation, Outcome, PolicyDrift, RepeatScheduler, WrappedScheduler
from .constant import ConstantScheduler
from .deferred import ReplayScheduler
from .easy import EasySkip
from .following import FollowScheduler
from .gain import GainScheduler
from .gradients import GradNormSkip
from .learnable import LearnableScheduler
from .outliers import ClassicOutlierSkip, OutlierSkip, RobustOutlierSkip
from .policy import KLScheduler
from .registry import (
    OUTLIER_RULES,
    ROW_RULES,
    RULE_FIELDS,
    SCHEDULERS,
    build_row_rule,
    build_rule,
    find_repeat_scheduler,
    get_outlier_rule,
    get_repeat_scheduler,
    reads_flag,
)
from .robust_rows import RobustRows
from .rows import Row, RowRule
from .tail import RepeatUntil
from .threshold import ThresholdScheduler
from .uniform import UniformScheduler
from .waiting import WaitScheduler
from .window import WindowScheduler

__all__ = [
    "OUTLIER_RULES",
    "ROW_RULES",
    "RULE_FIELDS",
    "SCHEDULERS",
    "BatchTimes",
    "ClassicOutlierSkip",
    "ConstantScheduler",
    "EasySkip",
    "FollowScheduler",
    "GainScheduler",
    "GradNormSkip",
    "KLScheduler",
    "LearnableScheduler",
    "Observation",
    "Outcome",
    "OutlierSkip",
    "PolicyDrift",
    "RepeatScheduler",
    "RepeatUntil",
    "ReplayScheduler",
    "RobustOutlierSkip",
    "RobustRows",
    "Row",
    "RowRule",
    "ThresholdScheduler",
    "UniformScheduler",
    "WaitScheduler",
    "WindowScheduler",
    "WrappedScheduler",
    "build_row_rule",
    "build_rule",
    "find_repeat_scheduler",
    "get_outlier_rule",
    "get_repeat_scheduler",
    "reads_flag",
]
