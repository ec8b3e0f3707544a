"""Repeats on generated batches: what several updates on a rollout are worth, where generating is most of the work.

    python benchmarks/rollouts.py --models DIR             # an hour on one core; goes on where it was stopped
    python benchmarks/rollouts.py --models DIR --quick     # a minute, into --out
    python benchmarks/rollouts.py --table                  # the page, made of benchmarks/results alone

DIR of the models holds `stories260k-hf`. All runs are GRPO of TRL with `ABRGRPOTrainer`, in this process, one after
the other. Each has the same number of CPU seconds, which do not depend on what else the machine does. The static arms
make 1, 2 or 4 updates on each batch, as `num_iterations` of TRL does; "kl" decides by `--repeat_scheduler kl`. The
learning rate of each arm is the best of five on the first seed, by the mean reward over the time of the run.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import math
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from effectiveness import write_runs
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed

from abr_trainer.comparison.statistics import paired, verdict
from abr_trainer.integrations.trl import ABRGRPOConfig, ABRGRPOTrainer
from abr_trainer.records.files import write_whole
from abr_trainer.records.provenance import versions_and_machine
from abr_trainer.schedulers import ConstantScheduler, KLScheduler, RepeatScheduler
from abr_trainer.training.callbacks import ABRCallback

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "rollouts.json"
PAGE = ROOT / "docs" / "measure" / "rollouts.md"

MODEL = "stories260k-hf"
SEEDS = (0, 1, 2, 3, 4)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
ARMS: dict[str, Callable[[], RepeatScheduler]] = {
    "1": lambda: ConstantScheduler(1),
    "2": lambda: ConstantScheduler(2),
    "4": lambda: ConstantScheduler(4),
    "kl": lambda: KLScheduler(max_repeats=4),
}
GROUP = 4


@dataclass(frozen=True)
class Task:
    """What is rewarded.

    Attributes:
        tokens: Most tokens of a completion.
        seconds: CPU seconds of a run.
        rows: Continuations in a batch.
    """

    name: str
    title: str
    tokens: int
    seconds: float
    rows: int = 8


WORDS = Task(
    "words", "The number of different words with an `e` in a continuation of 96 tokens", tokens=96, seconds=30
)
SUMS = Task("sums", "1 for the right sum of two numbers below 5, 0.1 for a number alone", tokens=8, seconds=20)
FEW = Task("few", f"{WORDS.title}, {GROUP} a batch", tokens=96, seconds=30, rows=GROUP)
TASKS = (WORDS, SUMS, FEW)

BELOW = 5
"""The numbers of a sum are less."""

BEGINNINGS = ("Once upon a time", "One day", "Lily and Ben", "The dog", "Tom was", "There was a", "She saw", "The sun")


@dataclass(frozen=True)
class Case:
    task: Task
    arm: str
    rate: float
    seed: int


# ---- Tasks ----


def prompts_of(task: Task) -> Dataset:
    if task is SUMS:
        return Dataset.from_list(
            [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a in range(BELOW) for b in range(BELOW)]
        )
    return Dataset.from_list([{"prompt": each, "answer": ""} for each in BEGINNINGS])


def count_words(completions: Sequence[str], **_: Any) -> list[float]:
    return [float(len({word for word in re.findall("[a-z]+", text.lower()) if "e" in word})) for text in completions]


def judge_sum(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    def reward(text: str, right: str) -> float:
        number, _, _ = text.strip().partition(".")
        return 1.0 if number == right else 0.1 if number.isdigit() and "." in text else 0.0

    return [reward(text, right) for text, right in zip(completions, answer, strict=True)]


def start_of(task: Task, models: Path) -> Any:
    """Return the model that all runs of a task begin with."""
    return copy.deepcopy(taught_to_add(models)) if task is SUMS else model_of(models)


def model_of(models: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(models / MODEL, dtype=torch.float32)


def tokenizer_of(models: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(models / MODEL, model_max_length=10**9, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@functools.cache
def taught_to_add(models: Path, batches: int = 900) -> Any:
    """Fine-tune on sums of which two of three are wrong, so that there is something to reward."""
    model, tokenizer = model_of(models), tokenizer_of(models)
    draw = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(batches):
        lines = []
        for _ in range(32):
            a, b = draw.randrange(BELOW), draw.randrange(BELOW)
            said = a + b if draw.random() < 1 / 3 else draw.randrange(2 * BELOW - 1)
            lines.append(f"{a} + {b} = {said}.")
        batch = tokenizer(lines, return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


# ---- Runs ----


class Curve(ABRCallback):
    """Remember reward, divergence and CPU time of each batch, and end the run when its time is over."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.lines: list[dict[str, float]] = []
        self._started = 0.0

    def begin(self) -> None:
        self._started = time.process_time()

    def on_outcome(self, args: Any, state: Any, control: Any, outcome: Any, ledger: Any, **kwargs: Any) -> None:  # type: ignore[override]
        spent = time.process_time() - self._started
        if spent >= self.seconds:
            control.should_training_stop = True
        self.lines.append({"seconds": spent, "repeats": outcome.repeats, "kl": outcome.drifts[-1].kl})


