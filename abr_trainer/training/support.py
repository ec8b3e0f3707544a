"""What cannot be right with repeats and skips, and why: refused when the trainer is built, or its arguments."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from accelerate.data_loader import DataLoaderDispatcher
from accelerate.utils import DistributedType
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_utils import HubStrategy, has_length
from transformers.utils.import_utils import is_sagemaker_mp_enabled

from ..records.files import TRACE_NAME
from ..schedulers import (
    EasySkip,
    FollowScheduler,
    GainScheduler,
    LearnableScheduler,
    OutlierSkip,
    ReplayScheduler,
    ThresholdScheduler,
    WindowScheduler,
)
from ..schedulers.base import rules_in
from .rollouts import generates

ENGINES = {
    DistributedType.MEGATRON_LM: "Megatron-LM runs its own forward-backward",
    DistributedType.XLA: "XLA traces the loop, and a decision on a loss would cut every trace",
}

WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "MPI_LOCALNRANKS")
ONLINE_TRAINERS = {"A2POTrainer", "AsyncDistillationTrainer", "AsyncGRPOTrainer", "GKDTrainer", "OnlineDPOTrainer"}

READ_LOSSES = (EasySkip, GainScheduler, LearnableScheduler, ReplayScheduler, ThresholdScheduler, WindowScheduler)
"""Rules that decide by losses."""


def refuse_unsupported(trainer: Any, budget: str | None) -> None:
    """Raise a ValueError that says why, if `trainer` is set up for something that repeats would get wrong.

    Args:
        budget: The flag that bounds what the run may spend, if one does.
    """
    args, engine = trainer.args, trainer.accelerator.distributed_type
    bases = {base.__name__ for base in type(trainer).__mro__}
    refusals = [
        (engine in ENGINES, ENGINES.get(engine, "")),
        (
            engine == DistributedType.DEEPSPEED
            and not {"optimizer", "scheduler"}.isdisjoint(trainer.accelerator.state.deepspeed_plugin.deepspeed_config),
            "with an `optimizer` or a `scheduler` in its configuration, DeepSpeed moves the learning rate once an "
            "update, not once a batch. Without them, Trainer's own are used",
        ),
        (
            args.n_gpu > 1,
            f"one process drives {args.n_gpu} GPUs through DataParallel. Start one process a GPU, with torchrun or "
            "accelerate launch, or let it see one GPU by CUDA_VISIBLE_DEVICES",
        ),
        (is_sagemaker_mp_enabled(), "SageMaker model parallelism runs its own forward-backward"),
        (
            max(trainer.get_tp_size(), trainer.get_cp_size(), trainer.get_sp_size()) > 1
            or getattr(trainer, "is_distributed_loading_by_transformers", False),
            "a model or a sequence split over ranks gives each rank a part of the loss",
        ),
        (
            "layerwise" in args.optim or "lomo" in args.optim,
            f"--optim {args.optim.value} updates the weights inside the backward",
        ),
        (
            args.enable_jit_checkpoint and trainer.hp_search_backend is not None,
            "a trial that --enable_jit_checkpoint ends early would be compared with complete ones",
        ),
        (
            (hasattr(trainer, "_buffered_inputs") and not generates(trainer)) or not ONLINE_TRAINERS.isdisjoint(bases),
            f"{type(trainer).__name__} generates its inputs while it trains, in a way of its own. GRPOTrainer and "
            "RLOOTrainer of TRL work",
        ),
    ]
    for refused, reason in refusals:
        if refused:
            raise ValueError(
                f"Batch repetition does not work here: {reason}. Use plain TrainingArguments, or change that."
            )
    refuse_pushing_inputs(args, trainer.repeat_scheduler)
    refuse_for_rollouts(trainer)
    refuse_own_trace(args, trainer.repeat_scheduler)
    if "grad_norm" in trainer.repeat_scheduler.wants:
        refuse_gradient_norm(trainer, engine)
    if budget is not None and args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        refuse_schedule(args.lr_scheduler_type.value, budget)
    if budget is not None and trainer.lr_scheduler is not None:
        check_schedule(trainer.lr_scheduler, budget)


def refuse_hidden_batches(trainer: Any) -> None:
    """Refuse a stream whose last batch may be incomplete, if somebody's `get_batch_samples` hides that from us."""
    if not has_length(trainer.callback_handler.train_dataloader):
        raise ValueError(
            f"{trainer.get_batch_samples.__module__} replaces `get_batch_samples` of {type(trainer).__name__} without "
            "calling it. With a data set of unknown length, a batch that its end cuts off would leave its gradient to "
            "the next one. Replace that of transformers.Trainer, or call `super().get_batch_samples`."
        )


