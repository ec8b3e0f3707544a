"""What is refused, and that the message says why."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from abr_trainer import ABRConfig
from abr_trainer.schedulers import GradNormSkip
from abr_trainer.training.support import refuse_unsupported
from tests.conftest import Scripted, token_rows


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        (DistributedType.MEGATRON_LM, "Megatron-LM runs its own forward-backward"),
        (DistributedType.XLA, "XLA traces the loop"),
        (DistributedType.DEEPSPEED, "with an `optimizer` or a `scheduler` in its configuration, DeepSpeed"),
    ],
)
def test_an_engine_that_cannot_be_right_is_refused(build, monkeypatch, engine, reason):
    trainer = build(repeat_scheduler=Scripted(1))
    plugin = SimpleNamespace(deepspeed_config={"optimizer": {"type": "AdamW"}})
    state = SimpleNamespace(distributed_type=engine, deepspeed_plugin=plugin)
    monkeypatch.setattr(trainer, "accelerator", SimpleNamespace(distributed_type=engine, state=state))
    with pytest.raises(ValueError, match=f"Batch repetition does not work here: {reason}"):
        refuse_unsupported(trainer, budget=None)


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        (DistributedType.DEEPSPEED, "DeepSpeed updates the weights inside the backward"),
        (DistributedType.FSDP, "FSDP1 shows each rank its own part of the gradient only: use FSDP2"),
    ],
)
def test_an_engine_that_hides_the_gradient_is_refused(build, monkeypatch, engine, reason):
    trainer = build(repeat_scheduler=GradNormSkip(Scripted(1)))
    state = SimpleNamespace(distributed_type=engine, deepspeed_plugin=SimpleNamespace(deepspeed_config={}))
    for sees_it in (True, False):
        accelerator = SimpleNamespace(distributed_type=engine, state=state, is_fsdp2=sees_it)
        monkeypatch.setattr(trainer, "accelerator", accelerator)
        if sees_it and engine == DistributedType.FSDP:
            refuse_unsupported(trainer, budget=None)
        else:
            with pytest.raises(ValueError, match=f"--skip_grad_norm does not work here: {reason}"):
                refuse_unsupported(trainer, budget=None)


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_training_data_are_not_pushed_with_checkpoints(tmp_path, strategy):
    options = {"output_dir": str(tmp_path), "push_to_hub": True, "hub_strategy": strategy, "use_cpu": True}
    with pytest.raises(ValueError, match=f"--hub_strategy {strategy} would push training data"):
        ABRConfig(repeat_scheduler="replay", **options)
    ABRConfig(repeat_scheduler="gain", **options)
    ABRConfig(repeat_scheduler="replay", **{**options, "hub_strategy": "every_save"})


@pytest.mark.parametrize(
    ("environment", "is_refused"),
    [
        ({"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}, True),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500", "WORLD_SIZE": "2"}, False),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500", "PMI_SIZE": "2"}, False),
        ({"ACCELERATE_USE_CPU": "True"}, False),
        ({"MASTER_PORT": "29500"}, False),
    ],
)
def test_one_process_where_several_were_asked_for_is_told(tmp_path, monkeypatch, environment, is_refused):
    """`accelerate launch --cpu --num_processes 2` sets the first of these and starts one process."""
    for name in ("WORLD_SIZE", "PMI_SIZE", "MASTER_PORT", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if not is_refused:
        monkeypatch.setattr("transformers.TrainingArguments.__post_init__", lambda self: None)
        ABRConfig(output_dir=str(tmp_path))
        return
    with pytest.raises(ValueError, match="was asked for several processes and started one. Use `torchrun"):
        ABRConfig(output_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim": "lomo"}, "--optim lomo updates the weights inside the backward"),
        ({"optim": "galore_adamw_layerwise"}, "updates the weights inside the backward"),
        (
            {"max_passes": 5, "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
            "--max_passes makes the learning rate a function of what is spent, which reduce_lr_on_plateau is not",
        ),
        (
            {"max_seconds": 5, "lr_scheduler_type": "greedy", "eval_strategy": "epoch"},
            "--max_seconds makes the learning rate a function of what is spent, which greedy is not",
        ),
    ],
)
def test_what_cannot_be_right_is_refused_at_construction(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(repeat_scheduler=Scripted(1), trainer_options={"eval_dataset": token_rows(2)}, **options)
