"""One rank fails: the others end too, with its message."""

from __future__ import annotations

import contextlib
import re
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, ClassVar

from torch import distributed

from ..records.errors import Failure, one_line

KEY, TOLD = "abr_failure_{number}", "abr_failure_{number}_told"
"""In the store of the process group: the message of the first rank that has failed, and how many ranks know it."""

PATIENCE = 5.0
"""Seconds that a rank that fails waits until all others know its message."""

PAUSE = 0.1
"""Seconds between two looks for a message."""

LOST = (
    "Another rank of this run has ended without a message, or did not answer within --ddp_timeout. The system may "
    "have killed it for its memory: look at the output of all ranks. --resume_from_checkpoint true goes on from the "
    "last checkpoint."
)


class RankFailed(Failure):
    """Another rank has failed; the message is its own, or says that it left none."""


def keep_time_out(seconds: float) -> None:
    """Let a collective operation on CPUs fail after `--ddp_timeout`. Trainer leaves it at 30 minutes there."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """If one rank fails, let every rank fail with its message.

    The rank that fails writes its message where all ranks look for it, and ends when they have read it. The others
    fail where they next wait for it. All ranks must come here equally often.

    Raises:
        RankFailed: Another rank has failed, or has ended without a message.
    """
    board = _Board.of_this_run()
    try:
        yield
    except RankFailed:
        raise
    except (Exception, SystemExit) as error:
        if board is not None and not (isinstance(error, SystemExit) and not error.code):
            if _is_of_communication(error):
                raise RankFailed(board.read() or LOST) from error
            board.tell(_described(error))
        raise
    finally:
        if board is not None:
            board.close()


class _Board(threading.Thread):
    """Where ranks read why one of them has failed.

    It is looked at all the time: it may be gone with the rank that kept it as soon as that one has failed.

    Attributes:
        message: Of the first rank that has failed, once there is one.
    """

    opened: ClassVar[list[_Board]] = []
    count: ClassVar[int] = 0

    @classmethod
    def of_this_run(cls) -> _Board | None:
        """Open one for the ranks of this run; None for a single one."""
        is_group = distributed.is_available() and distributed.is_initialized()
        if not is_group or distributed.get_world_size() == 1:
            return None
        cls.count += 1
        board = cls(cls.count)
        board.start()
        cls.opened.append(board)
        return board

    def __init__(self, number: int) -> None:
        super().__init__(daemon=True)
        self.message: str | None = None
        self._key, self._told = KEY.format(number=number), TOLD.format(number=number)
        self._store: Any = distributed.distributed_c10d._get_default_store()
        self._rank, self._size = distributed.get_rank(), distributed.get_world_size()
        self._is_over = threading.Event()

    def run(self) -> None:
        """Look for a message, until there is one, or nobody keeps any."""
        with contextlib.suppress(RuntimeError):
            while not self._store.check([self._key]):
                if self._is_over.wait(PAUSE):
                    return
            self.message = self._store.get(self._key).decode()
            self._store.add(self._told, 1)

    def close(self) -> None:
        self.opened.remove(self)
        self._is_over.set()

    def tell(self, message: str) -> None:
        """Leave a message, unless there is one, and wait until all ranks know it."""
        with contextlib.suppress(RuntimeError):
            self._store.compare_set(self._key, "", f"Rank {self._rank} of {self._size} has failed: {message}")
            end = time.monotonic() + PATIENCE
            while self._store.add(self._told, 0) < self._size and time.monotonic() < end:
                time.sleep(PAUSE / 2)

    def read(self) -> str | None:
        """Return the message of the rank that has failed; None if it left none."""
        end = time.monotonic() + 10 * PAUSE
        while True:
            told = [board.message for board in self.opened if board.message is not None]
            if told or time.monotonic() > end:
                return told[0] if told else None
            time.sleep(PAUSE / 2)


def _described(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        if isinstance(error.code, int):
            return f"it has ended with status {error.code}"
        return one_line(error, width=sys.maxsize).removeprefix("error: ")
    return f"{type(error).__name__}: {one_line(error, width=sys.maxsize)}"


def _is_of_communication(error: BaseException | None) -> bool:
    """Tell whether an error, or one that it comes from, says that another rank does not answer."""
    while error is not None:
        is_told = isinstance(error, RuntimeError) and re.search(
            r"gloo|nccl|by peer|Timed out waiting", str(error), re.I
        )
        if is_told or isinstance(error, distributed.DistError):
            return True
        error = error.__cause__ or error.__context__
    return False
