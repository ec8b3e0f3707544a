"""Carry out what a repeat scheduler decides, inside an unmodified Trainer.

One batch, start to end:

     micro-batches --> super().training_step each         the first pass is the probe: no extra forward
                         | mean over micro-batches, then over ranks (the one collective)
                   Observation --> repeat_scheduler.decide --> repeats, clamped to what is left of the budget
                         |
          0: the batch never happened    1: nothing to do    n: (n-1) x [clip, optimizer.step, zero_grad, pass again]
                         |                                      as long as the scheduler says `goes_on`;
                         |                                      then the same for earlier batches that it `replay`s
                         |
     stock Trainer resumes: clip, optimizer.step, lr_scheduler.step, global_step += 1
                         |
                     Outcome --> repeat_scheduler.observe
                             +-> callbacks
                         |
     stock Trainer resumes: log / evaluate / save

The decision falls between forward and backward of the micro-batch that completes the batch. A rule that wants the norm
of the gradient is asked once more, after that backward.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import operator
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..hub.pushing import HubMixin, Pushes
from ..perplexity.windows import perplexity_of
from ..schedulers import ConstantScheduler, Observation, Outcome, RepeatScheduler
from ..schedulers.base import NO_TARGETS
from .callbacks import ABRProgressCallback, LogWindow, TraceCallback
from .config import ABRConfig, checkpoints_activations
from .empty_rows import find_rows_without_targets
from .engines import forget_batch_of_deepspeed
from .evaluation import PerplexityMixin, refuse_missing_perplexity
from .gradient_norm import gradient_norm
from .held import Call, HeldBatch, check_holdable
from .ledger import ComputeLedger, forward_share
from .loss_scale import LossScale, find_loss_scale, has_own_loss, weighted_loss
from .readiness import mend_generation_config
from .resume import ResumeMixin
from .support import check_schedule, refuse_unsupported
from .targets import first_target, shifts_labels, tally, trainer_counts_targets
from .token_accuracy import Hits, accuracy_of, counting_hits, summed
from .tracking import EarlyStopping, doubt_of_the_best

logger = logging.get_logger(__name__)

EXCERPT_TOKENS = 128
"""How much of each row of a skipped batch is kept, to show which data are broken."""

TRL_COUNTERS = ("_metrics", "_stored_metrics", "_total_train_tokens")


class TooManySkips(RuntimeError):
    """`max_consecutive_skips` batches in a row were skipped: the data, or the model, are broken.

    `hyperparameter_search(catch=(TooManySkips,))` lets optuna go on with the other trials.
    """


@dataclasses.dataclass(frozen=True, slots=True)
class _Decision:
    observation: Observation
    repeats: int
    reason: str
    tokens: int
    forward_flops: float
    learning_rate: float


class _Batch:
    """The micro-batches of one batch as they arrive: references, and the losses of the first pass."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.calls: list[Call] = []
        self.losses: list[Tensor] = []
        self.hits: list[Hits] = []
        self.decision: _Decision | None = None
        self.tr_loss_before: Tensor | None = None
        self.outcome: Outcome | None = None
        self.learning_rate = 0.0
        self.update_withheld = False
        self.excerpts: list[list[int]] = []
        self.evaluation_is_due = False
        self.checkpoint_is_due = False


