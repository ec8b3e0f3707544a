"""Start and stop runs, each in a separate process."""

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
    """An active run."""

    def poll(self) -> int | None: ...

    def terminate(self) -> None: ...

    def wait(self) -> None: ...


class Forked:
    """A run forked from a process that has imported all modules. It ends when the process that started it ends.

    Args:
        context: Multiprocessing context with the start method "forkserver".
        module: The module to execute, as `python -m` does.
        log: File for the output of the run.
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
    """Start the process that runs are forked from, with keyboard interrupts blocked."""
    resource_tracker.ensure_running()  # first, because it unblocks interrupts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run_module(module: str, argv: list[str], log: str) -> None:
    """Execute the run. Called in the forked process."""
    gc.freeze()  # so that no collection scans the modules imported before, which takes a second each time
    os.setsid()  # keyboard interrupts go to the comparison only, which then ends its runs
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # a normal exit cleans up
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [module, *argv]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _end_with(sentinel: int) -> None:
    """End this process when its parent ends, so that two runs never write to the same directory."""
    connection.wait([sentinel])
    os._exit(1)


class Launched:
    """A run started as a command, with its child processes. It continues if this process is killed.

    Args:
        held: File descriptors to keep open while the command runs, e.g. the lock on its directory.
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
    """Treat SIGTERM and a closed terminal like Ctrl-C, so that active runs are ended, too."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
