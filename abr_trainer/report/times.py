"""Where the time of a run went, from the seconds that it has recorded."""

from __future__ import annotations

from collections.abc import Mapping

LEAST_SHARE = 0.005
"""Of the time: a part up to this is not named."""

SHOWN_WAITING = 0.05
"""Share of the time in batches from which on the wait for data is shown where it is not asked for."""


def share_waited(waiting: float, seconds: float) -> float:
    """Return which share of the time in batches was a wait for their data: at most 1.

    Of several processes, the wait is that of the slowest, and the time that of the main one.
    """
    return min(1.0, waiting / seconds) if seconds else 0.0


def parts_of_time(spent: Mapping[str, float]) -> tuple[float, list[tuple[str, float]]]:
    """Return the wall-clock seconds of a run, and what they went into.

    A part up to `LEAST_SHARE` of them is left out, so that the parts may add up to a little less.

    Args:
        spent: The seconds of a ledger, by name. Those that are missing count as 0.

    Returns:
        All seconds, and the seconds of each part by its name.

    >>> parts_of_time({"seconds": 8.0, "waiting_seconds": 2.0, "saving_seconds": 0.015625, "total_seconds": 10.0})
    (10.0, [('passes', 6.0), ('waiting for data', 2.0), ('rest', 1.984375)])
    """
    waiting, generating = spent.get("waiting_seconds", 0.0), spent.get("generating_seconds", 0.0)
    parts = {
        "passes": max(0.0, spent.get("seconds", 0.0) - waiting - generating),
        "waiting for data": waiting,
        "generating": generating,
        "evaluation": spent.get("evaluation_seconds", 0.0),
        "saving": spent.get("saving_seconds", 0.0),
    }
    known = sum(parts.values())
    total = max(known, spent.get("total_seconds", 0.0))  # unknown of a run that an earlier version began
    parts["rest"] = total - known
    return total, [(name, part) for name, part in parts.items() if part > LEAST_SHARE * total]
