"""What dropping rows is worth: broken rows in real data, and four ways to train on them.

    python benchmarks/rows.py --data DIR --models DIR                    # hours on one core
    python benchmarks/rows.py --data DIR --models DIR --quick            # a few minutes, into --out
    python benchmarks/rows.py --data DIR --models DIR --overhead         # a step with rows judged, beside stock
    python benchmarks/rows.py --table                                    # the page, made of benchmarks/results alone

DIR of the data holds `wikitext2/wiki.{train,test}.tokens`, `dailydialog/{train,test}.jsonl` and
`mrpc/{train,test}.jsonl`; DIR of the models `stories260k-hf`. All runs are made in this process, one after the other,
the most telling ones first. Each is written to benchmarks/results/rows.json when it is finished, and the same command
goes on where it was stopped. Tables go to docs/measure/rows.md.

A share of the rows is broken. The arms see the same rows in the same order: "none" trains on all, "batches" skips
batches (`--skip_outliers robust`), "rows" drops rows (`--skip_rows robust`), and "oracle" drops exactly the broken
rows. What is compared is nll, or accuracy, on clean test data.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from effectiveness import blocks_of, difference, encoded, spoil, texts_of, write_runs
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)
from turns import BatchTimes, paired_ratios

from abr_trainer import ABRConfig, ABRTrainer
from abr_trainer.comparison.statistics import paired, verdict
from abr_trainer.data.columns import as_text
from abr_trainer.records.files import write_whole
from abr_trainer.records.provenance import versions_and_machine
from abr_trainer.schedulers import Row, RowRule
from abr_trainer.training.callbacks import ABRCallback

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "rows.json"
PAGE = ROOT / "docs" / "measure" / "rows.md"

MODEL = "stories260k-hf"
LONGEST = 160
"""Most tokens of a dialogue; longer ones are left out, not cut. Pairs of sentences are cut."""

SEEDS = (0, 1, 2, 3, 4)
ARMS = ("none", "batches", "rows", "oracle")
EASY = ("random", "shuffled", "bytes", "repeated")
"""Kinds of dirt that must be caught."""


@dataclass(frozen=True)
class Setting:
    """What is trained on, and how.

    Attributes:
        rows: In a batch.
        batches: In a run.
    """

    corpus: str
    rows: int
    batches: int

    @property
    def name(self) -> str:
        what = {
            "wikitext2": "WikiText-2, blocks of 128 tokens",
            "dailydialog": f"DailyDialog, whole dialogues of up to {LONGEST} tokens",
        }
        return f"{what.get(self.corpus, 'MRPC, pairs of sentences')}, {self.rows} rows a batch"


BATCHES = {4: 160, 16: 80, 64: 32}
WIKI = {rows: Setting("wikitext2", rows, batches) for rows, batches in BATCHES.items()}
TALK = {rows: Setting("dailydialog", rows, batches) for rows, batches in BATCHES.items()}
PAIRS = Setting("mrpc", 16, 160)


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        kind: Of the broken rows; empty where none are.
        share: Of the rows that are broken, in percent.
        arm: What is done about them.
    """

    setting: Setting
    kind: str
    share: int
    arm: str
    seed: int


def cases() -> Iterator[Case]:
    """Yield all runs, each once, the most telling ones first."""
    left = dict.fromkeys([*_first(), *_all()])
    yield from left


def _several(setting: Setting, kinds: Sequence[str], shares: Sequence[int], arms: Sequence[str]) -> list[Any]:
    return [(setting, *each) for each in itertools.product(kinds, shares, arms)]


def _clean(setting: Setting, arms: Sequence[str] = ARMS[:3]) -> list[Any]:
    return _several(setting, [""], [0], arms)


