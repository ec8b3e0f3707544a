"""Training runs for tests that need processes of their own: `python -m tests.jobs NAME ARGUMENTS`."""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import run_clm_abr
from abr_trainer import ABRConfig, ABRTrainer, RepeatScheduler
from abr_trainer.cli import classify, evaluate
from abr_trainer.data import sources
from abr_trainer.data.arguments import DataArguments
from abr_trainer.data.blocks import load_blocks
from abr_trainer.data.demo import DEMO_MODEL
from abr_trainer.data.prompts import Prompt, prompts_in
from abr_trainer.models.arguments import ModelArguments
from abr_trainer.models.loading import load_config, load_model, load_tokenizer
from abr_trainer.perplexity.measurement import nlls_over_ranks
from abr_trainer.perplexity.windows import Window
from abr_trainer.schedulers import (
    ConstantScheduler,
    ReplayScheduler,
    RobustOutlierSkip,
    RowRule,
    ThresholdScheduler,
    WaitScheduler,
)
from abr_trainer.training.engines import leave_ranks
from abr_trainer.training.generation import continue_over_ranks
from abr_trainer.training.identity import source_of, taken_out
from abr_trainer.training.text_scores import PACKAGES, TextScores
from tests.conftest import (
    QUIET,
    ROOT,
    VOCABULARY,
    Stream,
    broken_row,
    point_client_at,
    tiny_llama,
    token_rows,
    weights,
    without_seconds,
)


