"""What goes wrong on purpose."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass

from tests.hub_server.calls import Answer

CUTS = ("request", "answer", "body")


@dataclass
class Fault:
    """What befalls the next `times` requests whose method and path match.

    Attributes:
        method: A regular expression that is all of the method.
        path: A regular expression somewhere in the path with its query.
        answer: This, instead of what was asked for; nothing is done then.
        cut: Where the connection ends: "request", half of it read and nothing done; "answer", all done and not
            answered; "body", all done and half of the answer's body sent.
        seconds: Wait so long before anything is done.
    """

    method: str = ".*"
    path: str = ""
    times: int = 1
    answer: Answer | None = None
    cut: str | None = None
    seconds: float = 0.0

    def befalls(self, method: str, path: str) -> bool:
        return self.times > 0 and bool(re.fullmatch(self.method, method) and re.search(self.path, path))


class Faults:
    """Faults in the order in which they were asked for; a request meets the first that matches."""

    def __init__(self) -> None:
        self.all: list[Fault] = []
        self.lock = threading.Lock()

    def add(self, fault: Fault) -> None:
        if fault.cut not in (None, *CUTS):
            raise ValueError(f"A connection is cut at one of {', '.join(CUTS)}, not at {fault.cut!r}.")
        self.all.append(fault)

    def take(self, method: str, path: str) -> Fault:
        """Return the fault that this request meets: one of none, mostly."""
        with self.lock:
            for fault in self.all:
                if fault.befalls(method, path):
                    fault.times -= 1
                    return fault
        return Fault()