class ABRMixin(ResumeMixin, PerplexityMixin, HubMixin):
    """Give any `Trainer` subclass batch repetition and skipping: `class MyTrainer(ABRMixin, SomeTrainer)`.

    With plain `TrainingArguments` and no scheduler it changes nothing at all.

    Args:
        repeat_scheduler: Decides instead of the one that `ABRConfig` describes, outlier skipping included: to skip
            outliers around it, wrap it in `RobustOutlierSkip`.
        primer_dataset: What the run begins with: `primer_batches` batches of it, in order, as an epoch -1.
        eval_measurement: Measures something else of the model at each evaluation of a single `eval_dataset`; returns
            numbers by name, which join the metrics as `eval_*`. Called on all ranks; see `measurement.Measurement`.

    Raises:
        ValueError: An argument of the trainer cannot be right with repeats; the message says why.
    """

    control: Any
    current_gradient_accumulation_steps: int
    _total_loss_scalar: float

    def __init__(
        self,
        *args: Any,
        repeat_scheduler: RepeatScheduler | None = None,
        primer_dataset: Any = None,
        eval_measurement: Callable[[nn.Module], Mapping[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        if repeat_scheduler is not None and not isinstance(repeat_scheduler, RepeatScheduler):
            raise TypeError(f"`repeat_scheduler` must be an instance of RepeatScheduler, got {repeat_scheduler!r}.")
        self._inspected: tuple[Any, bool] | None = None  # a training set, and whether all of its rows were looked at
        self._pushes = Pushes()  # first: Trainer makes the repository while it is constructed
        super().__init__(*args, **kwargs)
        self._is_active = isinstance(self.args, ABRConfig) or repeat_scheduler is not None
        self._given_scheduler = repeat_scheduler
        self._initial_scheduler_state = (
            {} if repeat_scheduler is None else copy.deepcopy(repeat_scheduler.state_dict())
        )
        self.primer_dataset = primer_dataset
        self.eval_measurement = eval_measurement
        self._reset_repetition()
        if primer_dataset is not None:
            self._check_primer()
        if eval_measurement is not None and isinstance(self.eval_dataset, dict):
            raise ValueError("`eval_measurement` goes with a single `eval_dataset`, not with a dictionary of them.")
        if self._is_active:
            refuse_unsupported(self, self._budget)
            refuse_missing_perplexity(self)
            if self._setting("eval_passes") and self.eval_dataset is None:
                raise ValueError("--eval_passes needs something to evaluate on: --do_eval, or an `eval_dataset`.")
            self._trace = TraceCallback()
            self.add_callback(self._trace)
            if (patience := self._setting("early_stopping_patience")) is not None:
                self.add_callback(EarlyStopping(patience, self._setting("early_stopping_threshold")))
            if any(type(callback) is ProgressCallback for callback in self.callback_handler.callbacks):
                self.remove_callback(ProgressCallback)
                self.add_callback(ABRProgressCallback(shows_perplexity=self._loss_is_of_tokens))

    # ---- A run ----

    def _setting(self, name: str) -> Any:
        """Return an `ABRConfig` argument, or its default under plain `TrainingArguments`."""
        return getattr(self.args, name, ABRConfig.__dataclass_fields__[name].default)

    @property
    def _loss_is_of_tokens(self) -> bool:
        """Whether exp of the training loss is a perplexity."""
        return shifts_labels(self) and self.label_smoother is None and not has_own_loss(self)

    @property
    def _budget(self) -> int | None:
        return self._setting("max_passes")

    def _reset_repetition(self) -> None:
        """Forget everything a run has learnt and spent."""
        if self._given_scheduler is not None:
            self.repeat_scheduler = self._given_scheduler
            self.repeat_scheduler.load_state_dict(copy.deepcopy(self._initial_scheduler_state))
        else:
            self.repeat_scheduler = self.args.build_repeat_scheduler() if self._is_active else ConstantScheduler()
        self._scheduler_description = repr(self.repeat_scheduler)
        self.ledger = ComputeLedger()
        if self._is_active:
            self.ledger.share = self._forward_share()
            self._forward_flops_per_token = self._forward_flops()
        self._batch = _Batch()
        self._held: dict[int, HeldBatch] = {}
        self._window = LogWindow()
        self._skips_in_a_row: list[tuple[int, str]] = []
        self._loss_scale: LossScale | None = None
        self._non_finite_batches = 0
        self._batches_in_epoch = 0
        self._rows_passed = self._rows_without_targets = 0
        self._saved_at: int | None = None

    def _forward_share(self) -> Fraction:
        sizes = self._parameter_sizes()
        trainable = sum(size for parameter, size in sizes.items() if parameter.requires_grad)
        engine = getattr(self.accelerator.state, "fsdp_plugin", None)
        recomputes = checkpoints_activations(self.args) or bool(getattr(engine, "activation_checkpointing", False))
        return forward_share(2 * trainable < sum(sizes.values()), recomputes)

    def _parameter_sizes(self) -> dict[nn.Parameter, int]:
        # ZeRO-3 leaves nothing of a parameter in its place but the size.
        return {each: getattr(each, "ds_numel", each.numel()) for each in self.model.parameters()}

    def _forward_flops(self) -> float:
        """Return the FLOPs of a forward over one token."""
        if any(hasattr(parameter, "ds_numel") for parameter in self.model.parameters()):
            tables = {module.weight for module in self.model.modules() if isinstance(module, nn.Embedding)}
            return 2.0 * sum(size for parameter, size in self._parameter_sizes().items() if parameter not in tables)
        # Trainer's estimate for a forward-backward with all weights trainable is 6 a parameter and token, and linear
        # in the tokens. A forward is a third of it.
        token = {getattr(self.model, "main_input_name", "input_ids"): torch.zeros((1, 1), dtype=torch.long)}
        return self.floating_point_ops(token) / 3

    def _hp_search_setup(self, trial: Any) -> None:
        is_trial = self._is_active and self.hp_search_backend is not None and trial is not None
        if is_trial and isinstance(self.args, ABRConfig):
            self.args.max_steps = self.args.most_batches
        super()._hp_search_setup(trial)
        if is_trial:
            if isinstance(self.args, ABRConfig):
                self.args.plan()
            refuse_unsupported(self, self._budget)

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, checkpoint: Any, trial: Any
    ) -> tuple[int, int]:
        # The start of every inner training loop, those among them that follow an out-of-memory error.
        self._reset_repetition()
        self._restored_log = None
        position: tuple[int, int] = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial
        )
        if not self._is_active:
            return position
        self._trace.directory = Path(self._get_output_dir(trial))
        self._warn_of_rows_without_targets()
        if self._budget is not None:
            # Shares of the run, such as `eval_steps=0.1`, are shares of the budget.
            self.state.compute_steps(self.args, self._budget)
        mend_generation_config(self.model)
        if checkpoint is not None:
            self._restore_evaluations(checkpoint)
            if self._has_ended(checkpoint):
                return num_train_epochs, 0
        if self.state.global_step < self._primer_epoch:
            return -1, self.state.global_step * self.args.gradient_accumulation_steps
        if checkpoint is None or self.args.ignore_data_skip:
            return position
        return self._position_in_data(checkpoint, num_update_steps_per_epoch) or position

    # ---- Rows without targets ----

    def _warn_of_rows_without_targets(self) -> None:
        """Say which rows of the training set have no targets, where that is known without running anybody's code."""
        if self._inspected is None or self._inspected[0] is not self.train_dataset:
            found = find_rows_without_targets(self.train_dataset, self.data_collator, first_target(self))
            self._inspected = self.train_dataset, found is not None and found.is_all
            if found is not None and found.indices and self.is_world_process_zero():
                logger.warning(f"{found.describe('training')} A batch of such rows alone is skipped.")

    def _tell_of_rows_without_targets(self) -> None:
        """Say how many rows without targets went by, where they could not be counted before."""
        was_told = self._inspected is not None and self._inspected[1]
        if self._rows_without_targets and not was_told and self.is_world_process_zero():
            logger.warning(
                f"{self._rows_without_targets:,} of the {self._rows_passed:,} rows that went by had no target (a "
                "label other than -100)."
            )

    # ---- The primer: an epoch -1 before the others ----

    def _check_primer(self) -> None:
        if self._primer_epoch < 1:
            raise ValueError("A primer needs --primer_batches: how many batches of it to train on.")
        if self._primer_rows > len(self.primer_dataset):
            raise ValueError(
                f"The primer has {len(self.primer_dataset)} blocks; --primer_batches {self._primer_epoch} needs "
                f"{self._primer_rows}. Give a longer --primer_file or ask for fewer batches."
            )

    @property
    def _primer_epoch(self) -> int:
        """Batches that the run begins with, before the training set."""
        return 0 if self.primer_dataset is None else self._setting("primer_batches")

    @property
    def _primer_rows(self) -> int:
        return self._primer_epoch * self.get_total_train_batch_size(self.args)

    def set_initial_training_values(self, args: Any, dataloader: Any) -> tuple[Any, ...]:
        *values, max_steps = super().set_initial_training_values(args, dataloader)
        return (*values, max_steps if args.max_steps > 0 else max_steps + self._primer_epoch)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if kwargs["epoch"] < 0:
            kwargs["train_dataloader"] = self._get_dataloader(
                dataset=[self.primer_dataset[row] for row in range(self._primer_rows)],
                description="Primer",
                batch_size=self._train_batch_size,
                is_training=True,
            )
            kwargs["num_update_steps_per_epoch"] = self._primer_epoch
            kwargs["steps_in_epoch"] = self._primer_epoch * self.args.gradient_accumulation_steps
        super()._run_epoch(*args, **kwargs)
        self._batches_in_epoch = 0

    # ---- One batch ----

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        if not self._is_active:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        self._batch = _Batch()
        batch_samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if len(batch_samples) < num_batches:
            # A data set without length ended in the middle of a batch. Trainer would leave its gradients to the next.
            if batch_samples and self.state.global_step == 0:
                raise ValueError(
                    f"The training set ended after {len(batch_samples)} micro-batches, before the first batch of "
                    f"--gradient_accumulation_steps {num_batches} was complete."
                )
            return [], None
        return batch_samples, num_items_in_batch

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        plain_pass = functools.partial(super().training_step, model)
        if not self._is_active:
            return plain_pass(inputs, *args, **kwargs)
        batch = self._batch

        def one_pass(inputs: Any, *args: Any, hits: list[Hits] | None = None, **kwargs: Any) -> Tensor:
            with self._counting_hits(model, inputs, batch.hits if hits is None else hits):
                return plain_pass(inputs, *args, **kwargs)

        if not batch.calls:
            self._continue_log()
            self._find_loss_scale(model, inputs, *args, **kwargs)
            batch.tr_loss_before = self._tr_loss.clone()
        batch.calls.append((copy.copy(inputs), args, kwargs))
        if not self.accelerator.gradient_state.sync_gradients:
            batch.losses.append(one_pass(inputs, *args, **kwargs))
            return batch.losses[-1]

        def decide(loss: Tensor) -> bool:
            batch.decision = batch.decision or self._decide([*batch.losses, loss.detach()])
            return batch.decision.repeats > 0

        # Before its last backward, FSDP keeps the gradients of a batch where `zero_grad` does not reach them.
        must_finish = self.is_fsdp_enabled and len(batch.calls) > 1
        with contextlib.nullcontext() if must_finish else self._before_backward(decide):
            loss = one_pass(inputs, *args, **kwargs)
        backwards = len(batch.calls) - (batch.decision is not None and batch.decision.repeats == 0)
        decide(loss)
        assert batch.decision is not None
        batch.decision = decision = self._look_at_gradient(batch.decision, model)
        batch.losses.append(loss)
        self._carry_out(decision, model, one_pass, backwards)
        if not math.isfinite(decision.observation.loss):
            # Neither this loss nor those before it in the batch enter the logged mean; `log` divides by the others.
            self._tr_loss.copy_(batch.tr_loss_before)
            self._non_finite_batches += 1
            if self.is_world_process_zero():
                loss_is = f"its loss is {decision.observation.loss}"
                why = "it has no targets (labels other than -100)" if decision.reason == NO_TARGETS else loss_is
                logger.warning(f"Batch {decision.observation.batch + 1} is skipped: {why}.")
            return torch.zeros_like(loss)
        return loss

    @contextlib.contextmanager
    def _before_backward(self, wanted: Callable[[Tensor], bool]) -> Iterator[None]:
        """Ask `wanted(loss)` before each backward in this context, and leave the backward out where it is not."""
        shadowed = vars(self.accelerator).get("backward")
        backward = self.accelerator.backward

        def gated(loss: Tensor, **kwargs: Any) -> None:
            if wanted(loss):
                backward(loss, **kwargs)

        self.accelerator.backward = gated
        try:
            yield
        finally:
            if shadowed is None:
                del self.accelerator.backward
            else:
                self.accelerator.backward = shadowed

    @contextlib.contextmanager
    def _counting_hits(self, model: nn.Module, inputs: Any, hits: list[Hits]) -> Iterator[None]:
        """Count the tokens that the forward in this context predicts right, if the rule wants to know."""
        if "accuracy" not in self.repeat_scheduler.wants:
            yield
            return
        with counting_hits(model, inputs, shifts_labels(self), hits):
            yield

    def _decide(self, losses: list[Tensor]) -> _Decision:
        """Average the first-pass loss over ranks, and decide. The same on every rank, because what it looks at is."""
        batch = self._batch
        tallied = tally([inputs for inputs, _, _ in batch.calls], first_target(self), self.label_names)
        costs = self._tokens_and_forward_flops()
        numbers = self._begin_mean(batch.calls, losses, *tallied, *costs, *summed(batch.hits))()
        loss, targets, empty_rows, rows, tokens, forward_flops, *hits = numbers
        self._rows_without_targets += int(empty_rows)
        self._rows_passed += int(rows)
        # A loss of somebody's own may have more to it than labels: it tells itself whether there is nothing in it.
        is_empty = not targets and (self._loss_is_of_tokens or not loss or not math.isfinite(loss))
        observation = Observation(
            batch=self.ledger.batches,
            loss=math.nan if is_empty else loss,
            progress=self._progress(),
            accuracy=accuracy_of(*hits) if hits else None,
        )
        repeats, reason = (0, NO_TARGETS) if is_empty else self._choose(observation)
        return _Decision(
            observation=observation,
            repeats=repeats,
            reason=reason,
            tokens=int(tokens),
            forward_flops=forward_flops,
            learning_rate=self._get_learning_rate(),
        )

    def _look_at_gradient(self, decision: _Decision, model: nn.Module) -> _Decision:
        """Decide anew after the backward, if the rule wants the norm of the gradient and has not skipped the batch."""
        is_open = decision.repeats > 0 and decision.reason != "primer"
        if not is_open or "grad_norm" not in self.repeat_scheduler.wants:
            return decision
        scaler = self.accelerator.scaler
        norm = gradient_norm(model) / (1.0 if scaler is None else scaler.get_scale())
        mean = self._begin_sum(norm)()[0] / self.args.world_size  # the same on all ranks, to the last bit
        observation = dataclasses.replace(decision.observation, grad_norm=mean)
        if math.isfinite(mean):
            repeats, reason = self._choose(observation)
        elif scaler is None:
            repeats, reason = 0, "non-finite"
        else:
            return decision  # the scaler withholds this update, and lowers its scale
        return dataclasses.replace(decision, observation=observation, repeats=repeats, reason=reason)

    def _choose(self, observation: Observation) -> tuple[int, str]:
        """Return the repeats that the budget has room for, and the reason."""
        repeats, reason = self._ask_scheduler(observation)
        left = self._passes_left()
        return (int(left), "budget") if repeats > left else (repeats, reason)

    def _passes_left(self) -> float:
        """Return the whole passes that are left of the budget: all there are without one."""
        return math.inf if self._budget is None else math.floor(self._budget - self.ledger.passes)

    def _ask_scheduler(self, observation: Observation) -> tuple[int, str]:
        if not math.isfinite(observation.loss):
            return 0, "non-finite"
        if observation.batch < self._setting("primer_batches"):
            return 1, "primer"
        decided = self.repeat_scheduler.decide(observation)
        try:
            repeats = operator.index(decided)
        except TypeError:
            raise TypeError(f"decide of {self.repeat_scheduler} must return an integer, got {decided!r}.") from None
        if repeats < 0:
            raise ValueError(f"decide of {self.repeat_scheduler} must return 0 (skip) or more, got {repeats}.")
        return repeats, self.repeat_scheduler.explain(observation)

    def _carry_out(
        self, decision: _Decision, model: nn.Module, one_pass: Callable[..., Tensor], backwards: int
    ) -> None:
        """Make all updates but the last, which Trainer makes; or none, and keep Trainer from making it."""
        batch, micro_batches = self._batch, len(self._batch.calls)
        spent_before = self.ledger.passes
        self.ledger.charge_pass(micro_batches, backwards, decision.tokens, decision.forward_flops)
        losses, repeats, reason = [decision.observation.loss], decision.repeats, decision.reason
        accuracy: float | None = None
        this = HeldBatch(batch.calls, decision.tokens, decision.forward_flops)
        while len(losses) < repeats:
            if len(losses) > 1 and not self.repeat_scheduler.goes_on(decision.observation, losses, accuracy):
                repeats = len(losses)
                break
            self._update(model)
            loss, accuracy = self._pass_again(this, model, one_pass)
            losses.append(loss)
            if not math.isfinite(loss):
                repeats, reason = len(losses) - 1, "non-finite"
        replayed = self._replay(decision, model, one_pass) if 0 < repeats == len(losses) else ()
        if repeats < len(losses) or not all(math.isfinite(loss) for _, loss in replayed):
            self._withhold_update(model)
        if repeats == 0:
            batch.excerpts = self._excerpts()
        batch.outcome = Outcome(decision.observation, repeats, tuple(losses), reason, replayed)
        batch.learning_rate = decision.learning_rate
        if self._is_spent():
            self.state.max_steps = self.state.global_step + 1  # Trainer stops, evaluates and saves by its own rules.
        is_last = self.state.global_step + 1 >= self.state.max_steps
        wants_last = is_last and self.args.load_best_model_at_end and self._setting("eval_passes") is not None
        batch.evaluation_is_due = self._crosses_mark("eval_passes", spent_before) or wants_last
        batch.checkpoint_is_due = self._crosses_mark("save_passes", spent_before)

    def _replay(
        self, decision: _Decision, model: nn.Module, one_pass: Callable[..., Tensor]
    ) -> tuple[tuple[int, float], ...]:
        """Pass over the earlier batches that the scheduler names, up to the first whose loss is not finite."""
        if decision.reason == "primer":
            return ()
        replayed: list[tuple[int, float]] = []
        for index in self.repeat_scheduler.replay(decision.observation):
            if index not in self._held:
                raise ValueError(
                    f"replay of {self.repeat_scheduler} must return batches that it held, by index from 0; "
                    f'got {index!r}. To hold any, it must have "inputs" in `wants`.'
                )
            if self._passes_left() < 1:
                break
            self._update(model)
            loss, _ = self._pass_again(self._held[index], model, one_pass)
            replayed.append((index, loss))
            if not math.isfinite(loss):
                break
        return tuple(replayed)

    def _hold(self, batch: _Batch, outcome: Outcome) -> None:
        """Keep the inputs of the batches that the scheduler wants to come back to, and no others."""
        if "inputs" not in self.repeat_scheduler.wants:
            return
        check_holdable(batch.calls)
        wanted = set(self.repeat_scheduler.held())
        index = outcome.observation.batch
        if index in wanted and batch.decision is not None:
            self._held[index] = HeldBatch(batch.calls, batch.decision.tokens, batch.decision.forward_flops)
        self._held = {index: held for index, held in self._held.items() if index in wanted}

    def _update(self, model: nn.Module) -> None:
        """Do what Trainer does between the last backward of a batch and the next forward."""
        if self.args.max_grad_norm > 0:
            self._clip_grad_norm(model)
        self.control = self.callback_handler.on_pre_optimizer_step(self.args, self.state, self.control)
        self.optimizer.step()
        self.control = self.callback_handler.on_optimizer_step(self.args, self.state, self.control)
        if self._budget is not None:
            self.lr_scheduler.step()
        model.zero_grad()

    @contextlib.contextmanager
    def _counted_once(self) -> Iterator[None]:
        """Undo what passes in this context add to the counters of TRL's trainers, which count in `compute_loss`."""
        counters = {name: copy.deepcopy(value) for name, value in self.__dict__.items() if name in TRL_COUNTERS}
        yield
        self.__dict__.update(counters)

    def _pass_again(
        self, held: HeldBatch, model: nn.Module, one_pass: Callable[..., Tensor]
    ) -> tuple[float, float | None]:
        """Run one more pass over a whole batch, and return its loss and accuracy over all ranks."""
        losses: list[Tensor] = []
        hits: list[Hits] = []
        mean: Callable[[], list[float]] | None = None

        def begin_mean(loss: Tensor) -> bool:
            nonlocal mean
            mean = mean or self._begin_mean(held.calls, [*losses, loss.detach()], *summed(hits))
            # DeepSpeed's backward is the update too. Elsewhere the device goes on with it while the loss is read.
            return not self.is_deepspeed_enabled or math.isfinite(mean()[0])

        # What Trainer divides losses by, where the model does not: the last batch of an epoch may have had fewer.
        steps_now: int = self.current_gradient_accumulation_steps
        self.current_gradient_accumulation_steps = len(held.calls)
        each_syncs = self.is_deepspeed_enabled or self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch")
        with self._counted_once():
            for i, (inputs, args, kwargs) in enumerate(held.calls, start=1):
                is_last = i == len(held.calls)
                self.accelerator.gradient_state._set_sync_gradients(is_last)
                with contextlib.ExitStack() as context:
                    if is_last:
                        context.enter_context(self._before_backward(begin_mean))
                    elif not each_syncs:
                        context.enter_context(self.accelerator.no_sync(model))
                    losses.append(one_pass(copy.copy(inputs), *args, hits=hits, **kwargs))
        self.current_gradient_accumulation_steps = steps_now
        loss, *counts = (mean or self._begin_mean(held.calls, losses, *summed(hits)))()
        self.ledger.charge_pass(len(held.calls), len(held.calls), held.tokens, held.forward_flops)
        return loss, accuracy_of(*counts) if counts else None

    def _withhold_update(self, model: nn.Module) -> None:
        """Make Trainer's clip, `optimizer.step` and `zero_grad` do nothing: no weight, moment or scale changes.

        Gradients of zero would not do: momentum and weight decay move the weights under them.
        """
        model.zero_grad()
        if self.is_deepspeed_enabled:
            forget_batch_of_deepspeed(model)
        self.accelerator.gradient_state._set_sync_gradients(False)
        self.optimizer._is_overflow = False  # of an earlier batch: it would keep the learning rate from ticking
        self._batch.update_withheld = True

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return None if self._batch.update_withheld else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return None if self._batch.update_withheld else super()._get_grad_norm(model, grad_norm=grad_norm)

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, model: nn.Module, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        # Called once after each batch, and once more at the end of an epoch.
        outcome = self._batch.outcome
        if outcome is not None:
            self._finish_batch(outcome)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        if outcome is not None and len(self._skips_in_a_row) >= self._setting("max_consecutive_skips"):
            if self._saved_at != self.state.global_step:
                self._save_checkpoint(model, trial)
            raise TooManySkips(self._explain_skips(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self._is_active and self._saved_at == self.state.global_step:
            # The epoch has ended since, with an evaluation. A push may have linked the files: they are made anew.
            if self.args.should_save:
                shutil.rmtree(self._checkpoint_folder(trial), ignore_errors=True)
            self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self._saved_at = self.state.global_step

    def _checkpoint_folder(self, trial: Any) -> Path:
        return Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        is_new_best: bool = super()._determine_best_metric(*args, **kwargs)
        if not self._is_active:
            return is_new_best
        if self.args.load_best_model_at_end:
            # What an evaluation decides is in a checkpoint: that the model is the best, or that the run ends early.
            ends_early = self.control.should_training_stop and self.state.global_step < self.state.max_steps
            self.control.should_save = self.control.should_save or is_new_best or ends_early
        return is_new_best or self.control.should_save  # else `save_strategy="best"` drops a checkpoint that is due

    def _finish_batch(self, outcome: Outcome) -> None:
        batch, self._batch = self._batch, _Batch()
        seconds = time.perf_counter() - batch.started
        self.control.should_evaluate = self.control.should_evaluate or batch.evaluation_is_due
        self.control.should_save = self.control.should_save or batch.checkpoint_is_due
        self.accelerator.gradient_state._set_sync_gradients(True)  # a skip has switched it off, for the whole process
        self._batches_in_epoch += 1
        self.ledger.close_batch(outcome.updates, seconds)
        self.repeat_scheduler.observe(outcome)
        self._hold(batch, outcome)
        self._window.observe(outcome)
        if outcome.skipped:
            loss = NO_TARGETS if outcome.reason == NO_TARGETS else f"{outcome.observation.loss:.4g}"
            self._skips_in_a_row.append((outcome.observation.batch, loss))
        else:
            self._skips_in_a_row.clear()
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "on_outcome"):
                callback.on_outcome(
                    self.args,
                    self.state,
                    self.control,
                    outcome=outcome,
                    ledger=self.ledger,
                    learning_rate=batch.learning_rate,
                    seconds=seconds,
                    memory=self._memory(),
                    excerpts=batch.excerpts,
                )

    def _excerpts(self) -> list[list[int]]:
        """Return the first tokens of each row of the batch, padding left out, of all ranks: every rank skips it."""
        rows: list[list[int]] = []
        for inputs, _, _ in self._batch.calls:
            ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
            if isinstance(ids, Tensor) and ids.dim() == 2:
                mask = inputs.get("attention_mask")
                mask = (
                    mask.bool() if isinstance(mask, Tensor) and mask.shape == ids.shape else torch.ones_like(ids) > 0
                )
                rows += [row[kept][:EXCERPT_TOKENS].tolist() for row, kept in zip(ids, mask, strict=True)]
        return gather_object(rows) if self.args.world_size > 1 else rows

    def _memory(self) -> int:
        """Return the bytes in use: on a GPU the most allocated so far, elsewhere what the process holds."""
        if self.args.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.args.device)
        return psutil.Process().memory_info().rss

    def _explain_skips(self, trial: Any) -> str:
        last = ", ".join(
            f"{batch + 1} ({loss if loss == NO_TARGETS else f'loss {loss}'})"  # kept by index, from 0
            for batch, loss in self._skips_in_a_row[-5:]
        )
        return (
            f"{len(self._skips_in_a_row)} batches in a row were skipped, --max_consecutive_skips is "
            f"{self._setting('max_consecutive_skips')}. The last were {last}. The run is saved in "
            f"{self._checkpoint_folder(trial)}: "
            "look at these batches and at the learning rate, or raise the limit, and resume."
        )

    # ---- Compute ----

    def _find_loss_scale(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> None:
        if self._loss_scale is None:
            # A baseline is Trainer, and needs no loss: somebody's `compute_loss` may count its calls.
            is_baseline = isinstance(self.repeat_scheduler, ConstantScheduler) and self.repeat_scheduler.repeats == 1
            is_right = trainer_counts_targets(self) or not self._loss_is_of_tokens
            begin_sum = None if is_baseline and has_own_loss(self) and is_right else self._begin_sum
            with self._counted_once():
                self._loss_scale = find_loss_scale(self, model, inputs, num_items_in_batch, begin_sum)

    def _begin_mean(
        self, calls: list[Call], losses: list[Tensor], *others: Tensor | float
    ) -> Callable[[], list[float]]:
        """Start to average over ranks, and return what waits for the result.

        Args:
            calls: The micro-batches of this rank.
            losses: What `training_step` returned for each of them.
            others: Numbers of this rank.

        Returns:
            A function that returns the mean loss per target of the pass, and the sum over ranks of each other number.
        """
        items = calls[0][1][0] if calls[0][1] else calls[0][2].get("num_items_in_batch")
        loss, weight = weighted_loss(self, self._loss_scale, losses, [inputs for inputs, _, _ in calls], items)
        read = self._begin_sum(loss, weight, *others)

        def mean_and_sums() -> list[float]:
            total, weights, *sums = read()
            return [total / weights if weights else math.nan, *sums]

        return mean_and_sums

    def _begin_sum(self, *scalars: Tensor | float) -> Callable[[], list[float]]:
        """Start to sum over ranks, in rank order: the one place where ranks exchange what rules decide on.

        Returns:
            A function that waits for the sums: the one place where the host waits for the device.
        """
        device = self.args.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        full = functools.partial(torch.full, (), dtype=dtype, device=device)  # does not wait, as `torch.tensor` would
        row = torch.stack([each.to(device, dtype) if isinstance(each, Tensor) else full(each) for each in scalars])
        rows = self.accelerator.gather(row[None]) if self.args.world_size > 1 else row[None]
        arrived: Any = None
        if device.type == "cuda":
            rows, arrived = rows.to("cpu", non_blocking=True), torch.cuda.Event()
            arrived.record()

        def sums() -> list[float]:
            if arrived is not None:
                arrived.synchronize()  # waits for the copy, not for what was launched after it
            return [sum(column) for column in zip(*rows.tolist(), strict=True)]

        return sums

    def _tokens_and_forward_flops(self) -> tuple[int, float]:
        """Return what one forward over this rank's part of the batch costs."""
        main_input = getattr(self.model, "main_input_name", "input_ids")
        tokens = sum(inputs[main_input].numel() for inputs, _, _ in self._batch.calls if main_input in inputs)
        return tokens, tokens * self._forward_flops_per_token

    def _crosses_mark(self, setting: str, spent_before: Fraction) -> bool:
        """Tell whether this batch crosses one of the marks that `eval_passes` or `save_passes` sets on the ledger."""
        if self._setting(setting) is None:
            return False
        every = Fraction(str(self._setting(setting)))  # 0.1 is a tenth
        distance = every if every >= 1 or self._budget is None else every * self._budget
        return self.ledger.passes // distance > spent_before // distance

    def _is_spent(self) -> bool:
        """Tell whether no whole pass fits into the budget any more."""
        return self._budget is not None and self._budget - self.ledger.passes < 1

    def _progress(self) -> float:
        if self._budget is not None:
            return float(self.ledger.passes / self._budget)
        return self.state.global_step / self.state.max_steps if self.state.max_steps > 0 else 0.0

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        budget = self._budget
        if not self._is_active or budget is None:
            return super().create_scheduler(num_training_steps, optimizer)
        scheduler = super().create_scheduler(budget, optimizer)
        check_schedule(scheduler)
        scheduler.lr_lambdas = [self._on_budget_clock(factor, budget) for factor in scheduler.lr_lambdas]
        return scheduler

    def _on_budget_clock(self, factor: Callable[[Any], float], budget: int) -> Callable[[int], float]:
        """Make a learning-rate factor read the ledger instead of counting its own steps."""

        def at_passes_spent(_step: int) -> float:
            return factor(budget if self._is_spent() else float(self.ledger.passes))

        return at_passes_spent

    # ---- Logs and metrics ----

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._is_active and {"loss", "learning_rate"} <= logs.keys() and self._window.batches:
            logs["loss"] = self._window.finite_mean(logs["loss"])
            if self._loss_is_of_tokens:
                logs["perplexity"] = perplexity_of(self._window.mean_loss)
            logs.update(self._window.logs(self.ledger))
            self._window = LogWindow()
        elif self._is_active and "train_runtime" in logs:
            if not self.has_trained:
                del logs["train_loss"]  # the mean of nothing, which Trainer takes for 0
            logs.update({f"train_{name}": value for name, value in self.ledger.summary().items()})
        super().log(logs, *args, **kwargs)

    @property
    def has_trained(self) -> bool:
        """Whether this call of `train` has trained on any batch: not so, where a run that had ended is resumed."""
        return self.state.global_step > getattr(self, "_initial_global_step", 0)  # Trainer has it since 5.20 or so

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        if self._is_active:
            self._tell_of_rows_without_targets()
        loads_best = self._is_active and self.args.load_best_model_at_end
        if loads_best and self.is_world_process_zero() and (doubt := doubt_of_the_best(self.args, self.state)):
            logger.warning(doubt)
        if self._is_active and self._budget is not None:
            # Trainer planned for as many batches as the budget could have bought.
            num_train_samples = self.state.global_step * self.get_total_train_batch_size(self.args)
            self.state.max_steps = self.state.global_step
        if self._non_finite_batches:
            # They gave 0 to the sum that Trainer divides by all batches: make that the mean over the others.
            batches = self.state.global_step - getattr(self, "_initial_global_step", 0)
            finite = batches - self._non_finite_batches
            rest = self._tr_loss.item()
            total = self._total_loss_scalar + rest
            self._total_loss_scalar = (total * batches / finite if finite else math.nan) - rest
        return super()._finalize_training(trial, num_train_samples, start_time)


class ABRTrainer(ABRMixin, Trainer):
    """`transformers.Trainer` with adaptive batch repetition."""