def _first() -> Iterator[Case]:
    """Yield what is demanded: of blocks in batches of 16 with all seeds, of the rest with three."""
    blocks = [
        *_clean(WIKI[16]),
        *_several(WIKI[16], ["random"], [10], ARMS),
        *_several(WIKI[16], EASY[1:], [10], ["rows", "oracle"]),
        *_several(WIKI[16], ["random"], [5], ["rows", "oracle"]),
    ]
    others = [
        *_clean(TALK[16], ["none", "rows"]),
        *_several(TALK[16], EASY, [10], ["rows", "oracle"]),
        *_several(TALK[16], ["random"], [10], ["none", "batches"]),
        *_several(TALK[16], ["swapped"], [10], ARMS),
        *_several(WIKI[16], ["foreign"], [10], ["none", "rows", "oracle"]),
        *_clean(PAIRS),
        *_several(PAIRS, ["label"], [10], ARMS),
    ]
    for rows in (4, 64):
        others += [*_clean(WIKI[rows], ["none", "rows"]), *_several(WIKI[rows], EASY, [10], ["rows", "oracle"])]
    for wanted, seeds in ((blocks, SEEDS), (others, SEEDS[:3])):
        for seed, each in itertools.product(seeds, wanted):
            yield Case(*each, seed)


def _all() -> Iterator[Case]:
    """Yield everything, the first seed of all of it before the second."""
    wanted = [
        *_clean(WIKI[16]),
        *_several(WIKI[16], EASY, [10, 5], ARMS),
        *_clean(TALK[16]),
        *_several(TALK[16], ["random"], [10], ARMS),
        *_several(TALK[16], EASY[1:], [10], ["rows", "oracle"]),
    ]
    for rows, group in itertools.product((4, 64), (WIKI, TALK)):
        wanted += [
            *_clean(group[rows]),
            *_several(group[rows], ["random"], [10], ARMS),
            *_several(group[rows], EASY[1:], [10], ["rows", "oracle"]),
        ]
    wanted += [
        *_several(TALK[16], ["swapped"], [10], ARMS),
        *_clean(PAIRS),
        *_several(PAIRS, ["label"], [10, 25], ARMS),
        *_several(WIKI[16], ["foreign"], [10], ARMS),
        *_several(TALK[16], ["foreign"], [10], ARMS),
        *_several(WIKI[16], EASY, [1, 3, 25], ["rows", "oracle"]),
        *_several(WIKI[16], ["random"], [1, 3, 25], ["none", "batches"]),
    ]
    for seed, each in itertools.product(SEEDS, wanted):
        yield Case(*each, seed)


def quick() -> Iterator[Case]:
    """Yield a few small runs, to see that everything works."""
    small = {"wikitext2": 4, "dailydialog": 4, "mrpc": 4}
    for corpus, rows in small.items():
        setting = Setting(corpus, rows, 30)
        for arm in ARMS[:3]:
            yield Case(setting, "", 0, arm, 0)
        kinds = {"wikitext2": ("random", "foreign"), "dailydialog": ("shuffled", "swapped"), "mrpc": ("label",)}[
            corpus
        ]
        for kind, arm in itertools.product(kinds, ARMS):
            yield Case(setting, kind, 10, arm, 0)


# ---- Data ----


