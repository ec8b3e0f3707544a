"""One pass over a batch: each is a call of Trainer's own `training_step` for each micro-batch, and nothing else."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from accelerate.utils import is_compiled_module
from torch import Tensor, nn

from ..schedulers import PolicyDrift
from .consensus import Agreed
from .engines import forget_batch_of_deepspeed
from .held import Call, HeldBatch, rollouts_of
from .loss_scale import has_own_compute_loss
from .rollouts import counted, drift_of
from .signals import Hits, accuracy_of, counting_hits, summed, watching
from .targets import label_use

COUNTERS = ("_metrics", "_stored_metrics", "_total_train_tokens", "_step", "_current_train_step_time")
COUNTERS_OF_STATE = ("tokens",)


@contextlib.contextmanager
def before_backward(accelerator: Any, wanted: Callable[[Tensor], bool]) -> Iterator[None]:
    """Ask `wanted(loss)` before each backward in this context, and leave the backward out if the answer is no."""
    shadowed = vars(accelerator).get("backward")
    backward = accelerator.backward

    def gated(loss: Tensor, **kwargs: Any) -> None:
        if wanted(loss):
            backward(loss, **kwargs)

    accelerator.backward = gated
    try:
        yield
    finally:
        if shadowed is None:
            del accelerator.backward
        else:
            accelerator.backward = shadowed


@contextlib.contextmanager
def counted_once(trainer: Any) -> Iterator[None]:
    """Undo what passes in this context add to counters of trainers that count in `compute_loss`: TRL's, axolotl's."""
    counted = [(trainer, COUNTERS), (trainer.state, COUNTERS_OF_STATE)]
    before = [
        (owner, {name: copy.deepcopy(value) for name, value in vars(owner).items() if name in names})
        for owner, names in counted
    ]
    yield
    for owner, counters in before:
        vars(owner).update(counters)


METRICS = ("_metrics", "_stored_metrics")
"""Counters among them that hold lists of numbers since the last log, by mode and name."""


def counters_of(trainer: Any) -> dict[str, Any]:
    """Return what such a trainer has counted in training, as JSON; its own checkpoints do not hold that."""
    counters: dict[str, Any] = {
        owner: {name: [repr(float(value)) for value in values] for name, values in counted.items() if is_list(values)}
        for owner in METRICS
        if (counted := (vars(trainer).get(owner) or {}).get("train")) is not None
    }
    if "_total_train_tokens" in vars(trainer):
        counters["_total_train_tokens"] = int(trainer._total_train_tokens)
    return counters


def is_list(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, int | float) for value in values)


def restore_counters(trainer: Any, counters: Mapping[str, Any]) -> None:
    """Let a trainer go on with what `counters_of` has returned."""
    for owner in METRICS:
        if "train" not in (vars(trainer).get(owner) or {}):
            continue
        for name, values in counters.get(owner, {}).items():
            vars(trainer)[owner]["train"][name] = [float(value) for value in values]
    if "_total_train_tokens" in counters:
        trainer._total_train_tokens = counters["_total_train_tokens"]


class Pass(NamedTuple):
    """What is known of a pass over a batch, over all ranks.

    Attributes:
        loss: Mean loss per target, in nats.
        accuracy: Share of the targets predicted right, if it was asked for.
        drift: Of a generated batch, how far the policy had moved.
    """

    loss: float
    accuracy: float | None
    drift: PolicyDrift | None


class Passes:
    """Passes over micro-batches, and the updates between them.

    It lives as long as one call of `training_step`. If it were kept, the trainer would be part of a reference cycle.

    Args:
        trainer: The trainer, with an optimizer.
        model: The model as `training_step` gets it, with what accelerate has put around it.
        training_step: Trainer's own.
    """

    def __init__(self, trainer: Any, model: nn.Module, training_step: Callable[..., Tensor]) -> None:
        self.trainer = trainer
        self.model = model
        self._training_step = training_step

    def one(self, call: Call, hits: list[Hits], judges_rows: bool = False) -> Tensor:
        """Run forward and backward over one micro-batch, and return its loss as Trainer does.

        Args:
            hits: Gets the target tokens that the forward predicts right, if the rule wants to know them.
            judges_rows: Whether it is decided in this pass which rows count, if there is a rule for rows.
        """
        trainer = self.trainer
        with contextlib.ExitStack() as watch:
            if call.rollout is not None:
                watch.enter_context(call.rollout.serving(trainer))
            if has_own_compute_loss(trainer):
                watch.enter_context(self._counting_forwards())
            rows = trainer._run.rows
            if rows is not None:  # before the hits are counted: those of dropped rows are none
                watch.enter_context(rows.watching(trainer, self.model, call, judges_rows))
            if "accuracy" in trainer.repeat_scheduler.wants:
                counts = None if rows is None else rows.counting(call, judges_rows)
                check = counting_hits(self.model, call.inputs, label_use(trainer), hits, counts)
                watch.enter_context(before_backward(trainer.accelerator, watch.enter_context(check)))
            loss = self._training_step(self.model, call.inputs, *call.args, **call.kwargs)
        return loss.clone()  # CUDA graphs write the loss of the next forward into the same memory

    @contextlib.contextmanager
    def _counting_forwards(self) -> Iterator[None]:
        """Count the forwards that a `compute_loss` makes beside the one that gives the loss, of the reference too."""
        trainer, run = self.trainer, self.trainer._run
        models = [self.model if is_compiled_module(self.model) else trainer.model, getattr(trainer, "ref_model", None)]
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            if run.clock.is_generating:
                return
            calls += 1
            run.extra_forwards += calls > 1

        with contextlib.ExitStack() as watch:
            for model in models:
                if isinstance(model, nn.Module):
                    watch.enter_context(watching(model, count))
            yield

    def over(
        self, held: HeldBatch, wanted: Callable[[list[Tensor], list[Hits]], bool] | None
    ) -> tuple[list[Tensor], list[Hits]]:
        """Run one more pass over a whole batch, and return the losses of its micro-batches and their hits.

        Args:
            wanted: Asked before the last backward, with the losses and hits so far; if it says no, there is none.
        """
        trainer = self.trainer
        accelerator = trainer.accelerator
        losses: list[Tensor] = []
        hits: list[Hits] = []
        # Trainer divides losses by this where the model does not. The last batch of an epoch may have fewer.
        steps_now: int = trainer.current_gradient_accumulation_steps
        trainer.current_gradient_accumulation_steps = len(held.calls)
        each_syncs = trainer.is_deepspeed_enabled or accelerator.gradient_state.plugin_kwargs.get("sync_each_batch")
        with counted_once(trainer):
            for i, call in enumerate(held.calls, start=1):
                is_last = i == len(held.calls)
                accelerator.gradient_state._set_sync_gradients(is_last)
                with contextlib.ExitStack() as context:
                    if is_last and wanted is not None:
                        ask = functools.partial(self._ask, wanted, losses, hits)
                        context.enter_context(before_backward(accelerator, ask))
                    elif not (is_last or each_syncs):
                        context.enter_context(accelerator.no_sync(self.model))
                    losses.append(self.one(call._replace(inputs=copy.copy(call.inputs)), hits))
        trainer.current_gradient_accumulation_steps = steps_now
        return losses, hits

    @staticmethod
    def _ask(
        wanted: Callable[[list[Tensor], list[Hits]], bool], losses: list[Tensor], hits: list[Hits], loss: Tensor
    ) -> bool:
        return wanted([*losses, loss.detach()], hits)

    def again(self, held: HeldBatch, accepts: Callable[[Pass], bool] | None = None) -> Pass:
        """Run one more pass over a whole batch.

        Args:
            accepts: Tells whether an update is made of it; DeepSpeed makes it in the backward.
        """
        trainer, consensus = self.trainer, self.trainer._run.consensus
        mean: Callable[[], Agreed] | None = None

        def begin_mean(losses: list[Tensor], hits: list[Hits]) -> bool:
            nonlocal mean
            mean = mean or begin(losses, hits)
            # DeepSpeed's backward is the update too. Elsewhere the device goes on with it while the loss is read.
            return not trainer.is_deepspeed_enabled or is_accepted(seen(mean(), hits))

        def begin(losses: list[Tensor], hits: list[Hits]) -> Callable[[], Agreed]:
            counts = counted(rollouts_of(held.calls))
            read: Callable[[], Agreed] = consensus.begin_mean(trainer, held.calls, losses, *summed(hits), *counts)
            return read

        def seen(agreed: Agreed, hits: list[Hits]) -> Pass:
            of_hits, of_policy = agreed.sums[: 2 * bool(hits)], agreed.sums[2 * bool(hits) :]
            return Pass(agreed.mean / held.share, accuracy_of(*of_hits) if hits else None, drift_of(of_policy))

        def is_accepted(found: Pass) -> bool:
            return math.isfinite(found.loss) and (accepts is None or accepts(found))

        losses, hits = self.over(held, begin_mean)
        agreed = (mean or begin(losses, hits))()
        trainer.ledger.charge_pass(len(held.calls), len(held.calls), held.tokens, held.forward_flops)
        return seen(agreed, hits)

    def update(self) -> None:
        """Do what Trainer does between the last backward of a batch and the next forward."""
        trainer = self.trainer
        if trainer.args.max_grad_norm > 0:
            trainer._clip_grad_norm(self.model)
        events = trainer.callback_handler
        trainer.control = events.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)
        trainer.optimizer.step()
        trainer.control = events.on_optimizer_step(trainer.args, trainer.state, trainer.control)
        if trainer._run.budget.limit is not None:
            trainer.lr_scheduler.step()
        self.model.zero_grad()

    def forget(self) -> None:
        """Leave nothing of the passes since the last update: no gradient of any engine."""
        self.model.zero_grad()
        if self.trainer.is_deepspeed_enabled:
            forget_batch_of_deepspeed(self.model)

    def withhold_update(self) -> None:
        """Make Trainer's clip, `optimizer.step` and `zero_grad` do nothing: no weight, moment or scale changes.

        Setting gradients to zero is not enough: momentum and weight decay would still move the weights.
        """
        trainer = self.trainer
        self.forget()
        if trainer.args.torch_compile:
            # CUDA graphs wait for the backward that was left out.
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        trainer.accelerator.gradient_state._set_sync_gradients(False)
        trainer.optimizer._is_overflow = False  # of an earlier batch: it would keep the learning rate from ticking
