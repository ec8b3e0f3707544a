"""The primer: batches of another data set, which a run is trained on first, as an epoch -1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .config import setting


@dataclass(frozen=True)
class Primer:
    """What a run begins with.

    Attributes:
        dataset: Where its batches come from, in order; None for a run without a primer.
        batches: Batches before those of the training set.
        rows_in_batch: Over all ranks and micro-batches.
    """

    dataset: Any
    batches: int
    rows_in_batch: int

    @classmethod
    def of(cls, trainer: Any) -> Primer:
        """Return the primer as the trainer is set up now: a search or a smaller micro-batch changes it."""
        args, dataset = trainer.args, trainer.primer_dataset
        if dataset is None:
            return cls(None, 0, 0)
        return cls(dataset, setting(args, "primer_batches"), trainer.get_total_train_batch_size(args))

    @property
    def rows(self) -> int:
        return self.batches * self.rows_in_batch

    def check(self) -> None:
        """Refuse a primer that is not asked for, or too short.

        Raises:
            ValueError: It is.
        """
        if self.dataset is None:
            return
        if self.batches < 1:
            raise ValueError("A primer needs --primer_batches: how many batches of it to train on.")
        if self.rows > len(self.dataset):
            raise ValueError(
                f"The primer has {len(self.dataset)} blocks; --primer_batches {self.batches} needs {self.rows}. Give "
                "a longer --primer_file or ask for fewer batches."
            )

    def epoch(self, trainer: Any) -> dict[str, Any]:
        """Return what `Trainer._run_epoch` needs to run over the primer instead of the training set."""
        loader = trainer._get_dataloader(
            dataset=[self.dataset[row] for row in range(self.rows)],
            description="Primer",
            batch_size=trainer._train_batch_size,
            is_training=True,
        )
        return {
            "train_dataloader": loader,
            "num_update_steps_per_epoch": self.batches,
            "steps_in_epoch": self.batches * trainer.args.gradient_accumulation_steps,
        }
