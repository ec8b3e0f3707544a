"""What a rule says at the end of a run in which it did nothing, or the same to nearly every batch."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Outcome

NEARLY_ALL = 0.9
"""Share of the batches."""

FEWEST = 10
"""Batches from which it means something that a rule did the same to all of them."""


def usual_updates(outcomes: Sequence[Outcome]) -> tuple[int, int] | None:
    """Return how many updates nearly every batch got, and how many batches these are; None if they differ, or are few.

    What is replayed later does not count.
    """
    if len(outcomes) < FEWEST:
        return None
    ((repeats, batches),) = Counter(outcome.repeats for outcome in outcomes).most_common(1)
    return (repeats, batches) if batches >= NEARLY_ALL * len(outcomes) else None


def has_repeated(outcomes: Sequence[Outcome]) -> bool:
    return any(outcome.repeats > 1 or outcome.replayed for outcome in outcomes)


def median_loss(outcomes: Sequence[Outcome]) -> float:
    return statistics.median(outcome.observation.loss for outcome in outcomes)


def repeated_none(name: str, outcomes: Sequence[Outcome]) -> str:
    """Return the beginning of a sentence.

    >>> repeated_none("abr", [])
    'abr repeated none of 0 batches'
    """
    return f"{name} repeated none of {counted(len(outcomes), 'batch', 'batches')}"


def made(name: str, repeats: int, batches: int, of: int) -> str:
    """Return the beginning of a sentence.

    >>> made("abr", 2, 97, 100), made("abr", 1, 100, 100)
    ('abr made 2 updates on each of 97 of 100 batches', 'abr made 1 update on each of 100 batches')
    """
    share = counted(of, "batch", "batches") if batches == of else f"{batches:,} of {of:,} batches"
    return f"{name} made {counted(repeats, 'update', 'updates')} on each of {share}"


def counted(number: int, one: str, several: str) -> str:
    return f"{number:,} {one if number == 1 else several}"


def in_warm_up(name: str, outcomes: Sequence[Outcome], losses: int) -> str | None:
    """Return what to say if a run was over before a rule had seen the losses that it needs."""
    if len(outcomes) > losses:
        return None
    needs = f"it first has to see {counted(losses, 'batch', 'batches')}"
    return f"{repeated_none(name, outcomes)}: {needs}, and the run had no more. Train on more batches."


def forbidden(name: str, max_repeats: int) -> str | None:
    """Return what to say of a rule that is not allowed to repeat."""
    return f"{name} cannot repeat any batch, because --max_repeats is 1. Raise it." if max_repeats == 1 else None


def parameters(**values: Any) -> str:
    """Return the flag that gives these parameters to a rule.

    >>> print(parameters(window=99))
    --repeat_scheduler_kwargs '{"window": 99}'
    """
    return f"--repeat_scheduler_kwargs '{json.dumps(values)}'"


def remark_on_any(name: str, outcomes: Sequence[Outcome]) -> str | None:
    """Return what to say of a rule of which nothing is known: only if it did the same to every batch."""
    usual = usual_updates(outcomes)
    if usual is None or usual[1] < len(outcomes) or any(outcome.replayed for outcome in outcomes):
        return None
    return f"{made(name, *usual, len(outcomes))}. `abr why` shows what it weighed."