class KillAfter(TrainerCallback):
    """End the process without a word, as a power cut would, when the batch after `step` begins."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def resumable(output_dir: str, kill_after: str = "0", resume: bool = False) -> ABRTrainer:
    """Fine-tune the demo model with LoRA dropout under a budget: repeats, skips, a checkpoint between two logs."""
    arguments = ModelArguments(lora_r=2)
    torch.manual_seed(0)
    model = load_model(arguments, load_config(arguments), load_tokenizer(arguments), "cpu")
    rows = token_rows(60, length=24)
    rows[33] = {"input_ids": rows[33]["input_ids"], "labels": torch.full((24,), -100)}
    trainer = ABRTrainer(
        model=model,
        args=ABRConfig(
            output_dir=output_dir,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            max_passes=75,  # one and a half rounds
            repeat_scheduler="abr",
            loss_threshold=3.0,
            outlier_sigmas=1.0,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            logging_steps=4,
            save_steps=15,
            eval_strategy="steps",
            eval_steps=10,
            eval_on_start=True,
            **QUIET,
        ),
        train_dataset=rows,
        eval_dataset=rows[:4],
        callbacks=[KillAfter(int(kill_after))] if int(kill_after) else None,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def poison(module, args, output):
    """Break the forward of any micro-batch that begins with the last token of the vocabulary."""
    return output * math.nan if args[0][0, 0] == VOCABULARY - 1 else output


def poison_rows(module, args, output):
    """Break the rows that begin with the last token of the vocabulary, and leave the others alone."""
    broken = args[0][:, 0] == VOCABULARY - 1
    if broken.any():
        output = output.clone()
        output[broken] = output[broken] * math.nan
    return output


def rows_with_a_broken_one(count: int, broken: int) -> list[dict[str, torch.Tensor]]:
    """Rows of which one breaks its micro-batch, and of which each second has half as many targets."""
    rows = token_rows(count)
    for i, row in enumerate(rows):
        row["input_ids"] = row["input_ids"].clamp(max=VOCABULARY - 2)
        row["labels"] = row["input_ids"].clone()
        row["labels"][: 6 * (i % 2)] = -100
    rows[broken]["input_ids"][0] = VOCABULARY - 1
    return rows


def fsdp(version: int) -> dict[str, Any]:
    options = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "sync_module_states": False}
    return {"fsdp": True, "fsdp_config": {"fsdp_version": version, **options}}


def zero(stage: int) -> dict[str, Any]:
    return {
        "deepspeed": {
            "train_micro_batch_size_per_gpu": "auto",
            "train_batch_size": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        }
    }


RESUMED = (
    "two micro-batches",
    "rows, two micro-batches",
    "asking",
    "FSDP2, two micro-batches",
    "ZeRO-2, two micro-batches",
    "ZeRO-2, rows, two micro-batches",
    "ZeRO-3, two micro-batches",
)
SCENARIOS: dict[str, dict[str, Any]] = {
    "one micro-batch": {},
    "four micro-batches": {"gradient_accumulation_steps": 4, "rows": 64},
    "uneven": {"gradient_accumulation_steps": 2, "rows": 29},
    "dispatched": {"accelerator_config": {"dispatch_batches": True}},
    "split": {"accelerator_config": {"split_batches": True}, "per_device_train_batch_size": 4},
    "means of devices": {"gradient_accumulation_steps": 2, "average_tokens_across_devices": False},
    "classification": {"gradient_accumulation_steps": 2, "model": "classifier"},
    "classification, broken at first": {"gradient_accumulation_steps": 2, "model": "classifier", "broken": 2},
    "two micro-batches": {"gradient_accumulation_steps": 2},
    "without targets": {"empty": (4, 5, 6, 7, 20, 21)},  # all of a batch, and what one rank of two has of another
    "rows": {"trainer": "rows"},
    "rows, two micro-batches": {"gradient_accumulation_steps": 2, "trainer": "rows"},
    "rows, four micro-batches": {"gradient_accumulation_steps": 4, "trainer": "rows", "rows": 64},
    "rows, uneven": {"gradient_accumulation_steps": 2, "trainer": "rows", "rows": 29},
    "rows, LoRA": {"gradient_accumulation_steps": 2, "trainer": "rows", "model": "lora"},
    "rows, classification": {"gradient_accumulation_steps": 2, "trainer": "rows", "model": "classifier"},
    "GPT-2": {"gradient_accumulation_steps": 2, "model": "gpt2"},
    "GPT-2, means of devices": {
        "gradient_accumulation_steps": 2,
        "model": "gpt2",
        "average_tokens_across_devices": False,
    },
    "stock": {"gradient_accumulation_steps": 2, "trainer": "stock"},
    "baseline": {"gradient_accumulation_steps": 2, "trainer": "baseline"},
    "asking": {"gradient_accumulation_steps": 2, "trainer": "asking"},
    "asking but for the gradient": {"gradient_accumulation_steps": 2, "trainer": "asking but for the gradient"},
    "waiting for one rank": {"trainer": "waiting"},
    "LoRA": {"gradient_accumulation_steps": 2, "model": "lora"},
    "LoRA, checkpointed": {"gradient_accumulation_steps": 2, "model": "lora", "gradient_checkpointing": True},
    "seconds": {"gradient_accumulation_steps": 2, "trainer": "seconds", "max_seconds": 2},
    "FSDP2": fsdp(2),
    "FSDP2, two micro-batches": {"gradient_accumulation_steps": 2, **fsdp(2)},
    "FSDP2, asking": {"gradient_accumulation_steps": 2, "trainer": "asking", **fsdp(2)},
    "FSDP2, rows": {"trainer": "rows", **fsdp(2)},
    "FSDP2, rows, two micro-batches": {"gradient_accumulation_steps": 2, "trainer": "rows", **fsdp(2)},
    "FSDP2, LoRA": {"gradient_accumulation_steps": 2, "model": "lora", **fsdp(2)},
    "FSDP2, classification": {"gradient_accumulation_steps": 2, "model": "classifier", "broken": 2, **fsdp(2)},
    "FSDP2, without targets": {"empty": (4, 5, 6, 7, 20, 21), **fsdp(2)},
    "FSDP1": fsdp(1),
    "FSDP1, two micro-batches": {"gradient_accumulation_steps": 2, **fsdp(1)},
    **{f"ZeRO-{stage}": zero(stage) for stage in (1, 2, 3)},
    **{f"ZeRO-{stage}, two micro-batches": {"gradient_accumulation_steps": 2, **zero(stage)} for stage in (1, 2, 3)},
    "ZeRO-2, without targets": {"empty": (4, 5, 6, 7, 20, 21), **zero(2)},
    "ZeRO-2, rows": {"trainer": "rows", **zero(2)},
    "ZeRO-2, rows, two micro-batches": {"gradient_accumulation_steps": 2, "trainer": "rows", **zero(2)},
    "ZeRO-2, asking": {"gradient_accumulation_steps": 2, "trainer": "asking but for the gradient", **zero(2)},
    **{f"ZeRO-{stage}, LoRA": {"gradient_accumulation_steps": 2, "model": "lora", **zero(stage)} for stage in (2, 3)},
}


SCENARIOS |= {f"{name}, resumed": {**SCENARIOS[name], "is_resumed": True} for name in (*RESUMED, "seconds")}


def build_model(kind: str) -> Any:
    model = tiny_llama(tie_word_embeddings=False, num_hidden_layers=2 if kind == "lora" else 1)
    if kind == "lora":
        torch.manual_seed(1)
        options = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
        model.enable_input_require_grads()  # for checkpointed activations
        model = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **options))
    if kind == "gpt2":
        options = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
        options |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **options))
    if kind == "classifier":
        model = LlamaForSequenceClassification(LlamaConfig(**{**model.config.to_dict(), "num_labels": 3}))
        model.config.pad_token_id = VOCABULARY - 3
    return model


class StopAfter(TrainerCallback):
    """End training after `step` batches, with a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_training_stop = state.global_step == self.step


