"""How much of a run is a wait for its data, and what is said of that."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from torch.utils.data import IterableDataset
from transformers.utils import logging

from ..report.text import share
from ..report.times import share_waited

logger = logging.get_logger(__name__)

MUCH = 0.1
"""Share of the time in batches above which the wait for data is said."""

FEWEST_BATCHES, FEWEST_SECONDS = 30, 5.0
"""So many must have been counted before anything is said of them."""

MOST_WORKERS = 8
"""That a run without any is advised to take."""


@dataclass
class Waiting:
    """The time in batches, and of this the wait for their data.

    The first batch of each call of `train` is left out: what is slow there is the start.

    Attributes:
        is_told: Whether it was said that the run waits.
    """

    batches: int = 0
    seconds: float = 0.0
    waiting_seconds: float = 0.0
    is_told: bool = False
    _has_begun: bool = field(default=False, init=False, repr=False, compare=False)

    def observe(self, seconds: float, waiting: float) -> None:
        """Count a finished batch."""
        if self._has_begun:
            self.batches += 1
            self.seconds += seconds
            self.waiting_seconds += min(waiting, seconds)  # another rank may have waited longer
        self._has_begun = True

    def exceeds(self, limit: float) -> bool:
        """Tell whether the wait is more than a share of the time, in a run that has lasted long enough to know."""
        is_known = self.batches >= FEWEST_BATCHES and self.seconds >= FEWEST_SECONDS
        return is_known and share_waited(self.waiting_seconds, self.seconds) > limit

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, for a checkpoint."""
        state = asdict(self)
        del state["_has_begun"]
        return state


def say_if_waiting(trainer: Any) -> None:
    """Warn, once in a run, if it waits for its data for more than a tenth of its time."""
    waiting: Waiting = trainer._run.waiting
    if waiting.is_told or not waiting.exceeds(MUCH):
        return
    waiting.is_told = True
    if trainer.is_world_process_zero():
        logger.warning(f"{said_of(waiting)} {advice(trainer)}")


def said_of(waiting: Waiting) -> str:
    """Say how much of the time was a wait.

    >>> print(said_of(Waiting(batches=1200, seconds=60.0, waiting_seconds=21.0)))
    35.0 % of the training time was spent waiting for data: 21.0 of 60.0 s, over 1,200 batches.
    """
    return (
        f"{share(waiting.waiting_seconds, waiting.seconds)} of the training time was spent waiting for data: "
        f"{waiting.waiting_seconds:,.1f} of {waiting.seconds:,.1f} s, over {waiting.batches:,} batches."
    )


def advice(trainer: Any) -> str:
    """Say what helps a run that waits for its data."""
    workers, most = trainer.args.dataloader_num_workers, _most_workers(trainer.train_dataset)
    waiting: Waiting = trainer._run.waiting
    if workers:
        ahead = f"--dataloader_prefetch_factor above {trainer.args.dataloader_prefetch_factor or 2}"
        more = f"--dataloader_num_workers above {workers}"
        loading = f"To load faster: {more}, or {ahead}." if workers < most else f"To load further ahead: {ahead}."
    else:
        # As many as are needed to load a batch while the model trains on another one.
        needed = math.ceil(waiting.waiting_seconds / max(waiting.seconds - waiting.waiting_seconds, 1e-9))
        found = max(1, min(needed, most, MOST_WORKERS))
        loading = f"To load while the model trains: --dataloader_num_workers {found}."
    if "times" in trainer.repeat_scheduler.wants:  # the rule makes use of the wait already
        return loading
    return f"{loading} To repeat a batch until the next one is there: --repeat_scheduler wait."


def _most_workers(dataset: Any) -> float:
    """Return how many workers can share the loading. A stream has to be split for that: each worker of one that is
    not would read all of it, and rows would come more than once.
    """
    if not isinstance(dataset, IterableDataset):
        return math.inf
    try:
        return max(1, int(dataset.num_shards))  # type: ignore[attr-defined]
    except Exception:  # the code of users; training goes on without that advice
        return 1
