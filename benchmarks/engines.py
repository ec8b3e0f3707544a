"""What repetition costs beyond its passes: `ABRTrainer` against stock `Trainer`, paired in one run.

    python benchmarks/engines.py                                     # one process, on a GPU if there is one
    torchrun --nproc_per_node 2 benchmarks/engines.py --only fp32    # DDP; likewise under `accelerate launch` with a
                                                                     # configuration of configs/accelerate

A LLaMA of random weights (about 1.2 billion parameters on a GPU, 9 million on a CPU) trains on random tokens, in every
precision that the machine can run: once a batch, three times a batch, and every other batch skipped. Beside each of
these, in a thread of its own, stock Trainer trains from the same weights on the same batches, and the two take turns
batch by batch, so that whatever else the machine does hits both. A ratio is the median over these pairs of batches;
the table shows it with its quartiles. Adds its rows to --json, and prints the table of all rows there.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed
from turns import ON_GPU, BatchTimes, paired_ratios, peak_memory, reset_peak_memory

from abr_trainer import ABRConfig, ABRTrainer, ConstantScheduler, RepeatScheduler
from abr_trainer.models.arguments import ModelArguments
from abr_trainer.models.loading import load_config, load_model, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
SIZES = {
    "gpu": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "cpu": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 8},
}
SHAPES = {"gpu": (8, 512, 32000), "cpu": (4, 128, 4096)}  # rows, tokens a row, vocabulary
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": True},
    "fp16": {"fp16": True},
    "compile": {"torch_compile": True},
    "8-bit LoRA": {"load_in_8bit": True},
    "4-bit LoRA": {"load_in_4bit": True},
}
WARM_UP = 4  # batches; even, so that the skipped ones stay the odd ones


class EveryOther(RepeatScheduler):
    """Skip every second batch."""

    def decide(self, observation: Any) -> int:
        return 1 - observation.batch % 2


def build_model(options: dict[str, Any], directory: Path) -> Any:
    """Return the same random model each time: whole, or quantised from disk with an adapter."""
    kind = "gpu" if ON_GPU else "cpu"
    set_seed(0)
    quantised = {name: value for name, value in options.items() if name.startswith("load_in")}
    config = LlamaConfig(vocab_size=SHAPES[kind][2], max_position_embeddings=2048, use_cache=False, **SIZES[kind])
    if not quantised:
        with torch.device("cuda" if ON_GPU else "cpu"):
            return LlamaForCausalLM(config)
    if not (directory / "config.json").exists():
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    arguments = ModelArguments(model_name_or_path=str(directory), lora_dropout=0.0, **quantised)
    device = accelerate.PartialState().device
    set_seed(0)  # the adapter's
    return load_model(arguments, load_config(arguments), load_tokenizer(ModelArguments()), device)


def rows(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    _, length, vocabulary = SHAPES["gpu" if ON_GPU else "cpu"]
    tokens = torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in tokens]


def build_trainer(variant: str, options: dict[str, Any], batches: int, directory: Path) -> Any:
    schedulers = {"once": ConstantScheduler(1), "three times": ConstantScheduler(3), "every other": EveryOther()}
    batch_size = SHAPES["gpu" if ON_GPU else "cpu"][0]
    arguments = {
        "output_dir": str(directory / "out"),
        "per_device_train_batch_size": batch_size,
        "max_steps": batches,
        "learning_rate": 1e-4,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not ON_GPU,
        **{name: value for name, value in options.items() if not name.startswith("load_in")},
    }
    stock = variant == "stock"
    trainer = (Trainer if stock else ABRTrainer)(
        model=build_model(options, directory / "model"),
        args=(TrainingArguments if stock else ABRConfig)(**arguments),
        train_dataset=rows(batches * batch_size * accelerate.PartialState().num_processes, seed=1),
        eval_dataset=rows(2 * batch_size, seed=2),
        **({} if stock else {"repeat_scheduler": schedulers[variant]}),
    )
    trainer.callback_handler.callbacks = [
        each for each in trainer.callback_handler.callbacks if type(each).__name__ != "PrinterCallback"
    ]
    return trainer


def in_turns(variant: str, options: dict[str, Any], batches: int, directory: Path) -> list[float]:
    """Train with stock Trainer and with ours, batch by batch in turns; return the ratio of each pair of times."""

    def training(kind: str) -> Callable[[BatchTimes], object]:
        def train(times: BatchTimes) -> None:
            trainer = build_trainer(kind, options, batches + WARM_UP, directory)
            trainer.add_callback(times)
            trainer.train()

        return train

    return paired_ratios(training("stock"), training(variant), WARM_UP)


def alone(variant: str, options: dict[str, Any], batches: int, directory: Path) -> dict[str, Any]:
    """Train once; return memory, speed, host synchronisations, and what the weights became."""
    torch.compiler.reset()
    reset_peak_memory()
    trainer = build_trainer(variant, options, batches, directory)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("warn")
        output = trainer.train()
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("default")
    memory, shape = peak_memory(), SHAPES["gpu" if ON_GPU else "cpu"]
    torch.save([each.detach().cpu() for each in local_weights(trainer)], weights_file(variant, directory))
    return {
        "memory": memory,
        "synchronisations": sum("synchronizing CUDA operation" in str(each.message) for each in caught) / batches,
        "perplexity": math.exp(trainer.evaluate()["eval_loss"]),
        "tokens_per_second": output.metrics["train_samples_per_second"] * shape[1],
        "engine": engine_of(trainer),
        "share": None if variant == "stock" else float(trainer.ledger.share),
    }


def engine_of(trainer: Any) -> str:
    ranks = trainer.args.world_size
    return f"{trainer.accelerator.distributed_type.value} x {ranks}" if ranks > 1 else "one process"


def weights_file(variant: str, directory: Path) -> Path:
    """Where the weights of a run wait to be compared: in memory, they would be measured with the next run."""
    return directory / f"{variant}-{accelerate.PartialState().process_index}.pt"


def local_weights(trainer: Any) -> list[torch.Tensor]:
    parameters = (each for each in trainer.model_wrapped.parameters() if each.requires_grad)
    return [getattr(each, "ds_tensor", getattr(each, "_local_tensor", each)) for each in parameters]


def compare(name: str, batches: int) -> dict[str, Any]:
    """Return one row: `ABRTrainer` against `Trainer` in one precision."""
    options = PRECISIONS[name]
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        alone("stock", options, 4, directory)  # what the first run of a process allocates for good
        stock, ours, thrice = (alone(each, options, batches, directory) for each in ("stock", "once", "three times"))
        pairs = zip(*(torch.load(weights_file(each, directory)) for each in ("stock", "once")), strict=True)
        difference = max((one.float() - other.float()).abs().max().item() for one, other in pairs)
        ratios = {
            "once": in_turns("once", options, batches, directory),
            "pass": [ratio / 3 for ratio in in_turns("three times", options, batches, directory)],
            "skip": in_turns("every other", options, batches, directory)[1::2],
        }
    return {
        "precision": name,
        "engine": stock["engine"],
        "weight_difference": difference,
        "perplexity": [stock["perplexity"], ours["perplexity"]],
        "tokens_per_second": stock["tokens_per_second"],
        "memory": [stock["memory"], ours["memory"], thrice["memory"]],
        "forward_share": ours["share"],
        "synchronisations": [each["synchronisations"] for each in (stock, ours, thrice)] if ON_GPU else None,
        "ratios": ratios,
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if ON_GPU else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }


def runs_here(name: str) -> bool:
    return ON_GPU or (name != "fp16" and not (name == "compile" and shutil.which("g++") is None))


def table(results: list[dict[str, Any]]) -> list[str]:
    """Return a Markdown table."""

    def cell(values: list[float]) -> str:
        low, middle, high = statistics.quantiles(values, n=4)
        return f"{middle:.3f} ({low:.3f} to {high:.3f})"

    lines = [
        "| engine | precision | difference of weights | perplexity, stock and ours | tokens/s | N = 1 | "
        "a pass of N = 3 | a skip (forward share) | peak memory, N = 1 and 3 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results:
        ratios = row["ratios"]
        lines.append(
            f"| {row['engine']} | {row['precision']} | {row['weight_difference']:.0e} | "
            f"{row['perplexity'][0]:.4f}, {row['perplexity'][1]:.4f} | {row['tokens_per_second']:,.0f} | "
            f"{cell(ratios['once'])} | {cell(ratios['pass'])} | {cell(ratios['skip'])} ({row['forward_share']:.2f}) | "
            f"{row['memory'][1] / row['memory'][0]:.3f}, {row['memory'][2] / row['memory'][0]:.3f} |"
        )
        if row["synchronisations"]:
            waits = ", ".join(f"{each:.1f}" for each in row["synchronisations"])
            lines.append(
                f"| | {row['precision']} | | host waits for the GPU a batch, stock, N = 1 and 3: {waits} | | | | | |"
            )
    return lines


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "engines.json")
    parser.add_argument("--only", nargs="+", choices=list(PRECISIONS), default=[*filter(runs_here, PRECISIONS)])
    parser.add_argument("--batches", type=int, default=40)
    args = parser.parse_args(argv)

    results = json.loads(args.json.read_text()) if args.json.exists() else []
    for name in args.only:
        row = compare(name, args.batches)
        if not accelerate.PartialState().is_main_process:
            continue
        key = ("engine", "precision")
        results = [each for each in results if any(each[part] != row[part] for part in key)] + [row]
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{row['engine']}, {name}: done", flush=True)
    if accelerate.PartialState().is_main_process:
        print(*table(results), sep="\n")
    return results


if __name__ == "__main__":
    main()