class Corpora:
    """Rows of the corpora, read once.

    Args:
        foreign: Text in another language.
    """

    def __init__(self, data: Path, models: Path, foreign: str) -> None:
        self.data = data
        self.model = models / MODEL
        self.foreign = foreign
        self.tokenizer = AutoTokenizer.from_pretrained(self.model, model_max_length=10**9)

    @functools.cached_property
    def blocks(self) -> dict[str, list[list[int]]]:
        """Blocks of WikiText-2."""
        return {
            split: blocks_of(texts_of("wikitext2", split, self.data), self.tokenizer) for split in ("train", "test")
        }

    @functools.cached_property
    def dialogues(self) -> dict[str, list[list[str]]]:
        """Turns of the dialogues of DailyDialog; those of the test split are not in the other."""
        found = {
            split: [turns for turns in map(_turns, self._lines("dailydialog", split)) if self._fits(turns)]
            for split in ("test", "train")
        }
        held_out = {as_text(turns) for turns in found["test"]}
        return found | {"train": [turns for turns in found["train"] if as_text(turns) not in held_out]}

    @functools.cached_property
    def pairs(self) -> dict[str, list[dict[str, Any]]]:
        """Pairs of MRPC with their labels."""

        def row(pair: dict[str, Any]) -> dict[str, Any]:
            sentences = (pair["sentence1"], pair["sentence2"])
            ids = self.tokenizer(*sentences, truncation=True, max_length=LONGEST)["input_ids"]
            return {"input_ids": ids, "labels": pair["label"]}

        return {split: [row(json.loads(line)) for line in self._lines("mrpc", split)] for split in ("train", "test")}

    def _lines(self, corpus: str, split: str) -> list[str]:
        return (self.data / corpus / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()

    def _fits(self, turns: list[str]) -> bool:
        return len(self.ids_of(turns)) <= LONGEST

    def ids_of(self, turns: list[str]) -> list[int]:
        ids: list[int] = self.tokenizer(as_text(turns) + "\n\n", add_special_tokens=False)["input_ids"]
        return ids

    def test_rows(self, corpus: str) -> list[dict[str, Any]]:
        if corpus == "mrpc":
            return self.pairs["test"][:800]
        if corpus == "wikitext2":
            return [{"input_ids": ids} for ids in random.Random(0).sample(self.blocks["test"], 96)]
        return [{"input_ids": self.ids_of(turns)} for turns in random.Random(0).sample(self.dialogues["test"], 128)]

    def train_rows(self, case: Case) -> tuple[list[dict[str, Any]], list[int]]:
        """Return the rows of a run in order, and which of them are broken: the same ones for every arm."""
        setting = case.setting
        count = setting.rows * setting.batches
        draw = random.Random(f"{setting.corpus}-{case.seed}")
        everything: Sequence[Any] = {
            "wikitext2": lambda: self.blocks,
            "dailydialog": lambda: self.dialogues,
            "mrpc": lambda: self.pairs,
        }[setting.corpus]()["train"]
        drawn = draw.sample(everything, count)
        draw = random.Random(f"{case.kind}-{case.share}-{case.seed}")
        broken = sorted(draw.sample(range(count), round(count * case.share / 100)))
        if setting.corpus == "mrpc":
            rows = [dict(row) for row in drawn]
            for index in broken:
                rows[index]["labels"] = 1 - rows[index]["labels"]
            return rows, broken
        if case.kind == "swapped":  # each answer is that of another dialogue
            for index in broken:
                others = itertools.cycle(draw.choice(everything)[1::2])
                drawn[index] = [next(others) if i % 2 else turn for i, turn in enumerate(drawn[index])]
        rows = [{"input_ids": row if setting.corpus == "wikitext2" else self.ids_of(row)} for row in drawn]
        if case.kind != "swapped":
            for index in broken:
                rows[index]["input_ids"] = self.broken(case.kind, rows[index]["input_ids"], draw)
        return rows, broken

    def broken(self, kind: str, row: list[int], draw: random.Random) -> list[int]:
        if kind != "foreign" or not self.foreign:
            return spoil("cipher" if kind == "foreign" else kind, [row], self.tokenizer, draw)[0]
        start = draw.randrange(max(1, len(self.foreign) - 8 * len(row)))
        return encoded(self.foreign[start : start + 8 * len(row)], self.tokenizer, len(row))


def _turns(line: str) -> list[str]:
    turns: list[str] = json.loads(line)["dialog"]
    return turns


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(each) for each in ids], batch_first=True),
    }
    if "labels" in rows[0]:
        return batch | {"labels": torch.tensor([row["labels"] for row in rows])}
    return batch | {"labels": pad_sequence(ids, batch_first=True, padding_value=-100)}


# ---- Runs ----


class Oracle(RowRule):
    """Drop exactly the broken rows.

    Args:
        broken: Their numbers in the order of the run.
        rows: In a batch.
    """

    def __init__(self, broken: Sequence[int], rows: int) -> None:
        self.broken = frozenset(broken)
        self.rows = rows

    def decide(self, row: Row) -> bool:
        return row.batch * self.rows + row.position not in self.broken


