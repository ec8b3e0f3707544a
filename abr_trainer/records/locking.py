"""Lock a directory for one run at a time. The lock ends with the process that holds it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import socket
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from .files import LOCK_NAME

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

BEAT = 10.0
"""Seconds between two updates of the lock file's time by its holder."""

SILENCE = 90.0
"""Seconds without an update after which a holder on another machine is assumed to have ended."""

_HELD: set[int] = set()
"""File descriptors of the locks of this process."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Attributes:
        started: Start of the process, in seconds since 1970, because the system can reuse its id later.
        since: Date and time when it took the lock.
    """

    pid: int
    host: str
    started: float
    since: str
    command: str

    @classmethod
    def this(cls) -> Holder:
        command = textwrap.shorten(shlex.join(sys.argv), 120, placeholder=" ...")
        started = psutil.Process().create_time()
        return cls(os.getpid(), socket.gethostname(), started, time.strftime("%Y-%m-%d %H:%M:%S"), command)

    @property
    def is_here(self) -> bool:
        return self.host == socket.gethostname()

    def is_running(self) -> bool:
        """Tell whether the process is running. It must be on this machine."""
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) < 2
        except psutil.Error:
            return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since} ({self.command})"


@contextlib.contextmanager
def locked(directory: Path, flag: str) -> Iterator[int]:
    """Lock a directory. It is created if it does not exist, and removed if it is empty at the end.

    On one machine the operating system holds the lock, and releases it when the process ends in any way. On another
    machine, or on a file system without locks, only the lock file shows that there is a holder.

    Args:
        flag: The flag that gives the directory, for messages.

    Yields:
        A file descriptor. A child process that inherits it keeps the lock until it ends.

    Raises:
        ValueError: Another process uses the directory, or it cannot be written to.
    """
    path = directory / LOCK_NAME
    made = [each for each in (directory, *directory.parents) if not each.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(path, f"{flag} {directory}")
    except OSError as error:
        _remove_if_empty(made)
        raise ValueError(f"{flag} {directory} cannot be written to: {error.strerror}.") from error
    owner, ended = os.getpid(), threading.Event()
    threading.Thread(target=_beat, args=(path, ended), daemon=True).start()
    try:
        yield descriptor
    finally:
        ended.set()
        if os.getpid() == owner:
            _release(path, descriptor)
            _remove_if_empty(made)


def _acquire(path: Path, where: str) -> int:
    """Take the lock and write this process into it.

    Raises:
        ValueError: Another process holds it.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            is_ours = _lock(descriptor)
            if is_ours and not _is_at(path, descriptor):  # its holder has just removed it
                os.close(descriptor)
                continue
            holder = _holder(descriptor)
            if is_ours is False:
                who = f"{holder}, or a process that it started" if holder and not holder.is_running() else holder
                raise ValueError(f"{where} is in use by {who or 'another process'}. {ADVICE}")
            if holder is not None:
                _refuse_if_alive(holder, is_ours is None, path, where)
                logger.warning(f"{where} was in use by {holder}, which ended without releasing it.")
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)  # not `pwrite`, which Windows lacks
            os.write(descriptor, json.dumps(asdict(Holder.this())).encode())
            _HELD.add(descriptor)
            return descriptor
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            raise


ADVICE = "Wait until it has ended, or give another directory."


def _refuse_if_alive(holder: Holder, has_no_locks: bool, path: Path, where: str) -> None:
    """Refuse a directory whose holder is only known from the lock file.

    Raises:
        ValueError: The holder is running, or was running less than `SILENCE` seconds ago.
    """
    if holder.is_here:
        if has_no_locks and holder.is_running():
            raise ValueError(f"{where} is in use by {holder}. {ADVICE}")
        return
    with tempfile.TemporaryFile(dir=path.parent) as now:  # by the clock of the file system
        silent = os.fstat(now.fileno()).st_mtime - path.stat().st_mtime
    if silent < SILENCE:
        raise ValueError(
            f"{where} is in use by {holder}, last seen {max(silent, 0):.0f} s ago. {ADVICE} If you are sure that it "
            f"has ended, delete {path}, or try again after {SILENCE:.0f} s."
        )


def _release(path: Path, descriptor: int) -> None:
    """Release the lock, and remove its file unless a child process still holds it."""
    ours = _holder(descriptor)
    _HELD.discard(descriptor)
    os.close(descriptor)
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDWR)
        is_left = _lock(descriptor) is not False and _holder(descriptor) == ours
        if fcntl is None:  # Windows cannot remove an open file, and there is no lock to keep
            os.close(descriptor)
        if is_left:
            path.unlink()
        if fcntl is not None:
            os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Take the lock of the operating system. False: another process has it. None: locks are not supported."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system has none
        return None
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> Holder | None:
    os.lseek(descriptor, 0, os.SEEK_SET)
    try:
        return Holder(**json.loads(os.read(descriptor, 1 << 16)))
    except (ValueError, TypeError):
        return None


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)


def _remove_if_empty(directories: list[Path]) -> None:
    for directory in directories:
        with contextlib.suppress(OSError):
            directory.rmdir()


def _forget() -> None:
    """Close the locks in a forked child, so that a worker that outlives a killed run does not keep them."""
    for descriptor in _HELD:
        os.close(descriptor)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
