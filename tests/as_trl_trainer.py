"""A pytest plugin: run tests that were written for TRL's trainers with repeats mixed into them.

PYTHONPATH=tests python -m pytest -p as_trl_trainer CHECKOUT_OF_TRL/tests/test_sft_trainer.py

Each trainer gets a rule that trains on each batch once: our engine does all the work, and the results must be TRL's.
"""

from __future__ import annotations

import functools
import sys


def pytest_configure(config):
    import trl

    from abr_trainer import ABRMixin, ConstantScheduler

    for name in ("SFTTrainer", "DPOTrainer", "KTOTrainer", "RewardTrainer"):
        theirs = getattr(trl, name)

        class Mixed(ABRMixin, theirs):
            # wraps: some read the signature of a trainer
            @functools.wraps(theirs.__init__)
            def __init__(self, *args, **kwargs):
                super().__init__(*args, repeat_scheduler=ConstantScheduler(), **kwargs)

        Mixed.__name__ = Mixed.__qualname__ = name
        vars(sys.modules["trl"])[name] = Mixed
        vars(sys.modules[theirs.__module__])[name] = Mixed
