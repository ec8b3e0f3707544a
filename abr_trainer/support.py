"""What cannot be right with repeats and skips, and why: refused when the trainer is built."""

from __future__ import annotations

from typing import Any

from accelerate.utils import DistributedType
from torch.optim.lr_scheduler import LambdaLR
from transformers.utils.import_utils import is_sagemaker_mp_enabled

ENGINES = {
    DistributedType.MEGATRON_LM: "Megatron-LM runs its own forward-backward",
    DistributedType.XLA: "XLA traces the loop, and a decision on a loss would cut every trace",
}

ONLINE_TRAINERS = {"A2POTrainer", "AsyncDistillationTrainer", "AsyncGRPOTrainer", "GKDTrainer", "OnlineDPOTrainer"}


def refuse_unsupported(trainer: Any, budget: int | None) -> None:
    """Raise a ValueError that says why, if `trainer` is set up for something that repeats would get wrong."""
    args, engine = trainer.args, trainer.accelerator.distributed_type
    bases = {base.__name__ for base in type(trainer).__mro__}
    refusals = [
        (engine in ENGINES, ENGINES.get(engine, "")),
        (
            engine == DistributedType.DEEPSPEED
            and "scheduler" in trainer.accelerator.state.deepspeed_plugin.deepspeed_config,
            "the `scheduler` of a DeepSpeed configuration ticks once an update, not once a batch. Leave it out, and "
            "Trainer's own is used",
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
        (args.enable_jit_checkpoint, "--enable_jit_checkpoint can save in the middle of a batch"),
        (
            hasattr(trainer, "_buffered_inputs") or not ONLINE_TRAINERS.isdisjoint(bases),
            f"{type(trainer).__name__} generates its inputs while it trains, and counts calls of `training_step` to "
            "know when",
        ),
    ]
    for refused, reason in refusals:
        if refused:
            raise ValueError(
                f"Batch repetition does not work here: {reason}. Use plain TrainingArguments, or change that."
            )
    if budget is not None and args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        refuse_schedule(args.lr_scheduler_type.value)
    if budget is not None and trainer.lr_scheduler is not None:
        check_schedule(trainer.lr_scheduler)


def check_schedule(scheduler: Any) -> None:
    """Refuse a learning-rate schedule that a budget cannot drive: one that is no function of the step."""
    if not isinstance(scheduler, LambdaLR):
        refuse_schedule(type(scheduler).__name__)


def refuse_schedule(name: str) -> None:
    raise ValueError(
        f"--max_passes makes the learning rate a function of the compute spent, which {name} is not. "
        "Use a schedule that is a function of the step, such as linear or cosine."
    )