def run(case: Case, models: Path, seconds: float | None = None) -> dict[str, Any]:
    """Train once, and return the reward over the run."""
    task = case.task
    set_seed(case.seed)
    rewards: list[float] = []
    judge = judge_sum if task is SUMS else count_words

    def reward(completions: Sequence[str], **given: Any) -> list[float]:
        found = judge(completions, **given)
        rewards.append(statistics.fmean(found))
        return found

    model = start_of(task, models)
    curve = Curve(seconds or task.seconds)
    with tempfile.TemporaryDirectory() as directory:
        trainer = ABRGRPOTrainer(
            model=model,
            args=ABRGRPOConfig(
                output_dir=directory,
                per_device_train_batch_size=task.rows,
                num_generations=GROUP,
                max_completion_length=task.tokens,
                learning_rate=case.rate,
                lr_scheduler_type="constant",
                repeat_scheduler="baseline",
                max_steps=100_000,
                seed=case.seed,
                beta=0.0,
                use_cpu=True,
                bf16=False,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            reward_funcs=reward,
            train_dataset=prompts_of(task),
            processing_class=tokenizer_of(models),
            repeat_scheduler=ARMS[case.arm](),
            callbacks=[curve],
        )
        trainer.remove_callback(PrinterCallback)
        curve.begin()
        trainer.train()
    ledger = trainer.ledger
    lines = [line | {"reward": reward} for line, reward in zip(curve.lines, rewards, strict=True)]
    return {
        "task": task.name,
        **{name: getattr(case, name) for name in ("arm", "rate", "seed")},
        "batches": ledger.batches,
        "updates": ledger.updates,
        "skips": ledger.skips,
        "generated_tokens": int(ledger.batches * task.rows * task.tokens),
        "share_of_generating": ledger.generating_seconds / ledger.seconds,
        "curve": thinned(lines),
    }


def thinned(lines: Sequence[Mapping[str, float]], points: int = 40) -> list[dict[str, float]]:
    """Return means over as many parts of a run."""
    size = max(1, math.ceil(len(lines) / points))
    parts = [lines[i : i + size] for i in range(0, len(lines), size)]
    return [
        {
            "seconds": round(part[-1]["seconds"], 3),
            **{name: round(statistics.fmean(line[name] for line in part), 5) for name in ("reward", "repeats", "kl")},
        }
        for part in parts
    ]


def mean_reward(entry: Mapping[str, Any]) -> float:
    """Return the mean reward over the time of a run: who is better sooner has more."""
    total, before = 0.0, 0.0
    for point in entry["curve"]:
        total += point["reward"] * (point["seconds"] - before)
        before = point["seconds"]
    return total / before


def most_of_the_gain(entry: Mapping[str, Any]) -> float:
    """Return the reward at which a run has made 90 % of what it gains."""
    first, *_, last = (point["reward"] for point in entry["curve"])
    return float(first + 0.9 * (last - first))


def cost_to(entry: Mapping[str, Any], reward: float) -> tuple[float, float]:
    """Return the CPU seconds and generated tokens after which a run has a reward, as a mean over three points of its
    curve; both are infinite if it never has.
    """
    curve = entry["curve"]
    for i in range(len(curve) - 2):
        if statistics.fmean(point["reward"] for point in curve[i : i + 3]) >= reward:
            return float(curve[i + 2]["seconds"]), entry["generated_tokens"] * (i + 3) / len(curve)
    return math.inf, math.inf


def chosen_rate(runs: Sequence[Mapping[str, Any]], task: Task, arm: str) -> float | None:
    """Return the rate with the best mean reward on the first seed, once all are there."""
    found = {
        entry["rate"]: mean_reward(entry)
        for entry in runs
        if (entry["task"], entry["arm"], entry["seed"]) == (task.name, arm, SEEDS[0])
    }
    return max(found, key=lambda rate: found[rate]) if set(RATES) <= found.keys() else None


def cases(runs: Sequence[Mapping[str, Any]], tasks: Sequence[Task]) -> Iterator[Case]:
    """Yield what is to be run next: all rates on the first seed of a task, then the best ones on the others."""
    for task in tasks:
        for arm, rate in itertools.product(ARMS, RATES):
            yield Case(task, arm, rate, SEEDS[0])
        for seed, arm in itertools.product(SEEDS[1:], ARMS):
            rate = chosen_rate(runs, task, arm)
            if rate is not None:
                yield Case(task, arm, rate, seed)


def next_case(runs: Sequence[Mapping[str, Any]], tasks: Sequence[Task]) -> Case | None:
    done = {(entry["task"], entry["arm"], entry["rate"], entry["seed"]) for entry in runs}
    return next(
        (case for case in cases(runs, tasks) if (case.task.name, case.arm, case.rate, case.seed) not in done),
        None,
    )


# ---- The page ----

INTRODUCTION = f"""A run generates {WORDS.rows} continuations a batch, in groups of {GROUP}, and rewards them. The
trainer is `ABRGRPOTrainer`, and the model stories260k, with all its weights, in fp32 on one core. All runs of a task
have the same number of CPU seconds. An arm makes 1, 2 or 4 updates on each batch, as `num_iterations` does, or lets
`--repeat_scheduler kl` decide, up to 4. Its learning rate, constant, is the best of five on the first seed.

Reward is the mean over the time of the run; differences are paired by seed, with a 95 % t interval. The last columns
are the CPU seconds and the generated tokens after which an arm has a reward that arm 1 has when it has made 90 % of
its gain: medians over seeds. Made by the command below, of `benchmarks/results/rollouts.json`.

**In short**: at equal time and tuned learning rates, more updates on a batch were as good as one, and not better. Four
updates were worse in the first task. No other difference is larger than chance, so `kl` was never worse than the best
fixed number. The aim was the reward of one update in 60 % of its time. In the second and third
task, two updates needed 74 % and 77 % of it. They needed 53 % and 63 % of the generated tokens. So more updates pay
where tokens cost more than here."""


def table(task: Task, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a task."""
    lines = [f"## {task.title}", ""]
    of_arms: dict[str, dict[int, Mapping[str, Any]]] = {}
    for arm in ARMS:
        rate = chosen_rate(runs, task, arm)
        of_arms[arm] = {
            entry["seed"]: entry
            for entry in runs
            if (entry["task"], entry["arm"], entry["rate"]) == (task.name, arm, rate)
        }
    if not all(of_arms.values()):
        return []
    lines += [
        "| updates | learning rate | generating | batches | updates a batch | reward | beside 1 (95 %) | verdict | "
        "90 % of the gain of 1 | tokens until then |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arm, entries in of_arms.items():
        seeds = sorted(entries.keys() & of_arms["1"].keys())
        differences = [mean_reward(entries[seed]) - mean_reward(of_arms["1"][seed]) for seed in seeds]
        beside, word = "", ""
        if arm != "1" and len(seeds) > 1:
            found = paired(differences, lower_is_better=False)
            beside = f"{found['mean']:+.3g} ({found['t_low']:+.3g} to {found['t_high']:+.3g})"
            word = verdict(found, len(seeds), lower_is_better=False)
        goals = {seed: most_of_the_gain(of_arms["1"][seed]) for seed in seeds}
        costs = [cost_to(entries[seed], goals[seed]) for seed in seeds]
        seconds, tokens = (statistics.median(column) for column in zip(*costs, strict=True))
        of_all = list(entries.values())
        cells = [
            arm,
            f"{of_all[0]['rate']:g}" + ("\\*" if of_all[0]["rate"] in (RATES[0], RATES[-1]) else ""),
            f"{statistics.median(entry['share_of_generating'] for entry in of_all):.0%}",
            f"{statistics.fmean(entry['batches'] for entry in of_all):,.0f}",
            f"{statistics.fmean(entry['updates'] / entry['batches'] for entry in of_all):.2f}",
            f"{statistics.fmean(mean_reward(entry) for entry in of_all):.3g} ({len(of_all)} seeds)",
            beside,
            word,
            f"{seconds:.0f} s" if math.isfinite(seconds) else "never",
            f"{tokens:,.0f}" if math.isfinite(tokens) else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", "\\* the best of the rates tried lies at their end.", ""]


def page(runs: Sequence[Mapping[str, Any]]) -> str:
    command = "    python benchmarks/rollouts.py --models DIR"
    lines = ["# Repeats on generated batches", "", INTRODUCTION, "", command, ""]
    for task in TASKS:
        lines += table(task, runs)
    return "\n".join(lines).rstrip() + "\n"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="directory of the model's directory")
    parser.add_argument("--out", type=Path, default=Path("runs/rollouts"), help="where --quick writes")
    parser.add_argument("--quick", action="store_true", help="a second a run, to see that everything works")
    parser.add_argument("--tasks", nargs="+", default=[task.name for task in TASKS], help="run only these")
    parser.add_argument("--most", type=int, default=10_000, help="runs before it stops")
    parser.add_argument("--table", action="store_true", help="write the page of the results anew, and run nothing")
    args = parser.parse_args(argv)
    if args.models is None and not args.table:
        parser.error("--models says where the model is")
    tasks = [task for task in TASKS if task.name in args.tasks]
    path = args.out / "rollouts.json" if args.quick else RESULTS
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": []}
    runs: list[dict[str, Any]] = results["runs"]
    torch.set_num_threads(1)
    for _ in range(0 if args.table else args.most):
        case = next_case(runs, tasks)
        if case is None:
            break
        runs.append(run(case, args.models, seconds=1.0 if args.quick else None))
        results |= versions_and_machine("cpu", threads=1, processes=1)
        write_runs(results, path)
        entry = runs[-1]
        told = {name: entry[name] for name in ("task", "arm", "rate", "seed", "batches", "updates", "skips")}
        print(
            told | {"reward": round(mean_reward(entry), 3), "share": round(entry["share_of_generating"], 2)},
            flush=True,
        )
    if not args.quick:
        write_whole(PAGE, page(runs))
    return results


if __name__ == "__main__":
    main()
