"""Runs forked from this process, which has imported everything, and what may happen to them: kills, and full disks.

A run counts what it does, by kind: changes to files of its output directory, writes of whole files, evaluated batches,
and requests to the Hub. At the n-th one of a kind something may happen to it.
"""

from __future__ import annotations

import builtins
import io
import mmap
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = ("change", "write", "evaluated batch", "request")

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

LIBRARIES = ("abr_trainer", "transformers", "peft", "safetensors", "trl")


@dataclass(frozen=True)
class Event:
    """Something that a run does.

    Attributes:
        kind: One of `KINDS`.
        number: How many of its kind there were, this one included.
        path: The file, if there is one.
    """

    kind: str
    number: int
    path: Path | None = None


class Counts:
    """Numbers of events by kind, in memory that a forked run shares with this process."""

    def __init__(self) -> None:
        self._numbers = memoryview(mmap.mmap(-1, 8 * len(KINDS))).cast("q")

    def add(self, kind: str) -> int:
        index = KINDS.index(kind)
        self._numbers[index] += 1
        return int(self._numbers[index])

    def __getitem__(self, kind: str) -> int:
        return int(self._numbers[KINDS.index(kind)])


class Watch:
    """Counts the events of the process that it is installed in.

    Args:
        directory: Where changes and writes count.
        before: Called before the event. For a write, the file is not there yet.
        after: Called after a whole file was written by a library, which may be cut then.
    """

    def __init__(
        self,
        directory: Path,
        counts: Counts,
        before: Callable[[Event], None] = lambda event: None,
        after: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self.directory, self.counts, self.before, self.after = str(directory), counts, before, after

    def install(self) -> None:
        """Watch from now on; there is no way back."""
        import safetensors.torch
        import torch
        from huggingface_hub.utils import httpx
        from transformers import Trainer, TrainerState

        sys.addaudithook(self._audit)
        self._wrap_everywhere(torch, "save", 1)
        self._wrap_everywhere(safetensors.torch, "save_file", 1)
        self._wrap_everywhere(safetensors.torch, "safe_save_file", 1)
        self._wrap_writes(TrainerState, "save_to_json", 1)
        self._wrap_writes(Path, "write_bytes", 0)
        builtins.open = self._opened(builtins.open)
        io.open = self._opened(io.open)
        self._wrap(Trainer, "prediction_step", "evaluated batch")
        self._wrap(httpx.HTTPTransport, "handle_request", "request")

    def _happens(self, kind: str, path: Any = None) -> Event:
        event = Event(kind, self.counts.add(kind), None if path is None else Path(path))
        self.before(event)
        return event

    def _is_inside(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self.directory)

    def _audit(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "open":
            if isinstance(arguments[2], int) and arguments[2] & WRITING and self._is_inside(arguments[0]):
                self._happens("change", arguments[0])
        elif name in CHANGES and self._is_inside(arguments[0]):
            self._happens("change", arguments[0])

    def _wrap(self, owner: Any, name: str, kind: str) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._happens(kind)
            return original(*args, **kwargs)

        setattr(owner, name, counted)

    def _wrap_writes(self, owner: Any, name: str, position: int) -> Any:
        """Count the calls of a function that writes a whole file, whose path is the argument at this position."""
        original = getattr(owner, name)

        def written(*args: Any, **kwargs: Any) -> Any:
            path = args[position] if len(args) > position else kwargs.get("filename", kwargs.get("f"))
            if not self._is_inside(path):
                return original(*args, **kwargs)
            event = self._happens("write", path)
            result = original(*args, **kwargs)
            self.after(event)
            return result

        setattr(owner, name, written)
        return original

    def _opened(self, original: Any) -> Any:
        """Count the files that are opened to be written anew. After the event there is nothing in them yet."""

        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not (mode.startswith("w") and self._is_inside(file)):
                return original(file, mode, *args, **kwargs)
            event = self._happens("write", file)
            result = original(file, mode, *args, **kwargs)
            self.after(event)
            return result

        return opened

    def _wrap_everywhere(self, owner: Any, name: str, position: int) -> None:
        """Also where other modules have imported it by name."""
        if not hasattr(owner, name):
            return
        original = self._wrap_writes(owner, name, position)
        for module in [each for key, each in list(sys.modules.items()) if key.partition(".")[0] in LIBRARIES]:
            for attribute, value in list(vars(module).items()):
                if value is original:
                    setattr(module, attribute, getattr(owner, name))


def fork(work: Callable[[], object], log: Path, environment: Mapping[str, str]) -> int:
    """Do some work in a child process, and return its id. Its status is that of a command which does the work."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(file, descriptor)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        os.environ.update(environment)
        work()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc(file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class StillRunning(RuntimeError):
    """A run has not ended in time."""


def wait(pid: int, seconds: float, last_signal: signal.Signals = signal.SIGKILL) -> int:
    """Return the status of a child, negative for a signal.

    Raises:
        StillRunning: It has not ended in time. It was sent the last signal.
    """
    end = time.monotonic() + seconds
    while (status := poll(pid)) is None:
        if time.monotonic() > end:
            os.kill(pid, last_signal)
            if last_signal == signal.SIGKILL:
                os.waitpid(pid, 0)
            raise StillRunning(f"Process {pid} was running after {seconds:.0f} s.")
        time.sleep(0.002)
    return status


def poll(pid: int) -> int | None:
    """Return the status of a child that has ended, or None."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def ranks_at(port: int, ranks: int) -> list[dict[str, str]]:
    """Return what torchrun puts into the environment of each rank; nothing for a single process."""
    if ranks == 1:
        return [{}]
    common = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    each = [common | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
    return [{name: str(value) for name, value in place.items()} for place in each]
