"""A resumed run equals an unbroken one: what a checkpoint must hold, and where to go on in the data."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

from transformers.trainer_utils import has_length
from transformers.utils import logging

from .callbacks import LogWindow
from .held import load_held, save_held
from .records import last_complete_checkpoint, write_whole

logger = logging.get_logger(__name__)

ABR_STATE_NAME = "abr_state.json"

_AnyTrainer: Any = object  # what a type checker sees: a mixin calls the Trainer that it is mixed into


class ResumeMixin(_AnyTrainer):
    """Write `abr_state.json` into each checkpoint of a Trainer with repetition, and go on from it."""

    _restored_log: tuple[list[float], int] | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train`; `resume_from_checkpoint=True` takes the last checkpoint that was written to its
        end.
        """
        if self._is_active and resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(f"No valid checkpoint found in output directory ({self.args.output_dir})")
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> Any:
        if self._is_active and skip_scheduler and self.state.global_step > 0:
            return {}  # `eval_on_start` of a resumed run: the evaluation before the first batch is in its log already.
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._is_active:
            save_held(Path(output_dir), self.args.process_index, self._held)
            state = self._repetition_state()  # on every rank: an error must not leave the others waiting
            if self.args.should_save:
                write_whole(Path(output_dir, ABR_STATE_NAME), state)

    def _repetition_state(self) -> str:
        """Return what a resumed run needs, as strict JSON."""
        state = {
            "format": 1,
            "ledger": self.ledger.state_dict(),
            "repeat_scheduler": {
                "description": self._scheduler_description,
                "state": self.repeat_scheduler.state_dict(),
            },
            "skips_in_a_row": self._skips_in_a_row,
            "batches_in_epoch": 0 if self.state.global_step == self._primer_epoch else self._batches_in_epoch,
            "log": {
                "window": self._window.state_dict(),
                "tr_loss": self.accelerator.gather(self._tr_loss.reshape(1)).tolist(),
                "last_logged": self._globalstep_last_logged,
            },
        }
        try:
            return json.dumps(state, allow_nan=False, indent=2) + "\n"
        except (TypeError, ValueError) as error:
            raise TypeError(f"The state_dict of {self._scheduler_description} is not JSON: {error}.") from error

    def _read_repetition_state(self, checkpoint: str) -> dict[str, Any]:
        path = Path(checkpoint, ABR_STATE_NAME)
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return state

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._is_active and checkpoint is not None:
            self._load_repetition_state(checkpoint)

    def _load_repetition_state(self, checkpoint: str) -> None:
        state = self._read_repetition_state(checkpoint)
        if not state:
            step = self.state.global_step
            if self._budget is not None:
                raise ValueError(f"{checkpoint} has no {ABR_STATE_NAME}: what it spent of --max_passes is unknown.")
            logger.warning(
                f"{checkpoint} has no {ABR_STATE_NAME}: taking each of its {step} batches for one ordinary pass."
            )
            self.ledger.batches = self.ledger.updates = step
            self.ledger.passes = Fraction(step)
            return
        self.ledger.load_state_dict(state["ledger"])
        self._skips_in_a_row = [(batch, loss) for batch, loss in state["skips_in_a_row"]]
        self._batches_in_epoch = state["batches_in_epoch"]
        saved, now = state["repeat_scheduler"]["description"], self._scheduler_description
        if saved == now:
            self.repeat_scheduler.load_state_dict(state["repeat_scheduler"]["state"])
        else:
            logger.warning(f"The checkpoint was written under {saved}; {now} starts with an empty history.")
        log = state["log"]
        if self.repeat_scheduler.held():
            if len(log["tr_loss"]) != self.args.world_size:
                raise ValueError(
                    f"{checkpoint} holds batches to train on again, of {len(log['tr_loss'])} processes: resume with "
                    f"as many. There are {self.args.world_size}."
                )
            self._held = load_held(Path(checkpoint), self.args.process_index, self.args.device)
        if len(log["tr_loss"]) == self.args.world_size:
            self._window = LogWindow(**log["window"])
            self._restored_log = log["tr_loss"], log["last_logged"]

    def _position_in_data(self, checkpoint: str, batches_in_epoch: int) -> tuple[int, int] | None:
        """Return the epoch, and the micro-batches of it that are done, where Trainer would get that wrong.

        Args:
            batches_in_epoch: Those of the training set.
        """
        accumulation = self.args.gradient_accumulation_steps
        if not has_length(self.train_dataset):
            # Trainer takes a data set without length for endless, and would look for the position in its first round.
            done = self._read_repetition_state(checkpoint).get("batches_in_epoch")
            if done is not None:
                return int(self.state.epoch or 0), done * accumulation
        if not self._primer_epoch:
            return None
        epoch, done = divmod(self.state.global_step - self._primer_epoch, batches_in_epoch)
        return epoch, done * accumulation

    def _continue_log(self) -> None:
        """After a checkpoint between two logs, go on with the loss that the killed run had summed up."""
        if self._restored_log is not None:
            tr_loss, self._globalstep_last_logged = self._restored_log
            self._tr_loss += tr_loss[self.args.process_index]
            self._total_loss_scalar -= sum(tr_loss) / len(tr_loss)  # `train` returns the mean loss of its own batches
            self._restored_log = None
