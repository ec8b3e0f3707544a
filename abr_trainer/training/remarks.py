"""What a rule has to say at the end of a run in which it did nothing, or always the same."""

from __future__ import annotations

from collections import deque
from pathlib import Path

from transformers.utils import logging

from ..records.errors import one_line
from ..records.files import TRACE_NAME, read_lines
from ..report.why import WITHOUT_THE_RULE, outcome_of
from ..schedulers import RepeatScheduler
from .deciding import BUDGET, NO_ROOM

logger = logging.get_logger(__name__)

NOT_BY_THE_RULE = {*WITHOUT_THE_RULE, BUDGET, NO_ROOM}

MOST = 100_000
"""Batches that are looked at, the last ones."""


def remark_on(rule: RepeatScheduler, directory: Path) -> str | None:
    """Return the remark of a rule, as it is at the end of a run, on the batches in the trace of that run.

    A rule, or a trace, that cannot be asked is said in a warning: the run has ended well.
    """
    trace = directory / TRACE_NAME
    try:
        lines = read_lines(trace) if trace.is_file() else iter(())
        decided = deque((outcome_of(line) for line in lines if line["reason"] not in NOT_BY_THE_RULE), maxlen=MOST)
        return rule.remark(decided) if decided else None
    except Exception as error:  # the code of users; what comes after the remark must come
        logger.warning(f"{type(rule).__name__} has no remark on the run: {type(error).__name__}: {one_line(error)}")
        return None
