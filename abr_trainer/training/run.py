"""What is counted in one run, apart from what its rule remembers and what Trainer counts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..perplexity.windows import perplexity_of
from ..schedulers import BatchTimes, Outcome
from ..schedulers.base import NO_ADVANTAGE, NO_TARGETS
from .budget import Budget
from .callbacks import LogWindow
from .clock import Clock
from .consensus import Consensus
from .dropping import RowGate
from .held import HeldBatch
from .ledger import ComputeLedger
from .notices import Notices
from .rollouts import Policy
from .waiting import Waiting


class Run:
    """The counts of one run. A trainer starts with a new one at every call of `train`, and at every new attempt of it.

    It must not refer to the trainer: the reference cycle would keep the model in memory.

    Attributes:
        ledger: What was spent.
        budget: What may be spent.
        consensus: How ranks agree.
        clock: How long the batch under way takes, on this rank.
        policy: Of a generated batch under way, what all ranks know of it; None under other trainers.
        times: How long it took, as far as it is decided, by all ranks.
        window: The batches since the last log.
        extra_forwards: Forwards of the batch under way on this rank, beside one for each micro-batch.
        held: Batches to train on again later, by index.
        rows: What decides which rows are dropped; None if none are.
        notices: What is said of dropped rows and skipped batches.
        waiting: How much of the time was a wait for data, and whether that was said.
        skips_in_a_row: The last batches, as long as they were skipped: index, and loss or reason.
        non_finite_batches: Batches whose loss was not finite, or that had no targets.
        batches_in_epoch: Batches finished in this epoch.
        is_exhausted: Whether the data of this epoch have ended, before a batch was complete.
        epoch_is_over: Whether the last call to log, evaluate or save was that at the end of an epoch.
        last_update: Gradient norm and learning rate of the last batch, as Trainer logs them.
        closes_epoch: Whether the run goes on from a checkpoint after the last batch of an epoch, and before its end.
        saved_at: Step of the last checkpoint of this run.
        unsealed: The last checkpoint, until its checksums are written.
        has_ended: Whether nothing was left to train after the checkpoint that the run goes on from.
        begun_at: Step that this call of `train` began with: above 0 if it is resumed.
        remark: What the rule has to say at the end if it did nothing, or always the same; on the main process.
    """

    def __init__(self, args: Any, accelerator: Any) -> None:
        self.ledger = ComputeLedger()
        self.budget = Budget(args, self.ledger)
        self.consensus = Consensus(args, accelerator, self.budget)
        self.clock = Clock()
        self.policy: Policy | None = None
        self.times = BatchTimes(0.0, 0.0, 0.0, None)
        self.window = LogWindow()
        self.extra_forwards = 0
        self.held: dict[int, HeldBatch] = {}
        self.rows: RowGate | None = None
        self.notices = Notices()
        self.waiting = Waiting()
        self.skips_in_a_row: list[tuple[int, str]] = []
        self.non_finite_batches = 0
        self.batches_in_epoch = 0
        self.is_exhausted = self.epoch_is_over = False
        self.last_update: tuple[Any, Any] = (None, None)
        self.closes_epoch = False
        self.saved_at: int | None = None
        self.unsealed: Path | None = None
        self.has_ended = False
        self.begun_at = 0
        self.remark: str | None = None

    def count(self, outcome: Outcome, seconds: float) -> None:
        """Count a finished batch."""
        self.batches_in_epoch += 1
        self.ledger.close_batch(outcome.updates, seconds, outcome.rows, outcome.rows_dropped)
        self.ledger.waiting_seconds += self.times.waiting
        self.ledger.generating_seconds += self.times.generating
        self.clock.finish(passes=len(outcome.losses) + len(outcome.replayed))
        self.window.observe(outcome, self.times)
        self.waiting.observe(seconds, self.times.waiting)
        self.count_time()
        if outcome.skipped and outcome.reason != NO_ADVANTAGE:  # which is no fault
            loss = NO_TARGETS if outcome.reason == NO_TARGETS else f"{outcome.observation.loss:.4g}"
            self.skips_in_a_row.append((outcome.observation.batch, loss))
        elif not outcome.skipped:
            self.skips_in_a_row.clear()

    def count_time(self) -> None:
        """Let the ledger count the wall-clock time up to now."""
        self.ledger.total_seconds += self.clock.lap()

    def explain_skips(self, limit: int, checkpoint: Path) -> str:
        """Return why the run ends: too many batches in a row were skipped."""
        last = ", ".join(
            f"{batch + 1} ({loss if loss == NO_TARGETS else f'loss {loss}'})"  # kept by index, from 0
            for batch, loss in self.skips_in_a_row[-5:]
        )
        return (
            f"{len(self.skips_in_a_row)} batches in a row were skipped, --max_consecutive_skips is {limit}. The last "
            f"were {last}. The run is saved in {checkpoint}: look at these batches and at the learning rate, or raise "
            "the limit, and resume."
        )

    def complete_log(self, logs: dict[str, float], loss_is_of_tokens: bool) -> None:
        """Add repeats, skips and cost of the batches since the last log, and begin to count anew."""
        logs["loss"] = self.window.finite_mean(logs["loss"])
        if loss_is_of_tokens:
            logs["perplexity"] = perplexity_of(self.window.mean_loss)
        logs.update(self.window.logs(self.ledger))
        self.window = LogWindow()

    def leave_out_non_finite(self, trainer: Any) -> None:
        """Make the mean loss that Trainer reports at the end one over finite batches: the others gave 0 to its sum."""
        if not self.non_finite_batches:
            return
        batches = trainer.state.global_step - getattr(trainer, "_initial_global_step", 0)
        finite = batches - self.non_finite_batches
        rest = trainer._tr_loss.item()  # Trainer adds it
        total = trainer._total_loss_scalar + rest
        trainer._total_loss_scalar = (total * batches / finite if finite else math.nan) - rest
