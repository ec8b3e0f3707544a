"""What repeats are worth on a model people use: SmolLM2-135M-Instruct, a LLaMA of 134.5 million parameters.

    python benchmarks/real_model.py --data DIR --models DIR           # hours; goes on where it was stopped
    python benchmarks/real_model.py --data DIR --models DIR --only little     # one study
    python benchmarks/real_model.py --table                           # the page, of benchmarks/results alone

DIR of the data holds `wikitext2/wiki.{train,valid,test}.tokens`, `dailydialog/{train,validation,test}.jsonl` and
`tinystories/valid_sample.txt`; DIR of the models `SmolLM2-135M-Instruct`. Each study is a run of `abr compare`, first
with one seed and a few rules, then with more of both. After each of these steps the numbers are written to
benchmarks/results/real_model.json, and the page to docs/measure/real-model.md.

Equal passes: more data than budget. Little data: few batches, and epochs over them or repeats of each. All runs have
LoRA defaults, batches of one block, and a learning rate that decays to zero over the budget. The learning rate of each
rule is the best on the validation split of the first seed. What is compared is nll on the test split.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from effectiveness import NO_SKIPPING, RULES, Setting, Study, blocks_of, run, tables, texts_of
from transformers import AutoTokenizer

from abr_trainer.records.files import write_whole

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "real_model.json"
PAGE = ROOT / "docs" / "measure" / "real-model.md"

MODEL = "SmolLM2-135M-Instruct"
BLOCK = 256
"""Tokens in a block. A batch is one block."""

HELD_OUT = {"validation": 32, "test": 48}
"""Blocks of the splits that choose, and that judge."""

PASSES = "100"
SEEDS = (0, 1, 2)
RATES = ("3e-4", "1e-3", "3e-3")
FEW_BATCHES = 40

FLAGS = (
    *("--block_size", str(BLOCK), "--per_device_train_batch_size", "1", "--per_device_eval_batch_size", "4"),
    *("--torch_dtype", "float32", "--eval_on_start", "false", "--logging_steps", "25", "--use_cpu"),
    *("--save_strategy", "no", "--max_passes", PASSES, *NO_SKIPPING),
)

TUNE = ("--tune", "learning_rate", *RATES, "--tune_seeds", "1")

TIMES = {f"fixed {n}": f"fixed:{n}" for n in (2, 3, 4, 6, 8)}
DECIDING = {name: RULES[name] for name in ("abr 1.0", "abr q0.8", "window")}


@dataclass(frozen=True)
class Queue:
    """A study, and the rules that are tried before the others."""

    study: Study
    first: tuple[str, ...]

    def steps(self) -> Iterator[Study]:
        """Yield the study as it grows: the first rules with one seed, with all seeds, then all rules."""
        some = {name: arm for name, arm in self.study.arms.items() if name in self.first}
        for arms, seeds in (
            (some, self.study.seeds[:1]),
            (some, self.study.seeds),
            (self.study.arms, self.study.seeds),
        ):
            yield replace(self.study, arms=arms, seeds=seeds)


def queue() -> Iterator[Queue]:
    """Yield the studies in order of worth."""

    def study(regime: str, corpus: str, title: str, arms: dict[str, str], data: str) -> Study:
        return Study(regime, Setting(MODEL, corpus, RATES), title, arms, data, (), TUNE, SEEDS, common=FLAGS)

    baseline = {"baseline": RULES["baseline"]}
    arms = {**baseline, **TIMES, **DECIDING}
    yield Queue(
        study("equal passes", "wikitext2", f"{PASSES} passes", arms, "plenty"), ("baseline", "fixed 2", "abr 1.0")
    )
    arms = {**baseline, "fixed 2": "fixed:2", "abr 1.0": RULES["abr 1.0"], "replay": RULES["replay"]}
    title = f"{FEW_BATCHES} batches, {PASSES} passes"
    yield Queue(study("little data", "wikitext2", title, arms, "few"), ("baseline", "fixed 2"))
    for corpus in ("dailydialog", "tinystories"):
        arms = {**baseline, "fixed 2": "fixed:2", "fixed 3": "fixed:3"}
        yield Queue(study("equal passes", corpus, f"{PASSES} passes", arms, "plenty"), ("baseline", "fixed 2"))


def write_data(study: Study, args: argparse.Namespace) -> Path:
    """Write the blocks that a study trains on and is judged by, and return where."""
    corpus = study.setting.corpus
    folder: Path = args.out / "data" / corpus
    tokenizer = AutoTokenizer.from_pretrained(args.models / MODEL)

    def write(name: str, blocks: list[list[int]]) -> None:
        lines = (json.dumps({"input_ids": block}) + "\n" for block in blocks)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / f"{name}.jsonl", "".join(lines))

    for split, count in HELD_OUT.items():
        write(split, random.Random(0).sample(blocks_of(texts_of(corpus, split, args.data), tokenizer, BLOCK), count))
    train = blocks_of(texts_of(corpus, "train", args.data), tokenizer, BLOCK)
    for seed in study.seeds:
        drawn = random.Random(seed).sample(train, int(PASSES))
        write(f"plenty-{seed}", drawn)
        write(f"few-{seed}", drawn[:FEW_BATCHES])
    return folder


INTRODUCTION = f"""{MODEL} (134.5 million parameters, weights dequantised from 4 bit) with LoRA. A batch is one block
of {BLOCK} tokens, and a run has {PASSES} passes, in fp32 on a CPU. Test nll in nats per token, paired by seed with the
first line of each table; a 95 % t interval over seeds; the perplexity in percent. Made by the command below, of
`benchmarks/results/real_model.json`. The studies are not finished: the command goes on with them."""


def page(studies: list[dict[str, Any]]) -> str:
    """Return the page, made of the results alone."""
    command = "python benchmarks/real_model.py --data DIR --models DIR"
    lines = ["# What repeats are worth on a real model", "", INTRODUCTION, "", f"    {command}", *tables(studies), ""]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory of the corpora")
    parser.add_argument("--models", type=Path, help="directory of the model's directory")
    parser.add_argument("--out", type=Path, default=Path("runs/real_model"), help="where the runs lie")
    parser.add_argument("--only", nargs="+", default=[], help="parts of the names of studies, e.g. little")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="write the page of the results anew, and run nothing")
    args = parser.parse_args(argv)
    done: list[dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    if not args.table:
        if args.data is None or args.models is None:
            parser.error("--data and --models say where corpora and model are")
        args.out, args.data, args.models = args.out.resolve(), args.data.resolve(), args.models.resolve()
    order = [each.study.folder for each in queue()]
    for each in () if args.table else queue():
        if args.only and not any(part in each.study.folder for part in args.only):
            continue
        data = write_data(each.study, args)
        for step in each.steps():
            found = run(step, data, args)
            done = sorted(
                [*(other for other in done if other["name"] != found["name"]), found],
                key=lambda entry: order.index(entry["name"]),
            )
            write_whole(RESULTS, json.dumps(done, indent=1) + "\n")
            write_whole(PAGE, page(done))
            print(*tables([found]), sep="\n", flush=True)
    write_whole(PAGE, page(done))
    return done


if __name__ == "__main__":
    main()
