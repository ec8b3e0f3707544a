"""Adaptive Batch Repetition for the Hugging Face Trainer.

The names below are imported on first use, so that `abr_trainer.schedulers` costs neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .records.lazy import on_first_use

__version__ = "0.1.0"

_HOMES = {
    "ABRConfig": "training.config",
    "ABRMixin": "training.trainer",
    "ABRTrainer": "training.trainer",
    "BatchTimes": "schedulers",
    "ClassicOutlierSkip": "schedulers",
    "ComputeLedger": "training.ledger",
    "ConstantScheduler": "schedulers",
    "Observation": "schedulers",
    "Outcome": "schedulers",
    "PerplexityCallback": "training.tracking",
    "RepeatScheduler": "schedulers",
    "RobustOutlierSkip": "schedulers",
    "SampleCallback": "training.samples",
    "ThresholdScheduler": "schedulers",
    "UniformScheduler": "schedulers",
    "get_repeat_scheduler": "schedulers",
}

__all__ = ["__version__", *sorted(_HOMES)]

if TYPE_CHECKING:
    from .schedulers import BatchTimes as BatchTimes
    from .schedulers import ClassicOutlierSkip as ClassicOutlierSkip
    from .schedulers import ConstantScheduler as ConstantScheduler
    from .schedulers import Observation as Observation
    from .schedulers import Outcome as Outcome
    from .schedulers import RepeatScheduler as RepeatScheduler
    from .schedulers import RobustOutlierSkip as RobustOutlierSkip
    from .schedulers import ThresholdScheduler as ThresholdScheduler
    from .schedulers import UniformScheduler as UniformScheduler
    from .schedulers import get_repeat_scheduler as get_repeat_scheduler
    from .training.config import ABRConfig as ABRConfig
    from .training.ledger import ComputeLedger as ComputeLedger
    from .training.samples import SampleCallback as SampleCallback
    from .training.tracking import PerplexityCallback as PerplexityCallback
    from .training.trainer import ABRMixin as ABRMixin
    from .training.trainer import ABRTrainer as ABRTrainer

__getattr__, __dir__ = on_first_use(__name__, _HOMES)