class PreemptSecondRank(TrainerCallback):
    """Send SIGTERM to the second rank, and to no other one, in the batch after `step`."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)  # transformers notes it in a thread


class SkipEveryFifth(RepeatScheduler):
    """Skip sound batches too, whatever the rule inside says."""

    def __init__(self, inner: RepeatScheduler) -> None:
        self.inner = inner

    def decide(self, observation):
        return 0 if observation.batch % 5 == 3 else self.inner.decide(observation)

    def observe(self, outcome):
        self.inner.observe(outcome)

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state):
        self.inner.load_state_dict(state)


class AsksForAll(ReplayScheduler):
    """Look at accuracy and gradient, end repeats early, and train on every batch again two batches later.

    Every fifth batch is skipped: after its backward, where the gradient is seen.
    """

    def __init__(self, sees_gradient: bool) -> None:
        super().__init__(quantile=0.0, spacing=2, buffer_size=3)
        self.wants = frozenset({"inputs", "accuracy", *(["grad_norm"] if sees_gradient else [])})

    def decide(self, observation):
        may_skip = observation.grad_norm is not None or "grad_norm" not in self.wants
        if may_skip and observation.batch % 5 == 3:
            return 0
        return 3 if observation.accuracy < 0.5 else 1

    def goes_on(self, observation, losses, accuracy):
        return losses[-2] - losses[-1] > 0.02 and accuracy < 0.5


SLOW = {"seconds": 0.02, "waiting": 0.15}
"""Trainers of scenarios in which rows come late, and by how many seconds each."""


class SlowOnSecondRank(torch.utils.data.Dataset):
    """Rows for which the second rank of two waits."""

    def __init__(self, rows: list[Any], seconds: float) -> None:
        self.rows, self.seconds = rows, seconds

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        time.sleep(self.seconds * (os.environ.get("RANK") == "1"))
        return self.rows[index]


class AboveTheLast(RowRule):
    """Drop the rows whose loss is well above the mean of the batch before. Remembers what it was shown."""

    def __init__(self) -> None:
        self.state = {"mean": 1e9, "rows": 0, "dropped": 0}
        self.asked = set()

    def beside(self, rows):
        self.asked |= {(row.batch, row.position, row.micro_batch) for row in rows}
        return self

    def decide(self, row):
        return row.loss <= 1.02 * self.state["mean"]

    def observe(self, rows, kept):
        assert self.asked <= {(row.batch, row.position, row.micro_batch) for row in rows}
        self.asked = set()
        self.state = {
            "mean": sum(row.loss for row in rows) / len(rows),
            "rows": self.state["rows"] + len(rows),
            "dropped": self.state["dropped"] + kept.count(False),
        }

    def state_dict(self):
        return dict(self.state)

    def load_state_dict(self, state):
        self.state = dict(state)


def train_scenario(output_dir: str, name: str, **changes: Any) -> Any:
    """Train on micro-batches of which one is broken, with repeats and skips that depend on losses alone."""
    options = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 2, **SCENARIOS[name], **changes}
    if not options.pop("is_resumed", False):
        trainer = build_scenario(output_dir, **options)
        trainer.train()
        return trainer
    stopped = build_scenario(output_dir, **options, enable_jit_checkpoint=True)
    stopped.add_callback(PreemptSecondRank(4))
    stopped.train()
    assert stopped.is_preempted
    assert stopped.state.global_step == 5
    forget_engine(stopped)
    trainer = build_scenario(output_dir, **options)
    trainer.train(resume_from_checkpoint=True)
    return trainer


def build_scenario(
    output_dir: str,
    rows: int = 32,
    broken: int = 10,  # opens micro-batch 5: that of the second rank of two
    first_rows_again: int = 0,
    empty: tuple[int, ...] = (),
    model: str = "causal LM",
    trainer: str = "repeats",
    **options: Any,
) -> Any:
    data = rows_with_a_broken_one(rows, broken)
    data = [broken_row(row) if i in empty else row for i, row in enumerate(data)]
    data += data[:first_rows_again]
    if model == "classifier":
        data = [{"input_ids": row["input_ids"], "labels": torch.tensor(i % 3)} for i, row in enumerate(data)]
    network = build_model(model)
    rule = ThresholdScheduler(loss_threshold=0.4 if model == "classifier" else 1.3, max_repeats=3)
    trainer_cls, config_cls, scheduler = {
        "repeats": (ABRTrainer, ABRConfig, {"repeat_scheduler": SkipEveryFifth(RobustOutlierSkip(rule, sigmas=2.0))}),
        "asking": (ABRTrainer, ABRConfig, {"repeat_scheduler": AsksForAll(sees_gradient=True)}),
        "asking but for the gradient": (ABRTrainer, ABRConfig, {"repeat_scheduler": AsksForAll(sees_gradient=False)}),
        "seconds": (ABRTrainer, ABRConfig, {"repeat_scheduler": SkipEveryFifth(rule)}),
        "rows": (ABRTrainer, ABRConfig, {"repeat_scheduler": SkipEveryFifth(rule), "row_rule": AboveTheLast()}),
        "waiting": (ABRTrainer, ABRConfig, {"repeat_scheduler": WaitScheduler(max_repeats=3)}),
        "baseline": (ABRTrainer, ABRConfig, {"repeat_scheduler": ConstantScheduler()}),
        "stock": (Trainer, TrainingArguments, {}),
    }[trainer]
    if trainer != "stock" and model != "classifier":
        scheduler["eval_measurement"] = nll_of_windows
    if trainer not in ("baseline", "stock"):
        network.get_input_embeddings().register_forward_hook(poison_rows if trainer == "rows" else poison)
    return trainer_cls(
        model=network,
        args=config_cls(
            output_dir=output_dir,
            num_train_epochs=2,
            learning_rate=1e-2,
            logging_steps=2,
            save_strategy="no",
            train_sampling_strategy="sequential",
            ddp_find_unused_parameters=False,
            **options,
            **QUIET,
        ),
        train_dataset=SlowOnSecondRank(data, SLOW[trainer]) if trainer in SLOW else data,
        eval_dataset=data[3:8],  # does not divide by two ranks: a row is given out twice
        **scheduler,
    )


def forget_engine(trainer: Any) -> None:
    """Leave nothing of an engine to the next trainer of this process."""
    trainer.accelerator.free_memory()
    forget_launch()


def forget_launch() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        os.environ.pop(name, None)
    unset_hf_deepspeed_config()


def whole_weights(trainer: Any) -> torch.Tensor:
    """All weights of a model, as one vector, whatever its engine has split."""
    model = trainer.model_wrapped
    if trainer.is_deepspeed_enabled:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return weights(model)
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return weights(model)
    parameters = (parameter.detach() for parameter in model.parameters())
    return torch.cat([(each.full_tensor() if isinstance(each, DTensor) else each).flatten() for each in parameters])


def numbers_of(trainer: Any) -> dict[str, Any]:
    """What ranks must agree on, and what must equal the reference."""
    metrics = trainer.evaluate()
    logged = [logs for logs in trainer.state.log_history if "loss" in logs]
    numbers = {name: [logs.get(name) for logs in logged] for name in ("loss", "learning_rate", "repeats")}
    measured = ("loss", "perplexity", "target_tokens", "windows_nll")
    numbers |= {f"eval_{name}": metrics.get(f"eval_{name}") for name in measured}
    if isinstance(trainer, ABRTrainer):
        numbers["ledger"] = without_seconds(trainer.ledger.state_dict())
        numbers["spent"] = float(trainer._run.budget.spent)
        numbers["history"] = trainer.repeat_scheduler.state_dict().get("history")
        if trainer.row_rule is not None:
            numbers["row rule"] = trainer.row_rule.state_dict()
    return numbers


def shards_on_cpu() -> None:
    """Let accelerate switch FSDP on where there is no GPU: it drops the plugin there, and says nothing."""
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # FSDP1 compares it with "cpu", not with "cpu:0"


def without_compiled_communication() -> None:
    """Keep DeepSpeed from compiling a communication kernel for CPUs, which takes minutes."""
    if importlib.util.find_spec("deepspeed") is not None:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


GENERATED = ("GRPO", "GRPO of TRL")


def train_rollouts(output_dir: str, name: str) -> Any:
    """Generate rows on each rank, and make two updates on them: by a rule, or as TRL does."""
    from trl import GRPOConfig, GRPOTrainer

    from abr_trainer.integrations.trl import ABRGRPOConfig, ABRGRPOTrainer

    def even_tokens(completion_ids: Any, **_: Any) -> list[float]:
        return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]

    trainer_cls, config_cls, own = {
        "GRPO": (ABRGRPOTrainer, ABRGRPOConfig, {"max_steps": 3, "max_repeats": 2}),
        "GRPO of TRL": (GRPOTrainer, GRPOConfig, {"max_steps": 6, "num_iterations": 2}),
    }[name]
    options = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8, "beta": 0.0}
    options |= {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no"}
    trainer = trainer_cls(
        model=tiny_llama(vocab_size=2048),
        args=config_cls(output_dir=output_dir, bf16=False, gradient_accumulation_steps=2, **own, **options, **QUIET),
        reward_funcs=even_tokens,
        train_dataset=Dataset.from_list(
            [{"prompt": text} for text in ("The fox", "A bear", "She said", "It was")] * 6
        ),
        processing_class=load_tokenizer(ModelArguments()),
    )
    trainer.train()
    return trainer


def numbers_of_rollouts(trainer: Any) -> dict[str, Any]:
    """What ranks must agree on."""
    rewards = [logs["reward"] for logs in trainer.state.log_history if "reward" in logs]
    rule = getattr(trainer, "repeat_scheduler", None)
    return {"reward": rewards, "rule": rule and rule.state_dict()}


def engines(output_dir: str, *names: str) -> None:
    """Run scenarios one after the other in this rank; write the weights and numbers of each."""
    for name in names:
        directory = Path(output_dir, name)
        directory.mkdir(exist_ok=True)
        is_generated = name in GENERATED
        trainer = (train_rollouts if is_generated else train_scenario)(str(directory), name)
        rank = trainer.args.process_index
        sharded = sum(isinstance(parameter, DTensor) for parameter in trainer.model_wrapped.parameters())
        numbers = (numbers_of_rollouts if is_generated else numbers_of)(trainer)
        numbers |= {"engine": type(trainer.model_wrapped).__name__, "sharded": sharded}
        torch.save(whole_weights(trainer), directory / f"weights-{rank}.pt")
        Path(directory, f"rank-{rank}.json").write_text(json.dumps(numbers))
        forget_engine(trainer)
        print(f"{name}: done", flush=True)
    state = PartialState(cpu=True)
    nlls = nlls_over_ranks(tiny_llama(), some_windows(), 2, state)
    Path(output_dir, f"measured-{state.process_index}.json").write_text(json.dumps(nlls))
    write_texts(output_dir, state)
    del trainer
    leave_ranks()


def ranks() -> None:
    """Run a job in as many ranks as a line of the input asks for, and answer with a line of what went wrong.

    A rank is forked from this process: to import everything takes longer than most scenarios.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # ranks print too
    shards_on_cpu()
    without_compiled_communication()
    for line in sys.stdin:
        job, count, *arguments = json.loads(line)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        try:
            if job == "trials":
                trials(count, *arguments)
                print(json.dumps(""), file=answers, flush=True)
                continue
            options = {"nprocs": count, "daemon": True, "start_method": "fork"}
            torch.multiprocessing.start_processes(job_of_rank, (job, count, port, arguments), **options)
            answer = ""
        except Exception:
            answer = traceback.format_exc()
        print(json.dumps(answer), file=answers, flush=True)


