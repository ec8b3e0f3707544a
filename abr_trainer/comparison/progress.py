"""Show the progress of a comparison."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..records.files import TRACE_NAME


class Progress:
    """A progress bar over all runs, which also advances within a run, and a line for each run that ends.

    Args:
        facts: Length of each run: `max_passes`, `max_seconds`, `max_steps` and `epochs`.
    """

    def __init__(self, facts: dict[str, Any]) -> None:
        self._facts = facts
        bar_format = "{l_bar}{bar}| {n:.1f}/{total} runs, {remaining} left"
        self._bar: tqdm[Any] = tqdm(total=0, disable=None, bar_format=bar_format)
        self._done = self._total = 0
        self._looked: dict[Path, float] = {}
        self._shares: dict[Path, float] = {}

    def expect(self, kept: int, pending: int) -> None:
        """Add runs: `kept` that are already finished, and `pending` others."""
        self._total += pending
        self._bar.total = self._total
        self._bar.refresh()
        if kept:
            tqdm.write(f"{kept} run{'s are' if kept > 1 else ' is'} already finished")

    def is_at(self, directory: Path) -> None:
        """Read the progress of the run in this directory, at most once per second."""
        if time.monotonic() - self._looked.get(directory, 0) < 1:
            return
        self._looked[directory] = time.monotonic()
        self._shares[directory] = share_done(directory / TRACE_NAME, self._facts)
        self._show()

    def finish(self, directory: Path, line: str) -> None:
        self._shares.pop(directory, None)
        self._done += 1
        tqdm.write(f"[{self._done}/{self._total}] {line}")
        self._show()

    def _show(self) -> None:
        self._bar.update(self._done + sum(self._shares.values()) - self._bar.n)

    def close(self) -> None:
        self._bar.close()


def share_done(trace: Path, facts: dict[str, Any]) -> float:
    """Return the finished share of a run, in [0, 1], from the last line of its trace."""
    try:
        with open(trace, "rb") as file:
            file.seek(max(0, trace.stat().st_size - 4096))
            line = json.loads(file.read().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return 0.0
    if facts["max_passes"]:
        share = line["passes"] / facts["max_passes"]
    elif facts["max_seconds"]:
        share = line["progress"]
    elif facts["max_steps"] > 0:
        share = line["step"] / facts["max_steps"]
    else:
        share = (line["epoch"] or 0.0) / facts["epochs"]
    return min(1.0, float(share))
