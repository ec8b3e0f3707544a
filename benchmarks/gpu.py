"""What `ABRTrainer` does and costs on a GPU, beside stock `Trainer` in the same process: at most nine minutes.

    python benchmarks/gpu.py                   # on the GPU; adds its rows to benchmarks/results/gpu.json
    python benchmarks/gpu.py --tiny            # the same rows with tiny models, on any machine: does the program work?
    python benchmarks/gpu.py --page            # only write docs/measure/gpu.md from the results that are there

Each row is written as soon as it is measured. A run that was stopped, by its time limit or otherwise, goes on where
it was when the same command is started again on the same card. Rows stand in order of importance. A row that cannot
be measured here is left out, and the result says why.

A machine without a package index lacks some packages. Fetch them elsewhere, carry them along, and name them:

    pip download --no-deps --python-version 3.12 --only-binary=:all: --dest wheels peft
    pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=$PWD/site python benchmarks/gpu.py

The rows of 8 and 4 bit need bitsandbytes, those of SFT need trl and datasets, those of Liger liger-kernel, and that of
FlashAttention flash-attn; all others need torch, transformers, accelerate, peft, and what these need. NEFTune has no
row: its noise is drawn by torch, as on a CPU.

Times are compared in turns: two trainings in one process take a batch each, one after the other, and a ratio is the
median over these pairs of batches, with its quartiles.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: the rows of exactness need it

import torch
from gpu_page import misses, page
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)
from turns import ON_GPU, BatchTimes, paired_ratios, peak_memory, reset_peak_memory

from abr_trainer import ABRConfig, ABRTrainer, ConstantScheduler, RepeatScheduler
from abr_trainer.data.demo import DEMO_MODEL
from abr_trainer.schedulers import RowRule
from abr_trainer.training.row_seams import RowsUnsupported
from abr_trainer.training.signals import NoAccuracy

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
PAGE = ROOT / "docs" / "measure" / "gpu.md"
LEARNING_RATE = 1e-4
CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)
"""What this version of transformers calls it."""
WARM_UP = 4  # batches; even, so that the skipped ones stay the odd ones
PLAN = [1, 3, 0, 2, 1, 0, 2, 1]
"""Repeats of each batch in the rows of exactness."""
CHECKPOINT = 4
"""The batch after which they are resumed: between repeats and skips."""


@dataclass(frozen=True)
class Scale:
    """How large the models and batches of a row are.

    Attributes:
        model: Sizes of a LLaMA of random weights.
        rows: Rows of a batch.
        length: Tokens of a row.
        batches: Pairs of batches that are timed.
    """

    model: dict[str, int]
    rows: int
    length: int
    batches: int


def sizes(vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int, groups: int) -> dict[str, int]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
    }


LARGE = Scale(sizes(32000, 2048, 5632, 22, 32, 4), rows=4, length=1024, batches=20)
"""1.1 billion parameters, for costs."""
SMALL = Scale(sizes(8192, 512, 1408, 4, 8, 4), rows=4, length=256, batches=0)
"""For exactness, which does not depend on the size."""
TINY = Scale(sizes(128, 64, 64, 1, 2, 1), rows=2, length=16, batches=4)


@dataclass(frozen=True)
class Setup:
    """How a model is made and trained.

    Attributes:
        lora: Train an adapter on frozen bf16 weights, instead of all weights, which are then in fp32.
        bits: 8 or 4 for a quantised base.
        arguments: Fields of `TrainingArguments`.
        sft: By TRL's trainer.
        has_logits: A rule can see the token accuracy. If not, a rule that wants it must be refused.
    """

    scale: Scale
    lora: bool = False
    bits: int | None = None
    attention: str = "sdpa"
    sft: bool = False
    has_logits: bool = True
    arguments: dict[str, Any] = field(default_factory=lambda: {"bf16": True})

    @property
    def checkpoints(self) -> bool:
        return bool(self.arguments.get(CHECKPOINTING))


class Planned(RepeatScheduler):
    """Repeat each batch as often as a plan says, over and over."""

    def __init__(self, plan: list[int], *wants: str) -> None:
        self.plan = plan
        self.wants = frozenset(wants)

    def decide(self, observation: Any) -> int:
        return self.plan[observation.batch % len(self.plan)]


class WithoutTheFirst(RowRule):
    """Drop the first row of each batch."""

    def decide(self, row: Any) -> bool:
        return bool(row.position)


# ---- Models, data and trainers ----


def build_model(setup: Setup, directory: Path) -> Any:
    """Return the same random model each time, on the device, ready for Trainer."""
    set_seed(0)
    if setup.arguments.get("torch_compile"):
        torch.compiler.reset()
    config = LlamaConfig(
        max_position_embeddings=2048, use_cache=False, attn_implementation=setup.attention, **setup.scale.model
    )
    device = torch.device("cuda" if ON_GPU else "cpu")
    if setup.bits is not None:
        model = quantised(config, setup.bits, directory, device)
    else:
        with device:
            model = LlamaForCausalLM(config)
        model = model.to(torch.bfloat16) if setup.lora else model
    if not setup.lora:
        return model
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if setup.bits is not None:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=setup.checkpoints)
    elif setup.checkpoints:
        model.enable_input_require_grads()
    set_seed(0)
    return get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")
    )


def quantised(config: LlamaConfig, bits: int, directory: Path, device: torch.device) -> Any:
    source = directory / "whole"
    if not source.exists():
        with device:
            LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(source)
    how = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return AutoModelForCausalLM.from_pretrained(
        source, quantization_config=BitsAndBytesConfig(**how), device_map={"": device}, dtype=torch.bfloat16
    )


def token_rows(count: int, scale: Scale) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, scale.model["vocab_size"], (count, scale.length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def build_trainer(
    setup: Setup,
    directory: Path,
    rule: RepeatScheduler | None,
    rows: list[Any],
    row_rule: RowRule | None = None,
    **arguments: Any,
) -> Any:
    """Return a trainer that goes over `rows` once: stock Trainer without a rule, else ours."""
    is_stock = rule is None
    options: dict[str, Any] = {
        "output_dir": str(directory / "out"),
        "per_device_train_batch_size": setup.scale.rows,
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1000,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not ON_GPU,
        **setup.arguments,
        **arguments,
    }
    trainer_cls, config_cls = (Trainer, TrainingArguments) if is_stock else (ABRTrainer, ABRConfig)
    given: dict[str, Any] = {} if is_stock else {"repeat_scheduler": rule, "row_rule": row_rule}
    if setup.sft:
        trainer_cls, config_cls, rows = for_sft(is_stock, rows)
        options = {"max_length": None, "bf16": False, CHECKPOINTING: False, **options}
        given["processing_class"] = AutoTokenizer.from_pretrained(DEMO_MODEL)  # the rows are tokens already
    trainer = trainer_cls(model=build_model(setup, directory), args=config_cls(**options), train_dataset=rows, **given)
    trainer.callback_handler.callbacks = [
        each for each in trainer.callback_handler.callbacks if type(each).__name__ != "PrinterCallback"
    ]
    return trainer


def for_sft(is_stock: bool, rows: list[Any]) -> tuple[type, type, Any]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from abr_trainer.integrations.trl import ABRSFTConfig, ABRSFTTrainer

    data = Dataset.from_list([{name: values.tolist() for name, values in row.items()} for row in rows])
    return (SFTTrainer, SFTConfig, data) if is_stock else (ABRSFTTrainer, ABRSFTConfig, data)


# ---- Exactness ----


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Ask for kernels that compute the same each time, where there are any."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def exactness(setup: Setup, directory: Path) -> dict[str, Any]:
    """Compare weights: ours beside stock Trainer on the batches as they were trained on, and resumed beside unbroken.

    Returns:
        The largest difference between two weights of each pair of runs. "stock again" is stock Trainer twice: what
        the kernels alone make of it. "moved" is how far training moves a weight: without that, equal means nothing.
        "accuracy" is with a rule that looks at the token accuracy beside one that does not, and "rows" with dropped
        rows beside stock Trainer on labels that are masked; None where it is refused.
    """
    size = setup.scale.rows
    rows = token_rows(len(PLAN) * size, setup.scale)
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    as_trained = [row for repeats, batch in zip(PLAN, batches, strict=True) for row in batch * repeats]

    def weights(rule: RepeatScheduler | None, rows: list[Any], resume: Path | None = None, **arguments: Any) -> Any:
        trainer = build_trainer(setup, directory, rule, rows, **arguments)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return trained_weights(trainer.model)

    def difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
        return max((mine - theirs).abs().max().item() for mine, theirs in zip(one, other, strict=True))

    def accuracy() -> float | None:
        try:
            seen = weights(Planned(PLAN, "accuracy"), rows)
        except NoAccuracy:
            if setup.has_logits:
                raise
            return None
        if not setup.has_logits:
            raise AssertionError("A rule was given an accuracy that nobody can see.")
        return difference(seen, unbroken)

    def rows_dropped() -> float | None:
        try:
            ours = weights(ConstantScheduler(1), rows, row_rule=WithoutTheFirst())
        except RowsUnsupported:
            if setup.has_logits:
                raise
            return None
        masked = [
            {**row, "labels": torch.full_like(row["labels"], -100)} if not i % size else row
            for i, row in enumerate(rows)
        ]
        theirs = build_trainer(setup, directory, None, masked)
        targets = torch.tensor(size * (setup.scale.length - 1), device=theirs.args.device)
        theirs._get_num_items_in_batch = lambda *_: targets  # of all rows: the others weigh what they weighed
        theirs.train()
        return difference(ours, trained_weights(theirs.model))

    with deterministic():
        start = trained_weights(build_model(setup, directory))
        stock, planned = weights(None, rows), weights(None, as_trained)
        saving = {"save_strategy": "steps", "save_steps": CHECKPOINT, "output_dir": str(directory / "saved")}
        unbroken = weights(Planned(PLAN), rows, **saving)
        return {
            "moved": difference(stock, start),
            "stock again": difference(weights(None, as_trained), planned),
            "once": difference(weights(ConstantScheduler(1), rows), stock),
            "repeats and skips": difference(unbroken, planned),
            "accuracy": accuracy(),
            "rows": rows_dropped(),
            "resumed": difference(
                weights(Planned(PLAN), rows, directory / "saved" / f"checkpoint-{CHECKPOINT}", **saving), unbroken
            ),
        }


def trained_weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [each.detach().to("cpu", torch.float64) for each in model.parameters() if each.requires_grad]


# ---- Costs ----

REPEATS = {"once": ConstantScheduler(1), "pass": ConstantScheduler(3), "skip": Planned([1, 0])}


def training(setup: Setup, directory: Path, rule: RepeatScheduler | None) -> Callable[[BatchTimes], object]:
    def train(times: BatchTimes) -> None:
        rows = token_rows((setup.scale.batches + WARM_UP) * setup.scale.rows, setup.scale)
        trainer = build_trainer(setup, directory, rule, rows)
        trainer.add_callback(times)
        trainer.train()

    return train


def cost(setup: Setup, directory: Path, kinds: tuple[str, ...] = ("once", "pass", "skip")) -> dict[str, Any]:
    """Time batches beside those of stock Trainer, and measure memory, speed and waits of each kind alone."""
    ratios = {}
    for kind in kinds:
        every = paired_ratios(training(setup, directory, None), training(setup, directory, REPEATS[kind]), WARM_UP)
        ratios[kind] = {"once": every, "pass": [ratio / 3 for ratio in every], "skip": every[1::2]}[kind]
    runs = {"stock": alone(setup, directory, None), **{kind: alone(setup, directory, REPEATS[kind]) for kind in kinds}}
    share = runs["once"]["forward_share"]
    return {
        "ratios": ratios,
        "forward_share": share,
        **{name: {kind: run[name] for kind, run in runs.items()} for name in ("memory", "tokens_per_second", "waits")},
    }


def alone(setup: Setup, directory: Path, rule: RepeatScheduler | None, batches: int = 4) -> dict[str, Any]:
    """Train on a few batches, and return peak memory, speed, and how often a batch makes the host wait."""
    reset_peak_memory()
    rows = token_rows((WARM_UP + 2 * batches) * setup.scale.rows, setup.scale)
    trainer = build_trainer(setup, directory, rule, rows)
    watch = Watch(WARM_UP + batches)
    trainer.add_callback(watch)
    trainer.train()
    share = getattr(getattr(trainer, "ledger", None), "share", None)
    return {
        "memory": peak_memory(),
        "tokens_per_second": setup.scale.rows * setup.scale.length / statistics.median(watch.seconds[WARM_UP:]),
        "waits": None if watch.waits is None else watch.waits / batches,
        "forward_share": None if share is None else float(share),
    }


class Watch(BatchTimes):
    """Time the first batches, and count by the profiler how often the host waits for the GPU in those after them.

    Args:
        timed: How many are timed.
    """

    SYNCHRONISING = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")

    def __init__(self, timed: int) -> None:
        super().__init__()
        self.timed = timed
        self.waits: int | None = None
        self.profiler: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < self.timed:
            self.begin()
        elif ON_GPU and self.profiler is None:
            activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
            self.profiler = torch.profiler.profile(activities=activities)
            self.profiler.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step <= self.timed:
            self.end()
        elif ON_GPU and state.global_step == state.max_steps:
            self.profiler.stop()
            counts = {each.key: each.count for each in self.profiler.key_averages()}
            self.waits = sum(counts.get(name, 0) for name in self.SYNCHRONISING)


def loops(setup: Setup, directory: Path) -> dict[str, Any]:
    """Time hand-written loops beside ours: seconds of each of their batches over those of ours."""
    kinds = {"IterBatch": (True, 1), "IterBatch, three times": (True, 3), "bare": (False, 1)}
    ratios = {}
    for name, (probes, repeats) in kinds.items():
        ours = training(setup, directory, ConstantScheduler(repeats))
        theirs = functools.partial(hand_written, setup, directory, probes, repeats)
        ratios[name] = paired_ratios(ours, theirs, WARM_UP)
    return {"ratios": ratios}


def hand_written(setup: Setup, directory: Path, probes: bool, repeats: int, times: BatchTimes) -> None:
    """Train as a script without a trainer does.

    Args:
        probes: Look at the loss of each batch first, in a forward in training mode without a gradient: IterBatch.
        repeats: Updates on each batch.
    """
    model = build_model(setup, directory).train()
    if setup.checkpoints:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    device = next(model.parameters()).device
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16)
    rows = token_rows((setup.scale.batches + WARM_UP) * setup.scale.rows, setup.scale)
    for batch in DataLoader(rows, batch_size=setup.scale.rows, pin_memory=ON_GPU):
        inputs = {name: values.to(device, non_blocking=True) for name, values in batch.items()}
        times.begin()
        if probes:
            with torch.no_grad(), autocast():
                model(**inputs).loss.item()
        for _ in range(repeats):
            with autocast():
                loss = model(**inputs).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        times.end()


def run_tests(_setup: Setup, directory: Path, seconds: float = 120.0) -> dict[str, Any]:
    """Run the tests that need a GPU."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "tests/benchmarks/test_gpu.py",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0:
        print(done.stdout[-6000:], done.stderr[-2000:], sep="\n", flush=True)
        raise RuntimeError(lines[-1] if lines else f"pytest ended with status {done.returncode}")
    return {"tests": lines[-1]}