class Tally(ABRCallback):
    """Count which rows a run did not train on.

    Args:
        broken: Numbers of the broken rows in the order of the run.
        rows: In a batch.
    """

    def __init__(self, broken: Sequence[int], rows: int) -> None:
        self.broken = frozenset(broken)
        self.size = rows
        self.counts = dict.fromkeys(("broken", "broken_lost", "good", "good_lost", "skipped"), 0)

    def on_outcome(self, args: Any, state: Any, control: Any, outcome: Any, rows: Any = None, **kwargs: Any) -> None:  # type: ignore[override]
        first = outcome.observation.batch * self.size
        self.counts["skipped"] += outcome.skipped
        for position in range(self.size):
            kind = "broken" if first + position in self.broken else "good"
            lost = outcome.skipped or (rows is not None and not rows.keep[position])
            self.counts[kind] += 1
            self.counts[f"{kind}_lost"] += lost


def new_model(corpora: Corpora, setting: Setting, seed: int) -> Any:
    set_seed(seed)
    if setting.corpus == "mrpc":
        model = AutoModelForSequenceClassification.from_pretrained(corpora.model, num_labels=2, dtype=torch.float32)
        model.config.pad_token_id = 0
        return model
    base = copy.deepcopy(_base(corpora.model))
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))


@functools.cache
def _base(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def settings_of(setting: Setting, seed: int, directory: str) -> dict[str, Any]:
    return dict(
        output_dir=directory,
        per_device_train_batch_size=setting.rows,
        max_steps=setting.batches,
        learning_rate=1e-3 if setting.corpus == "mrpc" else 2e-3,
        train_sampling_strategy="sequential",
        seed=seed,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def run(case: Case, corpora: Corpora) -> dict[str, Any]:
    """Train once, and return what was dropped and how good the model is."""
    setting = case.setting
    rows, broken = corpora.train_rows(case)
    tally = Tally(broken, setting.rows)
    with tempfile.TemporaryDirectory() as directory:
        config = ABRConfig(
            **settings_of(setting, case.seed, directory),
            skip_outliers="robust" if case.arm == "batches" else "none",
            skip_rows="robust" if case.arm == "rows" else "none",
        )
        trainer = ABRTrainer(
            model=new_model(corpora, setting, case.seed),
            args=config,
            train_dataset=rows,
            data_collator=collate,
            callbacks=[tally],
            row_rule=Oracle(broken, setting.rows) if case.arm == "oracle" else None,
        )
        started = time.process_time()
        trainer.train()
        seconds = time.process_time() - started
    quality = score(trainer.model, corpora.test_rows(setting.corpus), is_classifier=setting.corpus == "mrpc")
    what = asdict(setting) | {name: getattr(case, name) for name in ("kind", "share", "arm", "seed")}
    return what | tally.counts | quality | {"seconds": round(seconds, 2)}


@torch.no_grad()
def score(model: Any, rows: Sequence[Mapping[str, Any]], is_classifier: bool) -> dict[str, float]:
    """Return the accuracy of a classifier, or the nll per token of a language model."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(rows), 32):
        batch = collate(rows[start : start + 32])
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        if is_classifier:
            total += int((logits.argmax(-1) == batch["labels"]).sum())
            count += len(logits)
        else:
            labels = batch["labels"][:, 1:]
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="sum")
            total += float(loss)
            count += int((labels != -100).sum())
    return {"accuracy" if is_classifier else "nll": total / count}


# ---- What a step costs ----


def overhead(corpora: Corpora, rows: int, batches: int) -> dict[str, Any]:
    """Return the seconds of our batches, with rows judged, over those of stock Trainer, which take turns with them."""
    setting = Setting("wikitext2", rows, batches)
    data, _ = corpora.train_rows(Case(setting, "", 0, "none", 0))

    def training(skip_rows: str | None) -> Callable[[BatchTimes], object]:
        def train(times: BatchTimes) -> None:
            with tempfile.TemporaryDirectory() as directory:
                options = settings_of(setting, 0, directory)
                ours = skip_rows is not None
                args = (
                    ABRConfig(**options, skip_outliers="none", skip_rows=skip_rows)
                    if ours
                    else TrainingArguments(**options)
                )
                trainer_cls = ABRTrainer if ours else Trainer
                model = new_model(corpora, setting, 0)
                trainer_cls(
                    model=model, args=args, train_dataset=data, data_collator=collate, callbacks=[times]
                ).train()

        return train

    return {
        "rows": rows,
        **{name: paired_ratios(training(None), training(name), warm_up=10) for name in ("none", "robust")},
    }


# ---- The page ----


def key_of(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[name] for name in ("corpus", "rows", "batches", "kind", "share", "arm", "seed"))


def regimes(runs: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], dict[str, dict[int, Mapping[str, Any]]]]:
    """Return the runs by regime, arm and seed."""
    found: dict[tuple[Any, ...], dict[str, dict[int, Mapping[str, Any]]]] = {}
    for entry in runs:
        *regime, arm, seed = key_of(entry)
        found.setdefault(tuple(regime), {}).setdefault(arm, {})[seed] = entry
    return found


def lost(entries: Sequence[Mapping[str, Any]], kind: str) -> tuple[int, int]:
    """Return how many rows of a kind were not trained on, and how many there were."""
    return sum(entry[f"{kind}_lost"] for entry in entries), sum(entry[kind] for entry in entries)


def quality(entry: Mapping[str, Any]) -> float:
    return float(entry["nll"] if "nll" in entry else entry["accuracy"])


def beside(
    ours: Mapping[int, Mapping[str, Any]], others: Mapping[int, Mapping[str, Any]] | None
) -> dict[str, Any] | None:
    """Return what the differences show between runs of the seeds that both have; None if there are none."""
    seeds = sorted(ours.keys() & (others or {}).keys())
    if not seeds or others is None:
        return None
    is_nll = "nll" in ours[seeds[0]]
    found = paired([quality(ours[seed]) - quality(others[seed]) for seed in seeds], lower_is_better=is_nll)
    return found | {"verdict": verdict(found, len(seeds), lower_is_better=is_nll), "is_nll": is_nll}


def change(found: dict[str, Any] | None) -> str:
    """Return a difference in nll, and in percent of the perplexity; or one in accuracy."""
    if found is None:
        return ""
    if "t_low" not in found:
        return f"{found['mean']:+.4f} (one seed)"
    if found["is_nll"]:
        return difference(found)
    return f"{found['mean']:+.3f} ({found['t_low']:+.3f} to {found['t_high']:+.3f})"


def table(corpus: str, rows: int, found: Mapping[tuple[Any, ...], Any]) -> list[str]:
    """Return a line for each arm of each regime of a setting."""
    lines = [
        "| broken rows | arm | recall | good rows lost | beside clean data, none | beside the oracle | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    mine = sorted(
        (each for each in found if each[:2] == (corpus, rows)), key=lambda each: (each[4] != 0, each[3], each[4])
    )
    clean = next((found[each].get("none") for each in mine if each[4] == 0), None)
    for regime in mine:
        *_, kind, share = regime
        for arm in (arm for arm in ARMS if arm in found[regime]):
            runs = found[regime][arm]
            entries = list(runs.values())
            caught, broken = lost(entries, "broken")
            gone, good = lost(entries, "good")
            oracle = None if arm == "oracle" else beside(runs, found[regime].get("oracle"))
            against = None if not share and arm == "none" else beside(runs, clean)
            cells = [
                f"{share} % {NAMES[kind]}" if share else "none",
                arm,
                f"{caught / broken:.3f} ({caught}/{broken})" if broken else "",
                f"{gone / good:.2%} ({gone}/{good})",
                change(against),
                change(oracle),
                f"{statistics.median(entry['seconds'] for entry in entries):.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


NAMES = {
    "random": "random tokens",
    "shuffled": "shuffled tokens",
    "bytes": "byte noise",
    "repeated": "garbage, repeated",
    "foreign": "another language",
    "swapped": "answers of other dialogues",
    "label": "wrong labels",
}

MUST_CATCH, MAY_LOSE, MAY_LOSE_CLEAN, ABOVE_ORACLE, ABOVE_CLEAN, MAY_COST = 0.95, 0.005, 0.003, 0.003, 0.002, 1.02


def requirements(results: Mapping[str, Any]) -> list[str]:
    """Return a line for each thing that was demanded: the number, and whether it is reached."""
    found = regimes(results["runs"])

    def line(what: str, demanded: str, reached: str, is_reached: bool | None) -> str:
        word = "no data yet" if is_reached is None else "reached" if is_reached else "not reached"
        return f"| {what} | {demanded} | {reached} | {word} |"

    lines = ["| what | target | measured | verdict |", "| --- | --- | --- | --- |"]
    for corpus, rows in itertools.product(("wikitext2", "dailydialog"), (4, 16, 64)):
        where = f"{'WikiText-2' if corpus == 'wikitext2' else 'DailyDialog'}, {rows} rows a batch"
        must = {
            regime: arms
            for regime, arms in found.items()
            if regime[:2] == (corpus, rows) and regime[3] in EASY and regime[4] <= 10 and "rows" in arms
        }
        if must:
            recalls, false, above = {}, {}, {}
            for regime, arms in must.items():
                name = f"{regime[4]} % {NAMES[regime[3]]}"
                caught, broken = lost(list(arms["rows"].values()), "broken")
                gone, good = lost(list(arms["rows"].values()), "good")
                recalls[name], false[name] = caught / broken, gone / good
                against = beside(arms["rows"], arms.get("oracle"))
                if against is not None:
                    above[name] = math.expm1(against["mean"])
            worst = min(recalls, key=lambda name: recalls[name])
            share = f"lowest of {len(recalls)}: {recalls[worst]:.3f}, {worst}"
            lines.append(line(f"{where}: recall, up to 10 %", "0.95", share, recalls[worst] >= MUST_CATCH))
            worst = max(false, key=lambda name: false[name])
            share = f"highest: {false[worst]:.2%}, {worst}"
            lines.append(line(f"{where}: good rows lost", "at most 0.5 %", share, false[worst] <= MAY_LOSE))
            if above:
                worst = max(above, key=lambda name: above[name])
                share = f"highest mean: {above[worst]:+.2%}, {worst}"
                lines.append(
                    line(
                        f"{where}: perplexity beside the oracle", "at most +0.3 %", share, above[worst] <= ABOVE_ORACLE
                    )
                )
        clean = next((arms for regime, arms in found.items() if regime[:2] == (corpus, rows) and not regime[4]), {})
        lines += clean_lines(where, clean, line)
    mrpc = next((arms for regime, arms in found.items() if regime[0] == "mrpc" and not regime[4]), {})
    lines += clean_lines("MRPC", mrpc, line)
    for entry in results.get("overhead", []):
        low, middle, high = statistics.quantiles(entry["robust"], n=4)
        reached = f"{middle:.3f} ({low:.3f} to {high:.3f}); with no rule {statistics.median(entry['none']):.3f}"
        name = f"a step with rows judged beside one of stock Trainer, {entry['rows']} rows a batch"
        lines.append(line(name, "at most 1.02", reached, middle <= MAY_COST))
    return lines


def clean_lines(where: str, arms: Mapping[str, Any], line: Callable[[str, str, str, bool | None], str]) -> list[str]:
    """Return what is demanded on clean data."""
    if "rows" not in arms:
        return []
    gone, good = lost(list(arms["rows"].values()), "good")
    lines = [
        line(f"{where}: rows lost of clean data", "at most 0.3 %", f"{gone / good:.2%}", gone / good <= MAY_LOSE_CLEAN)
    ]
    against = beside(arms["rows"], arms.get("none"))
    if against is not None and against["is_nll"]:
        above = math.expm1(against["mean"])
        lines.append(
            line(f"{where}: perplexity on clean data", "at most +0.2 %", f"{above:+.2%}", above <= ABOVE_CLEAN)
        )
    return lines


INTRODUCTION = f"""A share of the rows is broken, at random places. All arms see the same rows in the same order, once.
The model is stories260k with LoRA of rank 8, at a learning rate of 2e-3 with linear decay. A run has 160 batches of 4
rows, 80 of 16, or 32 of 64. On MRPC it trains all weights at 1e-3, for 160 batches of 16. Dialogues have up to
{LONGEST} tokens; longer ones are left out.

- **none** trains on all rows.
- **batches** skips batches: `--skip_outliers robust`.
- **rows** drops rows: `--skip_rows robust`.
- **oracle** drops exactly the broken rows.

Recall is the share of the broken rows that was not trained on. Good rows are lost if they are dropped, or stand in a
batch that is skipped. Differences are those in nll per token on clean test data (MRPC: in accuracy), paired by seed,
with a 95 % t interval, and in percent of the perplexity. Seconds are CPU seconds of a run on one core. Made by the
command below, of `benchmarks/results/rows.json`."""


def page(results: Mapping[str, Any]) -> str:
    """Return the page, made of the results alone."""
    runs = results["runs"]
    found = regimes(runs)
    seeds = sorted({entry["seed"] for entry in runs})
    lines = ["# Dropping broken rows", "", INTRODUCTION, ""]
    lines += ["    python benchmarks/rows.py --data DIR --models DIR", ""]
    lines += [f"{len(runs)} runs, up to {len(seeds)} seeds. Another language: {results['foreign']}.", ""]
    for setting in (*WIKI.values(), *TALK.values(), PAIRS):
        if any(regime[:2] == (setting.corpus, setting.rows) for regime in found):
            lines += [f"## {setting.name}", "", *table(setting.corpus, setting.rows, found), ""]
    lines += ["## Targets", "", "They were set before the runs.", "", *requirements(results), ""]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory of the corpora")
    parser.add_argument("--models", type=Path, help="directory of the models")
    parser.add_argument("--foreign", type=Path, help="a text in another language; without it, letters are swapped")
    parser.add_argument("--out", type=Path, default=Path("runs/rows"), help="where --quick writes")
    parser.add_argument("--quick", action="store_true", help="few small runs, into --out instead of the results")
    parser.add_argument("--overhead", action="store_true", help="measure what a step costs, and nothing else")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="run these only")
    parser.add_argument("--most", type=int, help="stop after so many runs")
    parser.add_argument("--table", action="store_true", help="write the page of the results anew, and run nothing")
    args = parser.parse_args(argv)
    path = args.out / "rows.json" if args.quick else RESULTS
    page_path = args.out / "rows.md" if args.quick else PAGE
    results: dict[str, Any] = {"runs": []}
    if path.exists():
        results = json.loads(path.read_text(encoding="utf-8"))
    if args.table:
        write_whole(page_path, page(results))
        return results
    if args.data is None or args.models is None:
        parser.error("--data and --models say where corpora and models are")
    transformers.utils.logging.set_verbosity(50)  # dropped rows are counted, not told
    torch.set_num_threads(1)
    text = args.foreign.read_text(encoding="utf-8") if args.foreign else ""
    corpora = Corpora(args.data, args.models, text)
    results["foreign"] = args.foreign.name if args.foreign else "English in a cipher"
    results |= versions_and_machine("cpu", threads=1, processes=1)
    if args.overhead:
        results["overhead"] = [overhead(corpora, rows, 60) for rows in (4, 16)]
        write_runs(results, path)
        for entry in results["overhead"]:
            print(entry["rows"], {name: statistics.median(entry[name]) for name in ("none", "robust")}, flush=True)
    else:
        done = {key_of(entry) for entry in results["runs"]}
        wanted = [case for case in (quick() if args.quick else cases()) if case.seed in args.seeds]
        left = [case for case in wanted if key_of(asdict(case.setting) | asdict(case)) not in done][: args.most]
        for number, case in enumerate(left, start=1):
            entry = run(case, corpora)
            results["runs"].append(entry)
            write_runs(results, path)
            print(f"{number}/{len(left)}", json.dumps(entry), flush=True)
    write_whole(page_path, page(results))
    return results


if __name__ == "__main__":
    main()