def may_differ_over_ranks(trainer: Any) -> bool:
    """Tell whether ranks may get different numbers of micro-batches, which only their loaders know.

    A loader of accelerate that dispatches batches gives each rank as many.
    """
    loader = trainer.callback_handler.train_dataloader
    is_dispatched = isinstance(loader, DataLoaderDispatcher)
    return trainer.args.world_size > 1 and not is_dispatched and not has_length(loader)


def refuse_cut_batch(drawn: Sequence[int], needed: int) -> NoReturn:
    """Refuse a training set that ends in the middle of its first batch.

    Args:
        drawn: The micro-batches of each rank.
        needed: How many make a batch.
    """
    ended = f"The training set ended after {min(drawn)} micro-batches"
    on_a_rank = f" on rank {drawn.index(min(drawn))} of {len(drawn)}" if len(drawn) > 1 else ""
    raise ValueError(
        f"{ended}{on_a_rank}, before the first batch of --gradient_accumulation_steps {needed} was complete."
    )


def refuse_pushing_inputs(args: Any, scheduler: Any) -> None:
    """Refuse to push checkpoints in which a rule keeps training data."""
    strategy = HubStrategy(args.hub_strategy).value
    if "inputs" in scheduler.wants and args.push_to_hub and "checkpoint" in strategy:
        raise ValueError(
            f"--hub_strategy {strategy} would push training data: the rule keeps batches to train on again in each "
            "checkpoint. Use --hub_strategy every_save or end."
        )


def refuse_for_rollouts(trainer: Any) -> None:
    """Refuse rules that say nothing about generated batches, and those that say nothing about others."""
    name, given = type(trainer).__name__, trainer.repeat_scheduler
    if not generates(trainer):
        if "policy" in given.wants:
            raise ValueError(
                f"{given!r} is for trainers that generate their batches, such as GRPOTrainer of TRL. {name} does not."
            )
        return
    why = f"{name} generates its batches, and the loss of one says nothing about it"
    for rule in rules_in(given):
        if isinstance(rule, OutlierSkip):
            raise ValueError(f"{why}: use --skip_outliers none.")
        if isinstance(rule, READ_LOSSES):
            raise ValueError(f"{why}, but {rule!r} looks at it. Use --repeat_scheduler kl, fixed or baseline.")
    strategy = HubStrategy(trainer.args.hub_strategy).value
    if trainer.args.push_to_hub and "checkpoint" in strategy:
        raise ValueError(
            f"--hub_strategy {strategy} would push the generated rows that wait in each checkpoint. Use "
            "--hub_strategy every_save or end."
        )


def refuse_own_trace(args: Any, scheduler: Any) -> None:
    """Refuse to follow a trace that this run would write over, or delete."""
    *_, scheduler = rules_in(scheduler)
    if not isinstance(scheduler, FollowScheduler) or args.output_dir is None:
        return
    followed, directory = scheduler.path.resolve(), Path(args.output_dir).resolve()
    is_deleted = getattr(args, "overwrite_output_dir", False) and directory in followed.parents
    if followed == directory / TRACE_NAME or is_deleted:
        raise ValueError(
            f"--trace {scheduler.trace} is in --output_dir {args.output_dir}, where this run writes its own trace. "
            "Use another --output_dir, or move the trace."
        )


def refuse_gradient_norm(trainer: Any, engine: DistributedType) -> None:
    """Refuse to decide after the backward where that is too late, or where the gradient cannot be seen."""
    reasons = {
        DistributedType.DEEPSPEED: "DeepSpeed updates the weights inside the backward",
        DistributedType.FSDP: "FSDP1 shows each rank its own part of the gradient only: use FSDP2",
    }
    sees_it = engine == DistributedType.FSDP and trainer.accelerator.is_fsdp2
    if engine in reasons and not sees_it:
        raise ValueError(f"--skip_grad_norm does not work here: {reasons[engine]}.")


def check_schedule(scheduler: Any, budget: str) -> None:
    """Refuse a learning-rate schedule that a budget cannot drive: one that is no function of the step."""
    if not isinstance(scheduler, LambdaLR):
        refuse_schedule(type(scheduler).__name__, budget)


def refuse_schedule(name: str, budget: str) -> None:
    raise ValueError(
        f"{budget} makes the learning rate a function of what is spent, which {name} is not. "
        "Use a schedule that is a function of the step, such as linear or cosine."
    )


def refuse_single_process_launch() -> None:
    """Raise a ValueError where `accelerate launch --cpu` was asked for several processes: it starts one, silently."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if on_cpu and "MASTER_PORT" in os.environ and os.environ.keys().isdisjoint(WORLD_SIZES):
        raise ValueError(
            "`accelerate launch --cpu` was asked for several processes and started one. Use `torchrun "
            "--nproc_per_node N ...` with --use_cpu instead."
        )
