"""When a checkpoint is saved, in addition to the steps that Trainer knows, and its checksums."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..records.files import set_aside, settle_replaced, write_checksums

_AnyTrainer: Any = object  # what a type checker sees: a mixin calls the Trainer that it is mixed into


class SavingMixin(_AnyTrainer):
    """Save complete checkpoints of a Trainer with repetition, with checksums and what an evaluation has decided."""

    control: Any

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self._is_active:
            # There may be one of this step, from before an evaluation. A push may have linked its files.
            if self.args.should_save:
                set_aside(self._checkpoint_folder(trial))
            self.accelerator.wait_for_everyone()
        start = time.perf_counter()
        super()._save_checkpoint(model, trial)
        if self._is_active:
            self.ledger.saving_seconds += time.perf_counter() - start
            self._run.unsealed = self._checkpoint_folder(trial) if self.args.should_save else None
        self._run.saved_at = self.state.global_step

    def _save_here(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint, unless there is one after the last batch."""
        if self._run.saved_at != self.state.global_step:
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _checkpoint_folder(self, trial: Any) -> Path:
        return Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")

    def _seal_checkpoint(self) -> None:
        """Write the checksums of a checkpoint that was just saved, after callbacks have added to it what they want."""
        checkpoint, self._run.unsealed = self._run.unsealed, None
        if checkpoint is not None and checkpoint.is_dir():
            start = time.perf_counter()
            write_checksums(checkpoint)
            settle_replaced(checkpoint.parent)
            self.ledger.saving_seconds += time.perf_counter() - start

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        is_new_best: bool = super()._determine_best_metric(*args, **kwargs)
        if not self._is_active:
            return is_new_best
        if self.args.load_best_model_at_end:
            # What an evaluation decides is in a checkpoint: that the model is the best, or that the run ends early.
            ends_early = self.control.should_training_stop and self.state.global_step < self.state.max_steps
            self.control.should_save = self.control.should_save or is_new_best or ends_early
        return is_new_best or self.control.should_save  # else `save_strategy="best"` drops a checkpoint that is due
