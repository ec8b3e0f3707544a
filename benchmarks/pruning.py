"""A pruned model and its recovery: dense, pruned, with LoRA beside it, and merged with and without the mask.

    python benchmarks/pruning.py --model DIR --train FILE --test FILE --out runs/pruning

The model is pruned by magnitude to a half, as any weights and as 2:4; an adapter is trained on the frozen sparse model
with each rule, at the same passes; and, to tell recovery from fine-tuning, on the dense model too. Perplexity is that
by `token` of a text that was not trained on. Every step is the command that a user runs; what is there already is not
made again. Numbers go to benchmarks/results/pruning.json, and a table of them is printed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from abr_trainer.records.files import write_whole

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "pruning.json"
RULES = {"baseline": ["baseline"], "abr q0.8": ["abr", "--loss_threshold", "q0.8"]}
PATTERNS = ("unstructured", "2:4")
LENGTH = "128"


def call(verb: str, *flags: str) -> None:
    subprocess.run([sys.executable, "-m", "abr_trainer", verb, *flags], check=True, cwd=ROOT)


def measured(args: argparse.Namespace, model: Path, adapter: Path | None, name: str) -> dict[str, Any]:
    """Return perplexity and share of zeros of a model on the test file, and what defines them."""
    path: Path = args.out / f"{name}.json"
    if not path.exists():
        flags = [
            "--model_name_or_path",
            str(model),
            "--text_file",
            str(args.test),
            "--token_length",
            LENGTH,
            "--use_cpu",
        ]
        flags += ["--torch_dtype", "float32"] + (["--adapter_name_or_path", str(adapter)] if adapter else [])
        call("perplexity", *flags, "--output_file", str(path))
    return {"name": name, **json.loads(path.read_text(encoding="utf-8"))}


def trained(args: argparse.Namespace, model: Path, rule: str, out: Path) -> Path:
    if not (out / "all_results.json").exists():
        flags = ["--model_name_or_path", str(model), "--torch_dtype", "float32", "--train_file", str(args.train)]
        flags += ["--block_size", LENGTH, "--per_device_train_batch_size", "4", "--learning_rate", args.learning_rate]
        flags += ["--max_passes", str(args.passes), "--save_strategy", "no", "--use_cpu", "--disable_tqdm", "true"]
        flags += ["--repeat_scheduler", *RULES[rule], "--do_train", "--output_dir", str(out), "--overwrite_output_dir"]
        call("train", *flags)
    return out


def merged(args: argparse.Namespace, model: Path, adapter: Path, keep_mask: bool, out: Path) -> Path:
    if not out.exists():
        flags = [
            "--model_name_or_path",
            str(model),
            "--torch_dtype",
            "float32",
            "--adapter_name_or_path",
            str(adapter),
        ]
        flags += ["--text_file", str(args.test), "--token_length", LENGTH, "--max_windows", "50", "--use_cpu"]
        call("export", *flags, "--keep_mask", str(keep_mask).lower(), "--output_dir", str(out))
    return out


def rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    found = [measured(args, args.model, None, "dense")]
    for rule in RULES:
        adapter = trained(args, args.model, rule, args.out / f"dense-{rule}")
        found.append(measured(args, args.model, adapter, f"dense, LoRA {rule}"))
    for pattern in PATTERNS:
        pruned: Path = args.out / f"pruned-{pattern}"
        if not pruned.exists():
            flags = ["--model_name_or_path", str(args.model), "--torch_dtype", "float32", "--pattern", pattern]
            call("prune", *flags, "--output_dir", str(pruned))
        found.append(measured(args, pruned, None, f"{pattern}"))
        for rule in RULES:
            name = f"{pattern}, LoRA {rule}"
            adapter = trained(args, pruned, rule, args.out / f"{pattern}-{rule}")
            found.append(measured(args, pruned, adapter, name))
            for keep_mask, how in ((True, "merged under the mask"), (False, "merged plainly")):
                whole = merged(args, pruned, adapter, keep_mask, args.out / f"{pattern}-{rule}-mask-{keep_mask}")
                found.append(measured(args, whole, None, f"{name}, {how}"))
    return found


def table(found: list[dict[str, Any]]) -> list[str]:
    lines = ["| model | perplexity | zeros in q_proj | zeros in all |", "| --- | --- | --- | --- |"]
    for row in found:
        zeros = [f"{1 - row['nonzero_share'][kind]:.1%}" for kind in ("q_proj", "all")]
        lines.append(f"| {row['name']} | {row['perplexity']:.2f} | {' | '.join(zeros)} |")
    return lines


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "train", "test"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/pruning"))
    parser.add_argument("--passes", type=int, default=300)
    parser.add_argument("--learning_rate", default="2e-3")
    args = parser.parse_args(argv)
    for name in ("model", "train", "test", "out"):
        setattr(args, name, getattr(args, name).resolve())
    args.out.mkdir(parents=True, exist_ok=True)
    found = rows(args)
    kept = (
        "name",
        "perplexity",
        "definition",
        "token_length",
        "windows",
        "target_tokens",
        "nonzero_share",
        "versions",
        "git",
    )
    result = {
        **{name: getattr(args, name).name for name in ("model", "train", "test")},
        **{name: getattr(args, name) for name in ("passes", "learning_rate")},
        "rows": [{name: row[name] for name in kept} for row in found],
    }
    write_whole(RESULTS, json.dumps(result, indent=1) + "\n")
    print(*table(found), sep="\n")
    return found


if __name__ == "__main__":
    main()
