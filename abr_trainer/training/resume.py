"""A resumed run equals an unbroken one: what a checkpoint must hold, and where to go on in the data."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, PreTrainedModel
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..records.files import (
    ABR_STATE_NAME,
    CHECKPOINT_PREFIX,
    TRAINER_STATE,
    newest_first,
    read_json,
    write_whole,
)
from ..schedulers.recorded import must_be_json
from .budget import limit_of
from .callbacks import LogWindow
from .checkpoints import (
    UnfitCheckpoint,
    agreed,
    is_adapted,
    lacks_names,
    load_by_other_names,
    newest_checkpoint,
    refuse_damaged,
    refuse_unfit,
    sound_checkpoint,
)
from .held import load_held, save_held
from .passes import counters_of, restore_counters
from .primer import Primer
from .ranking import RowRanking
from .rollouts import generates, load_rollouts, save_rollouts
from .tracking import evaluations_without_gain
from .waiting import Waiting

logger = logging.get_logger(__name__)


_AnyTrainer: Any = object  # what a type checker sees: a mixin calls the Trainer that it is mixed into


class ResumeMixin(_AnyTrainer):
    """Write `abr_state.json` into each checkpoint of a Trainer with repetition, and go on from it."""

    _restored_log: tuple[list[float], int] | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train`; `resume_from_checkpoint=True` takes the last complete checkpoint.

        Raises:
            UnfitCheckpoint: The run cannot go on from the checkpoint. If there is none, Trainer says so.
        """
        if self._is_active and resume_from_checkpoint and self._is_there(resume_from_checkpoint):
            named = resume_from_checkpoint
            resume_from_checkpoint = agreed(
                lambda: newest_checkpoint(self.args.output_dir) if named is True else sound_checkpoint(str(named)),
                self.args,
            )
            self.check_checkpoint(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _is_there(self, checkpoint: str | bool) -> bool:
        """Tell whether there is something to resume from, complete or not."""
        return any(newest_first(self.args.output_dir)) if checkpoint is True else Path(str(checkpoint)).is_dir()

    def check_checkpoint(self, checkpoint: str) -> None:
        """Check that this run can go on from a checkpoint, and warn where the size of a batch is another one.

        Raises:
            UnfitCheckpoint: It cannot.
        """
        refuse_damaged(checkpoint)
        if isinstance(self.model, PreTrainedModel) or is_adapted(self.model):
            refuse_unfit(checkpoint, self.model)
        limit = limit_of(self.args)
        if limit is not None and not Path(checkpoint, ABR_STATE_NAME).exists():
            raise UnfitCheckpoint(f"{checkpoint} has no {ABR_STATE_NAME}: what it spent of {limit.flag} is unknown.")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._loads_by_other_names(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._loads_by_other_names(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _loads_by_other_names(self, checkpoint: str) -> bool:
        """Load a checkpoint where Trainer would leave out the weights that have other names in it, with a warning."""
        is_whole = isinstance(self.model, PreTrainedModel) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if not (self._is_active and is_whole and lacks_names(Path(checkpoint), self.model)):
            return False
        load_by_other_names(Path(checkpoint), self.model)
        return True

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> Any:
        if self._is_active and skip_scheduler and self.state.global_step > 0:
            return {}  # `eval_on_start` of a resumed run: the evaluation before the first batch is in its log already.
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._is_active:
            save_held(Path(output_dir), self.args.process_index, self._run.held)
            if generates(self):
                save_rollouts(Path(output_dir), self)
            state = self._repetition_state()  # on every rank: an error must not leave the others waiting
            if self.args.should_save:
                write_whole(Path(output_dir, ABR_STATE_NAME), state)
                if self._ranking is not None:
                    self._ranking.save(Path(output_dir))

    def _repetition_state(self) -> str:
        """Return what a resumed run needs, as strict JSON."""
        self._run.count_time()
        state = {
            "format": 1,
            "ledger": self.ledger.state_dict(),
            **self._run.budget.state_dict(),
            "repeat_scheduler": {
                "description": self._scheduler_description,
                "state": self.repeat_scheduler.state_dict(),
            },
            **({"rollouts": {"step": self._step}} if generates(self) else {}),
            **({} if self.row_rule is None else {"row_rule": self._row_rule_state()}),
            "skips_in_a_row": self._run.skips_in_a_row,
            "notices": self._run.notices.state_dict(),
            "waiting": self._run.waiting.state_dict(),
            "batch": self._batch_size(),
            "batches_in_epoch": 0 if self._run.epoch_is_over else self._run.batches_in_epoch,
            "epoch_is_over": self._run.epoch_is_over,
            "log": {
                "last_update": [None if value is None else repr(float(value)) for value in self._run.last_update],
                "counters": counters_of(self),
                "window": self._run.window.state_dict(),
                "tr_loss": self.accelerator.gather(self._tr_loss.reshape(1)).tolist(),
                "last_logged": self._globalstep_last_logged,
            },
        }
        with must_be_json(self._scheduler_description):
            return json.dumps(state, allow_nan=False, indent=2) + "\n"

    def _batch_size(self) -> dict[str, int]:
        """Return what a batch is made of."""
        return {
            "processes": self.args.world_size,
            "per_device_train_batch_size": self._train_batch_size,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
        }

    def _warn_of_another_batch_size(self, checkpoint: str, state: dict[str, Any]) -> None:
        now = self._batch_size()
        of_older_versions = {"processes": len(state["log"]["tr_loss"])}
        before = state.get("batch", of_older_versions)
        changed = [f"{name} {before[name]}, now {now[name]}" for name in before if before[name] != now[name]]
        if changed and self.is_world_process_zero():
            logger.warning(
                f"{checkpoint} was saved with {'; '.join(changed)}. Position in the data, length of the run and "
                "learning rate are counted in batches, so that this run is not the one that was begun."
            )

    # ---- A run that has ended ----

    def _restore_evaluations(self, checkpoint: str) -> None:
        """Go on with the count of evaluations that were not better, and with the best checkpoint.

        The output directory may have been moved. Where the best checkpoint is gone, another one may be the best.
        """
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                callback.early_stopping_patience_counter = evaluations_without_gain(self.state, callback)
        if self.state.best_global_step and self.state.best_model_checkpoint is None:
            beside = Path(checkpoint).with_name(f"{CHECKPOINT_PREFIX}{self.state.best_global_step}")
            if beside.is_dir():
                self.state.best_model_checkpoint = str(beside)
            else:
                self.state.best_metric = self.state.best_global_step = None

    def _why_it_has_ended(self, checkpoint: str) -> str | None:
        """Return why nothing is left to train after a checkpoint, None if there is."""
        budget = self._run.budget
        if budget.limit is not None and budget.is_spent_in(self._read_repetition_state(checkpoint)):
            return f"{budget.limit.flag} {budget.limit.most} are spent"
        if self.state.global_step >= self.state.max_steps:
            by_steps = self.args.max_steps > 0
            return f"--max_steps {self.state.max_steps} is reached" if by_steps else "all epochs are done"
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                counted = callback.early_stopping_patience_counter
                if counted >= callback.early_stopping_patience:
                    return f"{counted} evaluations in a row were not better, as many as --early_stopping_patience"
        return None

    def _has_ended(self, checkpoint: str) -> bool:
        """Tell whether nothing is left to train after a checkpoint, and say why."""
        why = self._why_it_has_ended(checkpoint)
        control = self.state.stateful_callbacks.get("TrainerControl")
        planned = (read_json(Path(checkpoint, TRAINER_STATE)) or {}).get("max_steps", self.state.max_steps)
        had_stopped = isinstance(control, dict) and control["args"]["should_training_stop"]
        had_stopped = had_stopped and self.state.global_step < planned  # else it had come to its end, which was raised
        if self.is_world_process_zero() and why:
            logger.warning(f"The run ended with {checkpoint}: {why}. Nothing is trained; to go on, raise that.")
        elif self.is_world_process_zero() and had_stopped:
            logger.warning(f"The run was stopped after {checkpoint}. It goes on.")
        return why is not None

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
            logger.warning(
                f"{checkpoint} has no {ABR_STATE_NAME}: taking each of its {step} batches for one ordinary pass."
            )
            self.ledger.batches = self.ledger.updates = step
            self.ledger.passes = Fraction(step)
            return
        self.ledger.load_state_dict(state["ledger"])
        self._run.budget.load_state_dict(state)
        self._warn_of_another_batch_size(checkpoint, state)
        self._run.skips_in_a_row = [(batch, loss) for batch, loss in state["skips_in_a_row"]]
        grad_norm, learning_rate = (value and float(value) for value in state["log"].get("last_update", (None, None)))
        self._run.last_update = grad_norm, learning_rate
        self._run.batches_in_epoch = state["batches_in_epoch"]
        saved, now = state["repeat_scheduler"]["description"], self._scheduler_description
        if saved == now:
            self.repeat_scheduler.load_state_dict(state["repeat_scheduler"]["state"])
        else:
            logger.warning(f"The checkpoint was written under {saved}; {now} starts with an empty history.")
        self._run.notices.load_state_dict(state.get("notices", {}))
        self._run.waiting = Waiting(**state.get("waiting", {}))
        self._load_rows(checkpoint, state.get("row_rule"))
        if generates(self) and "rollouts" in state:
            load_rollouts(Path(checkpoint), self, state["rollouts"]["step"])
        log = state["log"]
        restore_counters(self, log.get("counters", {}))
        if self.repeat_scheduler.held():
            if len(log["tr_loss"]) != self.args.world_size:
                raise UnfitCheckpoint(
                    f"{checkpoint} holds batches to train on again, of {len(log['tr_loss'])} processes: resume with "
                    f"as many. There are {self.args.world_size}."
                )
            self._run.held = load_held(Path(checkpoint), self.args.process_index, self.args.device)
        if len(log["tr_loss"]) == self.args.world_size:
            self._run.window = LogWindow(**log["window"])
            self._restored_log = log["tr_loss"], log["last_logged"]

    def _row_rule_state(self) -> dict[str, Any]:
        state = {"description": self._row_rule_description, "state": self.row_rule.state_dict()}
        with must_be_json(self._row_rule_description):
            json.dumps(state, allow_nan=False)
        return state

    @property
    def _ranking(self) -> RowRanking | None:
        return None if self._run.rows is None else self._run.rows.ranking

    def _load_rows(self, checkpoint: str, saved: dict[str, Any] | None) -> None:
        """Go on with the ranking of rows, and with what the row rule had seen."""
        if self._ranking is not None:
            self._ranking.load(Path(checkpoint))
        if self.row_rule is None:
            if saved is not None:
                logger.warning(f"The checkpoint was written under {saved['description']}; no rows are dropped now.")
            return
        now = self._row_rule_description
        if saved is not None and saved["description"] == now:
            self.row_rule.load_state_dict(saved["state"])
        else:
            before = "no rule for rows" if saved is None else saved["description"]
            logger.warning(f"The checkpoint was written under {before}; {now} starts with an empty history.")

    def _where_to_begin(
        self, checkpoint: str | None, position: tuple[int, int], epochs: int, batches_in_epoch: int
    ) -> tuple[int, int]:
        """Return the epoch to begin with, and how many of its micro-batches are done.

        Args:
            checkpoint: What the run goes on from, if it does.
            position: What Trainer returns.
            epochs: Those of the run; to begin after the last one is to train on nothing.
            batches_in_epoch: Those of the training set.
        """
        accumulation = self.args.gradient_accumulation_steps
        primer, step = Primer.of(self).batches, self.state.global_step
        saved: dict[str, Any] = {}
        if checkpoint is not None:
            saved = self._read_repetition_state(checkpoint)
            self._restore_evaluations(checkpoint)
            self._run.has_ended = self._has_ended(checkpoint)
        # Saved after a batch, and not at the end of an epoch: if that is next, what it calls for is not in the log.
        may_end = saved.get("epoch_is_over") is False and not self.args.ignore_data_skip
        if self._run.has_ended and not may_end:
            return epochs, 0
        self._run.closes_epoch = self._run.has_ended
        if step < primer or (may_end and step == primer > 0):
            self._run.closes_epoch |= step == primer
            return -1, step * accumulation
        if checkpoint is None or self.args.ignore_data_skip:
            return position
        if not has_length(self.train_dataset):
            # Trainer takes a data set without length for endless, and would look for the position in its first round.
            done = saved.get("batches_in_epoch")
            if done is not None:
                is_next = saved.get("epoch_is_over", False) and step > primer
                return int(self.state.epoch or 0) + is_next, done * accumulation
        if not (primer or may_end):
            return position
        epoch, done = divmod(step - primer, batches_in_epoch)
        if may_end and not done:
            epoch, done = epoch - 1, batches_in_epoch
        self._run.closes_epoch |= done == batches_in_epoch
        return epoch, done * accumulation

    def _continue_log(self) -> None:
        """After a checkpoint between two logs, go on with the loss that the killed run had summed up."""
        if self._restored_log is not None:
            tr_loss, self._globalstep_last_logged = self._restored_log
            self._tr_loss += tr_loss[self.args.process_index]
            self._total_loss_scalar -= sum(tr_loss) / len(tr_loss)  # `train` returns the mean loss of its own batches
            self._restored_log = None