# ---- Rows ----


@dataclass(frozen=True)
class Row:
    """What is measured together and written together.

    Attributes:
        needs: Packages, and "gpu" for a GPU.
    """

    name: str
    measure: Callable[[Setup, Path], dict[str, Any]]
    setup: Setup
    needs: tuple[str, ...] = ()

    @property
    def left_out(self) -> str | None:
        """Why it cannot be measured here; None if it can."""
        if "gpu" in self.needs and not ON_GPU:
            return "needs a GPU"
        missing = [name for name in self.needs if name != "gpu" and importlib.util.find_spec(name) is None]
        return f"{' and '.join(missing)} not installed" if missing else None


def rows_of(tiny: bool) -> list[Row]:
    """Return all rows, the most important first."""
    small, large = (TINY, TINY) if tiny else (SMALL, LARGE)
    bf16 = {"bf16": True}
    checkpointing = {"bf16": True, CHECKPOINTING: True}
    # The compiler alone takes longer than all tiny rows together; with TRL's head, even that of the eager backend.
    compiled = {"bf16": True, "torch_compile": True, "torch_compile_backend": "eager" if tiny else "inductor"}
    briefly = functools.partial(cost, kinds=("once", "skip"))
    graphs = {**compiled, "torch_compile_mode": "reduce-overhead"}
    layers = {"bf16": True, "use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": False}}
    fused_loss = {"bf16": True, "use_liger_kernel": True}
    padding_free = Setup(
        small, attention="flash_attention_2", arguments={"bf16": True, "padding_free": True}, sft=True
    )
    lora, sft, liger = ("peft",), ("trl", "datasets"), ("gpu", "liger_kernel")
    return [
        Row("exact: bf16", exactness, Setup(small, arguments=bf16)),
        Row("exact: fp16 with a scaler", exactness, Setup(small, arguments={"fp16": True}), ("gpu",)),
        Row("exact: LoRA", exactness, Setup(small, lora=True), lora),
        Row("exact: gradient checkpointing", exactness, Setup(small, arguments=checkpointing)),
        Row("exact: LoRA, gradient checkpointing", exactness, Setup(small, lora=True, arguments=checkpointing), lora),
        Row("exact: compiled", exactness, Setup(small, arguments=compiled)),
        Row("exact: compiled, CUDA graphs", exactness, Setup(small, arguments=graphs), ("gpu",)),
        Row("exact: SFT, fused head", exactness, Setup(small, arguments=bf16, sft=True), sft),
        Row("exact: SFT, gradient checkpointing", exactness, Setup(small, arguments=checkpointing, sft=True), sft),
        Row("exact: SFT, compiled", exactness, Setup(small, arguments=compiled, sft=True), (*sft, "gpu")),
        Row("exact: SFT, FlashAttention, padding-free", exactness, padding_free, (*sft, "gpu", "flash_attn")),
        Row("exact: SFT, Liger layers", exactness, Setup(small, arguments=layers, sft=True), (*sft, *liger)),
        Row("exact: Liger layers", exactness, Setup(small, arguments=layers), liger),
        Row("exact: Liger fused loss", exactness, Setup(small, arguments=fused_loss, has_logits=False), liger),
        Row("cost: LoRA", cost, Setup(large, lora=True), lora),
        Row("cost: full", cost, Setup(large)),
        Row("cost: LoRA, gradient checkpointing", cost, Setup(large, lora=True, arguments=checkpointing), lora),
        Row("cost: full, gradient checkpointing", cost, Setup(large, arguments=checkpointing)),
        Row("loops: LoRA", loops, Setup(large, lora=True), lora),
        Row("loops: full", loops, Setup(large)),
        Row("tests", run_tests, Setup(small), ("gpu", "pytest")),
        Row("option: eager attention", briefly, Setup(large, lora=True, attention="eager"), lora),
        Row("option: AdamW, not fused", briefly, Setup(large, arguments={"bf16": True, "optim": "adamw_torch"})),
        Row("option: compiled", briefly, Setup(replace(large, batches=10), arguments=compiled)),
        Row("option: 8-bit LoRA", briefly, Setup(large, lora=True, bits=8), (*lora, "bitsandbytes")),
        Row("option: 4-bit LoRA", briefly, Setup(large, lora=True, bits=4), (*lora, "bitsandbytes")),
    ]


