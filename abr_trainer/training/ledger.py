"""The compute clock: what a run has spent, as opposed to how far it has come in the data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from fractions import Fraction
from html import escape
from typing import Any

from ..report.times import parts_of_time

FRACTIONS = ("share", "extra_forwards", "passes")
"""The fields of the ledger that are exact fractions; JSON gets them as text."""


def forward_share(frozen_base: bool, activation_checkpointing: bool) -> Fraction:
    """Return what a forward costs as a share of a forward-backward.

    Per parameter and token, a forward is 2 FLOPs, the gradients of the activations 2, the gradients of the weights 2,
    and recomputing checkpointed activations 2. A frozen base needs no weight gradients; those of an adapter are
    neglected.

    >>> [str(forward_share(frozen, checkpointing)) for frozen in (False, True) for checkpointing in (False, True)]
    ['1/3', '1/4', '1/2', '1/3']
    """
    return Fraction(1, 2 + (not frozen_base) + activation_checkpointing)


@dataclass
class ComputeLedger:
    """What a run has spent, over all ranks.

    Attributes:
        share: What a forward costs as a share of a pass, see `forward_share`.
        extra_forwards: Forwards of the last batch for each micro-batch, beside the one that gives the loss: what some
            own losses, metrics and reference models need. Each pass over the batch makes them.
        batches: Batches finished, skipped ones among them.
        skips: Batches skipped.
        forwards: Forwards over a micro-batch, on each rank. Those that find out what a loss means are not counted: at
            most three, once a start.
        backwards: Backwards over a micro-batch, on each rank. Skipping saves the backward of the last micro-batch.
        passes: Compute in units of one forward-backward over a batch: exact, so that a budget can be spent exactly. A
            batch skipped after `a` micro-batches costs `1 - (1 - share) / a`: `share` without accumulation.
        updates: Optimizer steps, those among them that a gradient scaler rejects.
        tokens: Tokens that went through a forward, padding included.
        flops: Floating-point operations of the model, without embeddings.
        seconds: Wall-clock time in batches, waiting for their data and generating it included. Evaluation, logging and
            checkpoints are left out.
        waiting_seconds: Of these, the wait for the data: the longest of all ranks for each batch.
        generating_seconds: Of these, the time for generating the data, where a trainer does that.
        evaluation_seconds: Wall-clock time in evaluations.
        saving_seconds: Wall-clock time in saving checkpoints. A resumed run does not know that of its checkpoint.
        total_seconds: Wall-clock time since training began, in batches or not. That of the killed part of a resumed
            run counts up to its checkpoint.
        rows: Rows that a row rule has judged.
        rows_dropped: How many of them were not trained on, in whatever batch. That saves nothing.
    """

    share: Fraction = Fraction(1, 3)
    extra_forwards: Fraction = Fraction(0)
    batches: int = 0
    skips: int = 0
    forwards: int = 0
    backwards: int = 0
    passes: Fraction = Fraction(0)
    updates: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    waiting_seconds: float = 0.0
    generating_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    saving_seconds: float = 0.0
    total_seconds: float = 0.0
    rows: int = 0
    rows_dropped: int = 0

    @property
    def repeats(self) -> float:
        """Mean updates a batch; a skipped batch counts with 0."""
        return self.updates / self.batches if self.batches else 0.0

    @property
    def pass_cost(self) -> Fraction:
        """What a pass costs over the last batch, with its extra forwards."""
        return 1 + self.share * self.extra_forwards

    def charge_pass(self, micro_batches: int, backwards: int, tokens: int, forward_flops: float) -> None:
        """Note one pass over a batch.

        Args:
            micro_batches: Micro-batches in the batch, on each rank; each had its forward.
            backwards: How many of them had their backward too.
            tokens: Tokens in the batch, over all ranks.
            forward_flops: FLOPs of one forward over the batch, over all ranks.
        """
        forwards = 1 + self.extra_forwards
        cost = self.share * forwards + (1 - self.share) * Fraction(backwards, micro_batches)
        self.forwards += round(micro_batches * forwards)
        self.backwards += backwards
        self.passes += cost
        self.tokens += round(tokens * forwards)
        self.flops += forward_flops * float(cost / self.share)

    def close_batch(self, updates: int, seconds: float, rows: int = 0, rows_dropped: int = 0) -> None:
        """Note that a batch is finished, after so many updates: none is a skip."""
        self.batches += 1
        self.rows += rows
        self.rows_dropped += rows_dropped
        self.skips += updates == 0
        self.updates += updates
        self.seconds += seconds

    def summary(self) -> dict[str, float]:
        """Return the ledger as plain numbers, for logs and result files."""
        numbers = {**asdict(self), "passes": float(self.passes), "repeats": self.repeats}
        del numbers["share"], numbers["extra_forwards"]
        if not self.rows:
            del numbers["rows"], numbers["rows_dropped"]
        if not self.generating_seconds:
            del numbers["generating_seconds"]
        return numbers

    def table(self) -> list[tuple[str, str, str]]:
        """Return the ledger for people: what was counted, how much, and as what share."""
        skipped = f"{self.skips / self.batches:.1%} of the batches" if self.skips else ""
        dropped = f"{self.rows_dropped / self.rows:.2%} of {self.rows:,} rows" if self.rows else ""
        total, parts = parts_of_time(asdict(self))
        return [
            ("batches", f"{self.batches:,}", ""),
            ("skipped", f"{self.skips:,}", skipped),
            *([("rows dropped", f"{self.rows_dropped:,}", dropped)] if self.rows else []),
            ("passes", f"{round(float(self.passes), 2):,.12g}", ""),
            ("updates", f"{self.updates:,}", ""),
            ("updates/batch", f"{self.repeats:.2f}", ""),
            ("tokens", f"{self.tokens:,}", ""),
            ("FLOPs", f"{self.flops:.3g}", ""),
            ("seconds", f"{self.seconds:,.1f}", ""),
            *(
                (
                    "in passes" if name == "passes" else name,
                    f"{seconds:,.1f}",
                    f"{seconds / total:.1%} of {total:,.1f} s",
                )
                for name, seconds in parts[: len(parts) if len(parts) > 1 else 0]
            ),
        ]

    def __str__(self) -> str:
        """Return a small table. `repr` shows all fields, exactly.

        >>> print(ComputeLedger(batches=3, skips=1, passes=Fraction(7, 3), updates=2, tokens=1536, seconds=0.25))
        batches            3
        skipped            1  33.3% of the batches
        passes          2.33
        updates            2
        updates/batch   0.67
        tokens         1,536
        FLOPs              0
        seconds          0.2
        """
        table = self.table()
        names, values = (max(len(row[column]) for row in table) for column in (0, 1))
        return "\n".join(f"{name:<{names}}  {value:>{values}}  {share}".rstrip() for name, value, share in table)

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        cells = (
            f'<td style="text-align:left">{escape(name)}</td><td>{escape(value)}</td>'
            f'<td style="text-align:left">{escape(share)}</td>'
            for name, value, share in self.table()
        )
        return f"<table><tr>{'</tr><tr>'.join(cells)}</tr></table>"

    def state_dict(self) -> dict[str, Any]:
        return {**asdict(self), **{name: str(getattr(self, name)) for name in FRACTIONS}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, Fraction(value) if name in FRACTIONS else value)
