"""Two trainings that take turns batch by batch, so that whatever else the machine does slows down both."""

from __future__ import annotations

import ctypes
import gc
import resource
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

ON_GPU = torch.cuda.is_available()


class Turns:
    """Let two threads run one at a time."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.turn = 0
        self.done: set[int] = set()

    def wait(self, me: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.turn == me)

    def hand_over(self, me: int) -> None:
        with self.changed:
            if 1 - me not in self.done:
                self.turn = 1 - me
                self.changed.notify_all()
                self.changed.wait_for(lambda: self.turn == me)

    def finish(self, me: int) -> None:
        with self.changed:
            self.done.add(me)
            self.turn = 1 - me
            self.changed.notify_all()


class BatchTimes(TrainerCallback):
    """Wall-clock seconds of each batch, from its first forward to its last update.

    Args:
        turns: Who runs when, and which of the two this one is. Default: it runs alone.
    """

    def __init__(self, turns: Turns | None = None, me: int = 0) -> None:
        self.turns, self.me = turns, me
        self.seconds: list[float] = []

    def begin(self) -> None:
        if self.turns is not None:
            self.turns.hand_over(self.me)
        synchronise()
        self.started = time.perf_counter()

    def end(self) -> None:
        synchronise()
        self.seconds.append(time.perf_counter() - self.started)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.end()


def synchronise() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def paired_ratios(
    first: Callable[[BatchTimes], object], second: Callable[[BatchTimes], object], warm_up: int
) -> list[float]:
    """Run two trainings in turns, and return the seconds of each batch of the second over those of the first.

    Args:
        first: Trains, and tells the clock that it is given when each batch begins and ends.
        second: Likewise; it is built and run in a thread of its own.
        warm_up: How many batches at the start are left out.
    """
    turns = Turns()

    def train(me: int, training: Callable[[BatchTimes], object]) -> list[float]:
        times = BatchTimes(turns, me)
        try:
            turns.wait(me)
            training(times)
        finally:
            turns.finish(me)
        return times.seconds[warm_up:]

    with ThreadPoolExecutor(2) as threads:
        theirs, ours = (threads.submit(train, me, training) for me, training in enumerate((first, second)))
        return [mine / other for mine, other in zip(ours.result(), theirs.result(), strict=True)]


def reset_peak_memory() -> None:
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        ctypes.CDLL(None).malloc_trim(0)  # what earlier runs have freed goes back to the system
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float:
    """Peak memory in bytes since the reset: of the GPU, or of the process."""
    if ON_GPU:
        return float(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():
        return float(next(line.split()[1] for line in status.read_text().splitlines() if "VmHWM" in line)) * 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
