"""The Trainer with repetition.

One batch, by files: Trainer's loop calls `trainer.py` for each micro-batch. Once the last one has passed, the rule is
asked and its decision is carried out. `held.py` keeps batches for a later replay, `ledger.py` charges what was spent,
`callbacks.py` writes the log and the trace.
"""

from __future__ import annotations

from ..records.lazy import on_first_use

_HOMES = {
    "ABRCallback": "callbacks",
    "ABRConfig": "config",
    "ABRMixin": "trainer",
    "ABRTrainer": "trainer",
    "ComputeLedger": "ledger",
    "PerplexityCallback": "tracking",
    "TooManySkips": "trainer",
}

__all__ = sorted(_HOMES)
__getattr__, __dir__ = on_first_use(__name__, _HOMES)
