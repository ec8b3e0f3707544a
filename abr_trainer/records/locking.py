"""One run at a time in a directory: a lock that ends with the process that holds it."""

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
"""Seconds between two signs of life of a holder: it touches its lock."""

SILENCE = 90.0
"""Seconds without one, after which a holder on another machine is taken to have ended."""

_HELD: set[int] = set()
"""File descriptors of the locks of this process."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Attributes:
        started: When the process was started, in seconds since 1970: the system gives its id to another one later.
        since: When it took the lock, in words.
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
        """Tell whether the process, which is one of this machine, has not ended."""
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) < 2
        except psutil.Error:
            return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since} ({self.command})"


@contextlib.contextmanager
def locked(directory: Path, flag: str) -> Iterator[int]:
    """Keep others out of a directory, which is made if it is missing and removed if it is still empty at the end.

    On one machine the operating system keeps the lock, and gives it up when the process ends in whatever way. A holder
    on another machine, or where the file system knows no locks, is known by the file alone.

    Args:
        flag: The flag that names the directory, for messages.

    Yields:
        A file descriptor: a child that inherits it keeps the lock for as long as it lives.

    Raises:
        ValueError: Another process is at work there, or nothing can be written there.
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
    """Take the lock and write down who holds it.

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
                who = f"{holder}, or one that it has started" if holder and not holder.is_running() else holder
                raise ValueError(f"{where} is in use by {who or 'another process'}. {ADVICE}")
            if holder is not None:
                _refuse_if_alive(holder, is_ours is None, path, where)
                logger.warning(f"{where} was in use by {holder}, which has ended without a word.")
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)  # and not `pwrite`, which Windows lacks
            os.write(descriptor, json.dumps(asdict(Holder.this())).encode())
            _HELD.add(descriptor)
            return descriptor
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            raise


ADVICE = "Wait until that has ended, or give another directory."


def _refuse_if_alive(holder: Holder, has_no_locks: bool, path: Path, where: str) -> None:
    """Refuse a directory whose holder the operating system does not know of.

    Raises:
        ValueError: It is alive, or was lately.
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
    """Give the lock up, and remove its file unless a child goes on holding it."""
    ours = _holder(descriptor)
    _HELD.discard(descriptor)
    os.close(descriptor)
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDWR)
        is_left = _lock(descriptor) is not False and _holder(descriptor) == ours
        if fcntl is None:  # Windows removes no file that is open, and has no lock to lose here
            os.close(descriptor)
        if is_left:
            path.unlink()
        if fcntl is not None:
            os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Take the lock of the operating system; False if another process has it, None if there are no such locks."""
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
    """Close the locks in a forked child: a worker that outlives a killed run must not keep them."""
    for descriptor in _HELD:
        os.close(descriptor)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