def trials(count: int, output_dir: str, *names: str) -> None:
    """Let something befall one of so many ranks, as the benchmark does, and write down what has become of them."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "ranks.py"))
    known = {trial.name: trial for trial in benchmark["trials"](wait=2.0)}
    found = {
        name: benchmark["befall"](known[name], count, index % count, Path(output_dir, name))
        for index, name in enumerate(names)
    }
    Path(output_dir, "trials.json").write_text(json.dumps(found))


def job_of_rank(rank: int, job: str, count: int, port: int, arguments: list[str]) -> None:
    """Be a rank, as torchrun tells it to be one."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    {"engines": engines, "loaders": loaders, "trainings": trainings}[job](*arguments)


def some_windows() -> list[Window]:
    """Seven windows of 4 to 10 tokens: they divide among no number of ranks."""
    rows = [row["input_ids"].tolist() for row in token_rows(7)]
    return [Window(ids[: 4 + index], 3, weight=3) for index, ids in enumerate(rows)]


def nll_of_windows(model: torch.nn.Module) -> dict[str, float]:
    """What a scenario measures at each evaluation; some ranks have one window more than others."""
    return {"windows_nll": math.fsum(nlls_over_ranks(model, some_windows(), 2, PartialState(), shows_progress=False))}


LOADERS: dict[str, dict[str, Any]] = {
    "shuffled": {"train_sampling_strategy": "random"},
    "dispatched": {"accelerator_config": {"dispatch_batches": True}},
    "split": {"accelerator_config": {"split_batches": True}, "per_device_train_batch_size": 4},
    "uneven": {"accelerator_config": {"even_batches": False}},
    "stream": {"max_steps": 6},
    "stream, not dispatched": {"max_steps": 6, "accelerator_config": {"dispatch_batches": False}},
    "stream of datasets": {"max_steps": 6},
    "stream of datasets, not dispatched": {"max_steps": 6, "accelerator_config": {"dispatch_batches": False}},
    "stream in two parts, not dispatched": {"max_steps": 6, "accelerator_config": {"dispatch_batches": False}},
    "files, not dispatched": {"max_steps": 6, "accelerator_config": {"dispatch_batches": False}},
}


