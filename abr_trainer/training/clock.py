"""Where the time of a run goes: waiting for data, generating it, training on it, evaluation and saving."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

from ..schedulers import BatchTimes

UNKNOWN_TIME = math.inf
"""Seconds of a pass before any was measured: no rank has less."""


class Clock:
    """Times of the batch under way, on this rank.

    The passes are timed from decision to decision. A GPU is in step with its host there, because the decision waits
    for a loss. The time between two batches, for logs, evaluation and checkpoints, is left out.
    """

    def __init__(self) -> None:
        self._waited = self._generated = self._worked = self._away = 0.0
        self._decided_at: float | None = None
        self._arrived_at: float | None = None
        self._finished_at: float | None = None
        self._passes = 0
        self._lapped_at = time.perf_counter()
        self.is_generating = False

    @contextlib.contextmanager
    def drawing(self, loader: Iterator[Any], works_on: bool) -> Iterator[Iterator[Any]]:
        """Time the waits for the micro-batches of the next batch: draw them from what this yields.

        Args:
            works_on: Whether the loader has workers, which load while the model trains.
        """
        now = time.perf_counter()
        self._away = 0.0 if self._finished_at is None else now - self._finished_at
        self._worked = now - self._arrived_at if works_on and self._arrived_at is not None else 0.0
        self._generated = 0.0
        timed = _Timed(loader)
        yield timed
        self._waited = timed.seconds
        self._arrived_at = time.perf_counter()

    @contextlib.contextmanager
    def generating(self) -> Iterator[None]:
        """Time what makes a batch, where a trainer generates its data."""
        start = time.perf_counter()
        self.is_generating = True
        try:
            yield
        finally:
            self.is_generating = False
        self._generated += time.perf_counter() - start

    def measured(self) -> tuple[float, ...]:
        """Return the times of this rank at the decision about a batch, so that the greatest of all ranks count."""
        one_pass = UNKNOWN_TIME
        if self._decided_at is not None and self._passes:
            away = self._away + self._waited + self._generated
            one_pass = max(0.0, time.perf_counter() - self._decided_at - away) / self._passes
        return self._waited, self._generated, self._worked, -one_pass

    def agree(self, greatest: list[float]) -> BatchTimes:
        """Return the times of the batch, of what `measured` returned on all ranks; it is decided now."""
        waiting, generating, working, least = greatest
        self._decided_at, self._passes = time.perf_counter(), 0
        return BatchTimes(waiting, generating, working, None if -least == UNKNOWN_TIME else -least)

    def finish(self, passes: int) -> None:
        """Note that a batch is finished, after so many passes."""
        self._passes, self._finished_at = passes, time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last call, or since the clock was made."""
        before, self._lapped_at = self._lapped_at, time.perf_counter()
        return self._lapped_at - before


class _Timed:
    """An iterator that times `next` of a loader."""

    def __init__(self, loader: Iterator[Any]) -> None:
        self._loader = loader
        self.seconds = 0.0

    def __iter__(self) -> _Timed:
        return self

    def __next__(self) -> Any:
        start = time.perf_counter()
        try:
            return next(self._loader)
        finally:
            self.seconds += time.perf_counter() - start
