"""A pytest plugin: run tests that were written for `transformers.Trainer` with `ABRTrainer` in its place.

PYTHONPATH=tests python -m pytest -p as_trainer CHECKOUT_OF_TRANSFORMERS/tests/trainer/test_trainer*.py

With `AS_TRAINER=active` its rule trains on each batch once, and so all that repetition needs is at work. Without,
nothing of it is.
"""

from __future__ import annotations

import os
import sys


def pytest_configure(config):
    import transformers.testing_utils  # puts a module of its own into sys.modules
    import transformers.trainer

    from abr_trainer import ABRTrainer, ConstantScheduler

    class Active(ABRTrainer):
        def __init__(self, *args, repeat_scheduler=None, **kwargs):
            super().__init__(*args, repeat_scheduler=repeat_scheduler or ConstantScheduler(), **kwargs)

    stands_in = Active if os.environ.get("AS_TRAINER") == "active" else ABRTrainer
    transformers.trainer.Trainer = stands_in
    vars(sys.modules["transformers"])["Trainer"] = stands_in