def measure(row: Row) -> dict[str, Any]:
    """Return what a row shows, or why it shows nothing; an error is told and kept, and the next row follows."""
    if row.left_out is not None:
        return {"left_out": row.left_out}
    started = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            found = row.measure(row.setup, Path(scratch))
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    finally:
        gc.collect()
        if ON_GPU:
            torch.cuda.empty_cache()
    return {**found, "seconds": round(time.perf_counter() - started, 1)}


# ---- Results ----


def machine() -> dict[str, Any]:
    """Return the card, its driver and clocks, and the versions that a figure depends on."""
    packages = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "numpy", "trl", "triton")
    found: dict[str, Any] = {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(name)},
    }
    if ON_GPU:
        found |= {"cuda": torch.version.cuda, "memory": torch.cuda.get_device_properties(0).total_memory}
        asked = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            told = subprocess.run(
                ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader", "--id=0"],
                capture_output=True,
                text=True,
                check=True,
                timeout=20,
            )
            found |= dict(zip(asked, (each.strip() for each in told.stdout.split(",")), strict=True))
    else:
        found["threads"] = torch.get_num_threads()
    return found


def card() -> str:
    return torch.cuda.get_device_name(0) if ON_GPU else f"CPU ({platform.machine()})"


def write(path: Path, text: str) -> None:
    """Write a file whole, or leave what stood there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="Stop by itself after so many minutes.")
    parser.add_argument("--tiny", action="store_true", help="All rows with tiny models.")
    parser.add_argument("--only", nargs="+", default=[""], help="Only rows whose names begin so.")
    parser.add_argument("--json", type=Path, help=f"Default: {RESULTS.relative_to(ROOT)}; runs/gpu-tiny.json if tiny.")
    parser.add_argument("--page", action="store_true", help=f"Write {PAGE.relative_to(ROOT)}, and measure nothing.")
    args = parser.parse_args(argv)
    path: Path = args.json or (ROOT / "runs" / "gpu-tiny.json" if args.tiny else RESULTS)
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if args.page:
        write(PAGE, page(results))
        return results
    if not (ON_GPU or args.tiny):
        raise SystemExit("error: there is no GPU here. `--tiny` tries all rows on a CPU.")
    if args.tiny:
        torch.set_num_threads(1)  # models as small as these wait for their threads most of the time
    logging.getLogger("transformers").setLevel(logging.ERROR)
    gc.collect()
    gc.freeze()  # each training looks for garbage, and what was imported is none

    kept = results.setdefault(card(), {"machine": {}, "rows": {}})
    kept["machine"] = machine()
    print(card(), *(f"{name} {value}" for name, value in kept["machine"].items()), sep=", ", flush=True)
    rows = [row for row in rows_of(args.tiny) if row.name.startswith(tuple(args.only))]
    is_done = {name for name, found in kept["rows"].items() if not {"left_out", "failed"} & found.keys()}
    clock = threading.Timer(args.minutes * 60, stop, [args.minutes])
    clock.daemon = True
    clock.start()
    try:
        for row in rows:
            if row.name not in is_done:
                print(f"{row.name} ...", flush=True)
                kept["rows"][row.name] = found = measure(row)
                write(path, json.dumps(results, indent=1) + "\n")
                why = found.get("left_out") or found.get("failed")
                print(f"{row.name}: {why or ', '.join(misses(row.name, found)) or 'no bar missed'}", flush=True)
    finally:
        clock.cancel()
    if path == RESULTS:
        write(PAGE, page(results))
    print(page({card(): kept}))
    return results


def stop(minutes: float) -> None:
    """End the program in the middle of a row: those before it are written."""
    print(f"{minutes:g} minutes are over. The same command goes on with the row that was under way.", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
