"""Runs at work, each in a process of its own."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing import connection, forkserver, resource_tracker
from pathlib import Path
from typing import Any, Protocol


class Process(Protocol):
    """A run at work."""

    def poll(self) -> int | None: ...

    def terminate(self) -> None: ...

    def wait(self) -> None: ...


class Forked:
    """A run forked from a process that has imported everything. It ends with the process that wanted it.

    Args:
        context: Of the start method "forkserver".
        module: What is run, as `python -m` does.
        log: File for what the run prints.
    """

    def __init__(self, context: Any, module: str, argv: list[str], log: Path) -> None:
        self._process = context.Process(target=_run_module, args=(module, argv, str(log)))
        self._process.start()

    def poll(self) -> int | None:
        status: int | None = self._process.exitcode
        return status

    def terminate(self) -> None:
        self._process.terminate()

    def wait(self) -> None:
        self._process.join(10)
        self._process.kill()
        self._process.join()


def start_quietly() -> None:
    """Start the process that others are forked from such that an interrupt from the keyboard does not reach it."""
    resource_tracker.ensure_running()  # first: it would let interrupts through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run_module(module: str, argv: list[str], log: str) -> None:
    """Be the run: called in a forked process."""
    gc.freeze()  # no collection looks through all that was imported before, which takes a second each time
    os.setsid()  # an interrupt from the keyboard is for the comparison, which ends its runs
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # leaves nothing behind in the system
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [module, *argv]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _end_with(sentinel: int) -> None:
    """End this process when the one that wanted it is gone: two runs in one directory would spoil it."""
    connection.wait([sentinel])
    os._exit(1)


class Launched:
    """A run started as a command, with all processes that it starts itself. If this one is killed, it goes on.

    Args:
        held: File descriptors that stay open for as long as the command runs: a lock on its directory.
    """

    def __init__(self, command: list[str], environment: dict[str, str], log: Path, held: tuple[int, ...] = ()) -> None:
        with open(log, "w", encoding="utf-8") as file:
            self._process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True, pass_fds=held
            )

    def poll(self) -> int | None:
        return self._process.poll()

    def terminate(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)

    def wait(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM, and a terminal that is closed, end this process as Ctrl-C does: what runs is ended with it."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # as under nohup
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