def loaders(output_dir: str) -> None:
    """Write down the batches that this rank gets, stock and with indices, and what is known of each row."""
    found: dict[str, Any] = {}
    for name, options in LOADERS.items():
        data = data_of(name, output_dir)
        batches = []
        for trainer_cls, config_cls in ((Trainer, TrainingArguments), (ABRTrainer, ABRConfig)):
            config = {"output_dir": output_dir, "per_device_train_batch_size": 2, **QUIET, **options}
            trainer = trainer_cls(model=tiny_llama(), args=config_cls(**config), train_dataset=data)
            trainer.row_rule = object()
            batches.append(list(trainer.get_train_dataloader()))
        taken = [taken_out(batch) for batch in batches[1]]
        numbers = [[] if indices is None else indices.tolist() for _, indices in taken]
        found[name] = {
            "stock": [batch["input_ids"].tolist() for batch in batches[0]],
            "rows": [inputs["input_ids"].tolist() for inputs, _ in taken],
            "sources": [[source_of(data, number) for number in each] for each in numbers],
        }
    Path(output_dir, f"rank-{PartialState().process_index}.json").write_text(json.dumps(found))
    leave_ranks()


def data_of(name: str, directory: str) -> Any:
    """29 rows in the form that the name of a loader says, or blocks of the files in a directory."""
    if name.startswith("files"):
        tokenizer = load_tokenizer(ModelArguments())
        arguments = DataArguments(dataset_name=str(Path(directory, "files")), streaming=True)
        return load_blocks(arguments, tokenizer, 8, ["train"], with_sources=True)["train"]
    rows = token_rows(29)
    if not name.startswith("stream"):
        return rows
    if name.startswith("stream,") or name == "stream":
        return Stream(rows)
    lists = [{key: value.tolist() for key, value in row.items()} for row in rows]
    return Dataset.from_list(lists).to_iterable_dataset(num_shards=2 if "two parts" in name else 1)


