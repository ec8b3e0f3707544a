"""A pytest plugin: run tests that were written for `transformers.Trainer` with `ABRTrainer` in its place.

PYTHONPATH=tests python -m pytest -p as_trainer CHECKOUT_OF_TRANSFORMERS/tests/trainer/test_trainer*.py
"""

from __future__ import annotations

import sys


def pytest_configure(config):
    import transformers.testing_utils  # puts a module of its own into sys.modules
    import transformers.trainer

    from abr_trainer import ABRTrainer

    transformers.trainer.Trainer = ABRTrainer
    vars(sys.modules["transformers"])["Trainer"] = ABRTrainer
