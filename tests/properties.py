"""How many examples `hypothesis` draws: a few in the gate, always the same, and as many as one likes beside it."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, settings

EXAMPLES = "ABR_EXAMPLES"
"""Environment variable: draw so many examples of each property, at random. `--hypothesis-seed` sets the seed."""


def examples(quick: int) -> Any:
    """Return settings that draw `quick` examples, always the same ones, unless the environment asks for more.

    Nothing is stored: a fault that was found becomes a plain test.
    """
    asked = os.environ.get(EXAMPLES)
    return settings(
        max_examples=int(asked) if asked else quick,
        derandomize=not asked,
        database=None,
        deadline=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