def some_prompts(tokenizer: Any) -> list[Prompt]:
    """Seven prompts of 4 to 16 tokens, in batches of two: some ranks have one batch more than others."""
    ids = tokenizer(" ".join(sources.demo_texts("validation")[:20]), add_special_tokens=False)["input_ids"]
    rows = [{"input_ids": ids[40 * i : 40 * i + 8 + 4 * i]} for i in range(7)]
    return prompts_in(rows, tokenizer)


def write_texts(output_dir: str, state: PartialState) -> None:
    """Write down what all ranks together make of some prompts, and how that is scored."""
    tokenizer = load_tokenizer(ModelArguments())
    prompts = some_prompts(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    found = continue_over_ranks(model, tokenizer, prompts, 2, state)
    metrics = [name for name, (module, _) in PACKAGES.items() if importlib.util.find_spec(module)]
    scores = TextScores(metrics, prompts, tokenizer, 2, state)(model)
    Path(output_dir, f"texts-{state.process_index}.json").write_text(json.dumps([found, scores]))


def trainings(directory: str) -> None:
    """Run the trainings in `plans.json`: once for each environment and its flags, the last of which is a directory.

    They see the Hub in `hub.json`, if there is one.
    """
    known = {"train": run_clm_abr.run, "classify": classify.run, "evaluate": evaluate.main}
    patch = pytest.MonkeyPatch()
    if Path(directory, "hub.json").exists():
        point_client_at(SimpleNamespace(**json.loads(Path(directory, "hub.json").read_text())), patch)
    for environment, verb, flags in json.loads(Path(directory, "plans.json").read_text()):
        before = dict(os.environ)
        os.environ.update(environment)
        known[verb](flags)
        if verb != "evaluate":
            Path(flags[-1], "engine").write_text(AcceleratorState().distributed_type)
        gc.collect()
        for name in environment.keys() - before.keys():
            os.environ.pop(name, None)
        forget_launch()
    leave_ranks()


if __name__ == "__main__":
    gc.freeze()  # each training looks for garbage, and longest among what was imported
    {"resumable": resumable, "ranks": ranks}[sys.argv[1]](*sys.argv[2:])
