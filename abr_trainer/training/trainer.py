"""A Trainer that repeats and skips batches: the methods of Trainer that we override, and nothing else.

Each of them hands over to an object with a name. The package's docstring says which, in the order of a batch's life.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer
from transformers import trainer as trainer_module
from transformers.utils import logging

from ..hub.pushing import HubMixin, Pushes
from ..records.errors import Failure
from ..schedulers import ConstantScheduler, RepeatScheduler, RowRule
from .batch import Batch
from .budget import limit_of, put_on_budget_clock
from .callbacks import ABRProgressCallback, TraceCallback, is_training_log
from .config import ABRConfig, checkpoints_activations, refuse_fields_beside, setting
from .dropped_rows import write_ranked
from .dropping import row_gate
from .empty_rows import WatchForEmptyRows
from .evaluation import PerplexityMixin, refuse_missing_perplexity
from .failing import ending_together
from .forward_cost import forward_flops_per_token, forward_share_of
from .held import Call
from .identity import numbered, wants_row_indices
from .ledger import ComputeLedger
from .loss_scale import has_own_loss
from .passes import Passes
from .preemption import Preemption, listening, replace_jit_checkpoint
from .primer import Primer
from .readiness import mend_generation_config
from .recording import record_end, record_run
from .remarks import remark_on
from .resume import ResumeMixin
from .run import Run
from .saving import SavingMixin
from .support import may_differ_over_ranks, refuse_cut_batch, refuse_hidden_batches, refuse_unsupported
from .targets import shifts_labels
from .tensorboard import replace_tensorboard
from .tracking import EarlyStopping, doubt_of_the_best

logger = logging.get_logger(__name__)


class TooManySkips(Failure):
    """`max_consecutive_skips` batches in a row were skipped: the data, or the model, are broken.

    `hyperparameter_search(catch=(TooManySkips,))` lets optuna go on with the other trials.
    """


class ABRMixin(ResumeMixin, SavingMixin, PerplexityMixin, HubMixin):
    """Give any `Trainer` subclass batch repetition and skipping: `class MyTrainer(ABRMixin, SomeTrainer)`.

    With plain `TrainingArguments` and neither a scheduler nor a row rule it changes nothing at all.

    Attributes:
        repeat_scheduler: The rule of this run.
        row_rule: Its rule for rows; None if no rows are dropped.
        tells_if_worse: Whether it warns where the best checkpoint is worse than the model was before training. The
            commands say that in their summary.
        is_preempted: Whether the last call of `train` was ended by SIGTERM, under `enable_jit_checkpoint`. The run is
            saved, and goes on with `train(resume_from_checkpoint=True)`.
        is_recorded: Whether `run.json` is written by whoever trains. Else `train` writes it.

    Args:
        repeat_scheduler: Decides instead of the one that `ABRConfig` describes, outlier skipping included: to skip
            outliers around it, wrap it in `RobustOutlierSkip`.
        row_rule: Decides which rows of a batch are dropped, instead of the rule that `ABRConfig` describes.
        primer_dataset: What the run begins with: `primer_batches` batches of it, in order, as an epoch -1.
        eval_measurement: Measures something else of the model at each evaluation of a single `eval_dataset`; returns
            numbers by name, which join the metrics as `eval_*`. Called on all ranks; see
            `abr_trainer.perplexity.measurement.Measurement`.

    Raises:
        ValueError: An argument of the trainer cannot be right with repeats; the message says why.
    """

    control: Any
    repeat_scheduler: RepeatScheduler
    row_rule: RowRule | None
    tells_if_worse: bool = True
    _preemption: Preemption | None = None

    def __init__(
        self,
        *args: Any,
        repeat_scheduler: RepeatScheduler | None = None,
        row_rule: RowRule | None = None,
        primer_dataset: Any = None,
        eval_measurement: Callable[[nn.Module], Mapping[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        if repeat_scheduler is not None and not isinstance(repeat_scheduler, RepeatScheduler):
            raise TypeError(f"`repeat_scheduler` must be an instance of RepeatScheduler, got {repeat_scheduler!r}.")
        if row_rule is not None and not isinstance(row_rule, RowRule):
            raise TypeError(f"`row_rule` must be an instance of RowRule, got {row_rule!r}.")
        self._pushes = Pushes()  # first: Trainer makes the repository while it is constructed
        super().__init__(*args, **kwargs)
        refuse_fields_beside(self.args, repeat_scheduler, row_rule)
        self._is_active = isinstance(self.args, ABRConfig) or repeat_scheduler is not None or row_rule is not None
        self.is_recorded = False
        self._given_scheduler = repeat_scheduler
        self._initial_scheduler_state = (
            {} if repeat_scheduler is None else copy.deepcopy(repeat_scheduler.state_dict())
        )
        self._given_row_rule = row_rule
        self._initial_row_state = {} if row_rule is None else copy.deepcopy(row_rule.state_dict())
        self.primer_dataset = primer_dataset
        self.eval_measurement = eval_measurement
        self._rows_without_targets = WatchForEmptyRows()
        self._reset_repetition()
        Primer.of(self).check()
        if eval_measurement is not None and isinstance(self.eval_dataset, dict):
            raise ValueError("`eval_measurement` goes with a single `eval_dataset`, not with a dictionary of them.")
        if self._is_active:
            self._refuse_unsupported()
            refuse_missing_perplexity(self)
            if setting(self.args, "eval_passes") and self.eval_dataset is None:
                raise ValueError("--eval_passes needs something to evaluate on: --do_eval, or an `eval_dataset`.")
            self._trace = TraceCallback()
            self.add_callback(self._trace)
            if (patience := setting(self.args, "early_stopping_patience")) is not None:
                self.add_callback(EarlyStopping(patience, setting(self.args, "early_stopping_threshold")))
            self._show_our_columns()
            replace_tensorboard(self.callback_handler)
            self._preemption = replace_jit_checkpoint(self.callback_handler)

    def _show_our_columns(self) -> None:
        """Replace the bar of Trainer, in a terminal or in a notebook, by ours; leave one of the user's own."""
        shows_perplexity = self._loss_is_of_tokens
        kinds = {type(callback).__name__: type(callback) for callback in self.callback_handler.callbacks}
        if kinds.get("ProgressCallback") is ProgressCallback:
            self.remove_callback(ProgressCallback)
            self.add_callback(ABRProgressCallback(shows_perplexity=shows_perplexity))
        elif (theirs := kinds.get("NotebookProgressCallback")) is trainer_module.DEFAULT_PROGRESS_CALLBACK:
            from .notebook import ABRNotebookProgressCallback  # needs IPython

            self.remove_callback(theirs)
            self.add_callback(ABRNotebookProgressCallback(shows_perplexity, self.row_rule is not None))

    @property
    def ledger(self) -> ComputeLedger:
        """What the run has spent."""
        return self._run.ledger

    @property
    def has_begun(self) -> bool:
        """Whether this call of `train` has come to its first batch."""
        return self._is_drawn

    @property
    def has_trained(self) -> bool:
        """Whether this call of `train` has trained on any batch; False if a run that had ended is resumed."""
        return self.state.global_step > self._run.begun_at

    @property
    def remark(self) -> str | None:
        """What the rule of the run that has ended says if it did nothing, or always the same; on the main process."""
        return self._run.remark

    @property
    def _loss_is_of_tokens(self) -> bool:
        """Whether exp of the training loss is a perplexity."""
        return shifts_labels(self) and self.label_smoother is None and not has_own_loss(self)

    # ---- A run ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with ending_together() if self._is_active else contextlib.nullcontext(), listening(self._preemption):
            return super().train(*args, **kwargs)

    def _hp_search_setup(self, trial: Any) -> None:
        is_trial = self._is_active and self.hp_search_backend is not None and trial is not None
        if is_trial and isinstance(self.args, ABRConfig):
            self.args.max_steps = self.args.most_batches
        super()._hp_search_setup(trial)
        if is_trial:
            if isinstance(self.args, ABRConfig):
                self.args.plan()
                self.args.check_trial(trial)
            refuse_fields_beside(self.args, self._given_scheduler, self._given_row_rule)
            self._refuse_unsupported()

    def _refuse_unsupported(self) -> None:
        limit = limit_of(self.args)
        refuse_unsupported(self, None if limit is None else limit.flag)

    def set_initial_training_values(self, args: Any, dataloader: Any) -> tuple[Any, ...]:
        *values, max_steps = super().set_initial_training_values(args, dataloader)
        if self._is_active:
            self._run.consensus.refuse_different_lengths(max_steps)
        return (*values, max_steps if args.max_steps > 0 else max_steps + Primer.of(self).batches)

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, checkpoint: Any, trial: Any
    ) -> tuple[int, int]:
        # The start of every inner training loop, those among them that follow an out-of-memory error.
        self._reset_repetition()
        self._restored_log = None
        position: tuple[int, int] = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial
        )
        self._run.begun_at = self.state.global_step
        if not self._is_active:
            return position
        self._trace.directory, self._trace.has_rows = Path(self._get_output_dir(trial)), self.row_rule is not None
        if self.is_world_process_zero():
            record_run(self, self._trace.directory, is_resumed=checkpoint is not None)
        self._rows_without_targets.warn_at_start(self)
        limit = self._run.budget.limit
        if limit is not None and not limit.counts_seconds:
            # Shares of the run, such as `eval_steps=0.1`, are shares of the budget.
            self.state.compute_steps(self.args, limit.most)
        mend_generation_config(self.model)
        return self._where_to_begin(checkpoint, position, num_train_epochs, num_update_steps_per_epoch)

    def _reset_repetition(self) -> None:
        """Start with a fresh rule and fresh counts."""
        if self._given_scheduler is not None:
            self.repeat_scheduler = self._given_scheduler
            self.repeat_scheduler.load_state_dict(copy.deepcopy(self._initial_scheduler_state))
        else:
            has_fields = isinstance(self.args, ABRConfig)
            self.repeat_scheduler = self.args.build_repeat_scheduler() if has_fields else ConstantScheduler()
        self._scheduler_description = repr(self.repeat_scheduler)
        self.row_rule = self._fresh_row_rule()
        self._row_rule_description = repr(self.row_rule)
        self._run, self._batch, self._is_drawn = Run(self.args, self.accelerator), Batch(), False
        self.is_preempted = False
        if self._is_active and wants_row_indices(self):
            self._run.rows = row_gate(self, self.row_rule)
        self._rows_without_targets.forget_counts()
        if self._is_active:
            engine = getattr(self.accelerator.state, "fsdp_plugin", None)
            recomputes = checkpoints_activations(self.args) or getattr(engine, "activation_checkpointing", False)
            self.ledger.share = forward_share_of(self.model, bool(recomputes))
            self._forward_flops_per_token = forward_flops_per_token(self)

    def _fresh_row_rule(self) -> RowRule | None:
        if self._given_row_rule is not None:
            self._given_row_rule.load_state_dict(copy.deepcopy(self._initial_row_state))
            return self._given_row_rule
        return self.args.build_row_rule() if isinstance(self.args, ABRConfig) else None

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        limit = self._run.budget.limit
        if not self._is_active or limit is None:
            return super().create_scheduler(num_training_steps, optimizer)
        return put_on_budget_clock(super().create_scheduler(limit.most, optimizer), lambda: self._run.budget)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if kwargs["epoch"] < 0:
            kwargs |= Primer.of(self).epoch(self)
        if self._run.closes_epoch:  # its batches are done
            kwargs["num_update_steps_per_epoch"] = 0
            self._load_rng_state(kwargs["resume_from_checkpoint"])  # which Trainer does at the first batch
        super()._run_epoch(*args, **kwargs)
        if self._run.closes_epoch:
            self._run.closes_epoch = False
            self.control.should_training_stop |= self._run.has_ended
        self._run.batches_in_epoch, self._run.is_exhausted = 0, False

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        if self._is_active:
            self._run.count_time()
            self._rows_without_targets.warn_at_end(self)
            if self._ranking is not None and self.is_world_process_zero():
                self._ranking.warn_if_empty()
                directory = self._trace.directory or Path(self.args.output_dir)
                self._ranking.save(directory)
                if directory == Path(self.args.output_dir):  # that of a trial could be pushed
                    write_ranked(self, self._ranking, directory)
        is_finished = self._is_active and not self.is_preempted
        loads_best = is_finished and self.args.load_best_model_at_end
        doubt = doubt_of_the_best(self.args, self.state, self.tells_if_worse) if loads_best else None
        if doubt and self.is_world_process_zero():
            logger.warning(doubt)
        if self._is_active and self._run.budget.limit is not None:
            # Trainer planned for as many batches as the budget could have bought.
            num_train_samples = self.state.global_step * self.get_total_train_batch_size(self.args)
            self.state.max_steps = self.state.global_step
        self._run.leave_out_non_finite(self)
        if is_finished and self.has_trained and trial is None and self.is_world_process_zero():
            self._run.remark = remark_on(self.repeat_scheduler, Path(self.args.output_dir))
            if self.remark is not None:
                logger.warning(self.remark)
        best = self.state.best_model_checkpoint
        if self.is_preempted:  # else Trainer loads the best model, and may delete the checkpoint to go on from
            self.state.best_model_checkpoint = None
        output = super()._finalize_training(trial, num_train_samples, start_time)
        self.state.best_model_checkpoint = best
        if is_finished and self.is_world_process_zero() and not self.is_recorded:
            record_end(self, self._trace.directory or Path(self.args.output_dir), output.metrics)
        return output

    # ---- One batch ----

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(dataset, *args, **kwargs)
        if self._preemption is not None:
            loader = self._preemption.spare_workers(loader)
        is_of_training_set = bool(kwargs.get("is_training")) and dataset is self.train_dataset  # and not the primer
        wanted = is_of_training_set and wants_row_indices(self)
        return numbered(loader, dataset, self.data_collator) if wanted else loader

    @property
    def _is_at_work(self) -> bool:  # methods of Trainer can be called outside of `train` too
        return self._is_active and self.is_in_train

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        if not self._is_at_work:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._run.is_exhausted:  # Trainer asks on, to the end of what it planned
            return [], None
        self._batch, self._is_drawn = Batch(), True
        works_on = getattr(self.callback_handler.train_dataloader, "num_workers", 0) > 0
        with self._run.clock.drawing(epoch_iterator, works_on) as timed:
            batches, drawn = timed, None
            if may_differ_over_ranks(self):
                held = list(itertools.islice(timed, num_batches))
                drawn = self._run.consensus.each(len(held))
                batches = iter(held if min(drawn) == num_batches else ())
            batch_samples, num_items_in_batch = super().get_batch_samples(batches, num_batches, device)
        if len(batch_samples) < num_batches:
            # A data set without length ended in the middle of a batch. Trainer would leave its gradients to the next,
            # and of several ranks those that have rows would wait for those that have none.
            self._run.is_exhausted = True
            drawn = drawn or [len(batch_samples)]
            if any(drawn) and self.state.global_step == 0:
                refuse_cut_batch(drawn, num_batches)
            return [], None
        return batch_samples, num_items_in_batch

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        if not self._is_at_work:
            return super().training_step(model, inputs, *args, **kwargs)
        if not self._is_drawn:
            refuse_hidden_batches(self)
        return self._batch.take(Passes(self, model, super().training_step), Call(inputs, args, kwargs))

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return None if self._batch.update_is_withheld else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return None if self._batch.update_is_withheld else super()._get_grad_norm(model, grad_norm=grad_norm)

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, model: nn.Module, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        # Called once after each batch, and once more at the end of an epoch.
        outcome = self._batch.outcome
        self._run.epoch_is_over = outcome is None
        if outcome is not None:
            self._batch.finish(self, outcome)
            self._batch = Batch()
            self._run.last_update = grad_norm, kwargs.get("learning_rate")
        elif self.is_preempted:
            return  # Trainer leaves the epoch; what is due at its end is done when the run is resumed
        elif kwargs.get("learning_rate", 0) is None:  # resumed after the last batch of the epoch
            grad_norm, kwargs["learning_rate"] = self._run.last_update
            self._continue_log()
        has_waited = self.control.should_evaluate or self.control.should_save
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        if outcome is not None and self._preemption is not None and self._preemption.is_due(self, has_waited):
            self._save_here(model, trial)
            self.is_preempted = self.control.should_training_stop = True
        self._seal_checkpoint()
        limit = setting(self.args, "max_consecutive_skips")
        if outcome is not None and len(self._run.skips_in_a_row) >= limit:
            self._save_here(model, trial)
            self._seal_checkpoint()
            raise TooManySkips(self._run.explain_skips(limit, self._checkpoint_folder(trial)))

    # ---- Logs and checkpoints ----

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        given = set(logs)
        if self._is_active and is_training_log(logs) and self._run.window.batches:
            self._run.complete_log(logs, self._loss_is_of_tokens)
        elif self._is_active and "train_runtime" in logs:
            if not self.has_trained:
                del logs["train_loss"]  # the mean of nothing, which Trainer takes for 0
            logs.update({f"train_{name}": value for name, value in self.ledger.summary().items()})
        times = [name for name in logs if name not in given and name.endswith("seconds")]
        super().log(logs, *args, **kwargs)
        # Callbacks have seen our times. Without them, a resumed run has the log history of an unbroken one.
        for name in times:
            self.state.log_history[-1].pop(name, None)


class ABRTrainer(ABRMixin, Trainer):
    """`transformers.Trainer` with adaptive batch repetition."""
