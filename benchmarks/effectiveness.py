"""Which rule pays where: every regime as a run of `abr compare`, and one table of all of them.

    python benchmarks/effectiveness.py --data DIR --models DIR --out runs/effectiveness            # hours
    python benchmarks/effectiveness.py --data DIR --models DIR --out runs/quick --quick            # under ten minutes
    python benchmarks/effectiveness.py --table                       # the tables, of benchmarks/results alone

DIR of the data holds `wikitext2/wiki.{train,valid,test}.tokens`, `dailydialog/{train,validation,test}.jsonl` and
`tinystories/valid_sample.txt`; DIR of the models `stories260k-hf` and `wiki-llama-2.6m`. The same command goes on
where it was stopped; `--only scarce` runs one regime. Numbers go to benchmarks/results/effectiveness.json, tables to
docs/measure/effectiveness.md.

Fresh: more data than budget. Controls: the same, beside even and random repeats of the same mean. Scarce: few batches,
many epochs; every arm may stop early. Same batches: the published protocol, 50 batches once, whatever that costs.
Dirty: a share of the batches is broken. All runs of a study have the same model, adapter, data and order of data for a
seed; the learning rate decays to zero over what a run spends, and is tuned for each arm on the validation split where
`--tune` stands. What is compared is nll on the test split.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import random
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from abr_trainer.comparison.collecting import read_comparison
from abr_trainer.comparison.statistics import paired, verdict
from abr_trainer.data.columns import as_text
from abr_trainer.records.files import TRACE_NAME, read_lines, write_whole
from abr_trainer.records.flags import given_flags

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "effectiveness.json"
TABLES = ROOT / "docs" / "measure" / "effectiveness.md"

BLOCK, ROWS = 128, 4
"""Tokens in a block, blocks in a batch."""

MOST_BATCHES = {"fresh": 250, "long": 600}
"""More than a run sees."""

HELD_OUT = {"validation": 64, "test": 160}
"""Blocks of the splits that choose, and that judge."""

KINDS = ("random", "shuffled", "bytes", "repeated")
SHARES = (5, 10, 25)

FLAGS = (
    *("--block_size", str(BLOCK), "--per_device_train_batch_size", str(ROWS), "--per_device_eval_batch_size", "16"),
    *("--torch_dtype", "float32", "--lora_r", "8", "--eval_on_start", "false", "--logging_steps", "50"),
    *("--use_cpu", "--save_strategy", "no"),
)


@dataclass(frozen=True)
class Setting:
    """A model and what it is fine-tuned on."""

    model: str
    corpus: str
    rates: tuple[str, ...]
    rates_when_scarce: tuple[str, ...] = ("2.8e-3", "4e-3", "5.6e-3")

    @property
    def name(self) -> str:
        return f"{self.model.split('-hf')[0]} on {self.corpus}"


STORIES = Setting("stories260k-hf", "wikitext2", ("1e-3", "2e-3", "4e-3"))
TALK = Setting("stories260k-hf", "dailydialog", ("1e-3", "2e-3", "4e-3"), ("1.4e-3", "2e-3", "2.8e-3"))
WIKI = Setting("wiki-llama-2.6m", "dailydialog", ("2e-3", "5.6e-3", "1.6e-2"))
TALES = Setting("wiki-llama-2.6m", "tinystories", ("2e-3", "5.6e-3", "1.6e-2"), ("1.4e-3", "2.8e-3", "5.6e-3"))


@dataclass(frozen=True)
class Study:
    """One comparison.

    Attributes:
        regime: Heads its table.
        title: What is special about it, beside the setting.
        arms: By their names in the table; what `abr compare` takes for each.
        data: Names of the files that it trains on, see `write_data`.
        options: Of `abr compare`.
        flags: Of `abr train`.
        common: Flags that all studies of a benchmark share.
    """

    regime: str
    setting: Setting
    title: str
    arms: dict[str, str]
    data: str
    flags: tuple[str, ...]
    options: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (100, 101, 102, 103, 104)
    dirty: dict[str, tuple[str, int]] = field(default_factory=dict)
    common: tuple[str, ...] = FLAGS

    @property
    def folder(self) -> str:
        return f"{self.regime}-{self.setting.model.split('-')[0]}-{self.setting.corpus}-{self.title}".replace(" ", "_")


# ---- The regimes ----

NO_SKIPPING = ("--skip_outliers", "none")

RULES = {
    "baseline": "baseline",
    "fixed 2": "fixed:2",
    "abr 1.0": "abr:1.0",
    "abr q0.8": "abr:q0.8",
    "abr q0.8 until 0.85": "abr:q0.8,repeat_until=0.85",
    "window": "window",
    "window, published": "window:published=true",
    "learnable": "learnable",
    "gain": "gain",
    "replay": "replay",
    "easy": "easy",
}


LARGER_MODEL_RULES = ("baseline", "fixed 2", "abr q0.8", "window", "gain", "easy")
"""Of the fresh regime with the larger model: a rule of each sort."""

SOME_RULES = ("baseline", "fixed 2", "abr 1.0", "abr q0.8", "window", "learnable", "gain", "replay")

MOMENTUM = {
    "baseline, beta1 0.7": "baseline:adam_beta1=0.7",
    "baseline, beta1 0.4": "baseline:adam_beta1=0.4",
    "fixed 2, beta1 0.7": "fixed:2,adam_beta1=0.7",
}


def studies() -> Iterator[Study]:
    """Yield every comparison, those of the smaller model first."""
    for setting in (STORIES, WIKI):
        tune = ("--tune", "learning_rate", *setting.rates, "--tune_seeds", "1")
        arms = RULES if setting is STORIES else {name: RULES[name] for name in LARGER_MODEL_RULES}
        yield Study("fresh", setting, "160 passes", arms, "fresh", (*NO_SKIPPING, "--max_passes", "160"), tune)
        arms = {name: RULES[name] for name in ("baseline", "abr 1.0", "fixed 2")}
        flags = (*NO_SKIPPING, "--max_steps", "50")
        yield Study("same batches", setting, "50 batches", arms, "fresh", flags, ("--match", "batches", *tune))
        yield dirty_study(setting, shares=SHARES if setting is STORIES else (10,))
    arms = {name: RULES[name] for name in ("baseline", "learnable", "gain")}
    flags = (*NO_SKIPPING, "--max_passes", "500", "--learning_rate", "2e-3")
    yield Study("fresh", STORIES, "500 passes", arms, "long", flags)
    arms = {name: RULES[name] for name in ("baseline", "abr 1.0", "abr q0.8", "window")}
    flags = (*NO_SKIPPING, "--max_passes", "160", "--learning_rate", "2e-3")
    yield Study("controls", STORIES, "160 passes", arms, "fresh", flags, ("--controls",))
    few = {name: RULES[name] for name in SOME_RULES} | {"fixed 3": "fixed:3"} | MOMENTUM
    yield scarce_study(STORIES, 20, few, ("60", "80", "120"))
    some = {name: few[name] for name in ("baseline", "fixed 2", "baseline, beta1 0.4", "fixed 2, beta1 0.7")}
    yield scarce_study(STORIES, 40, some, ("80", "120", "160"))
    some = {name: few[name] for name in ("baseline", "fixed 2", "fixed 3", *MOMENTUM)}
    yield scarce_study(TALK, 20, some, ("60", "80", "120"))
    some = {name: few[name] for name in ("baseline", "fixed 2", "baseline, beta1 0.4")}
    yield scarce_study(TALES, 20, some, ("60", "80", "120"), tune_seeds=1)


def scarce_study(
    setting: Setting, batches: int, arms: dict[str, str], stops: tuple[str, ...], tune_seeds: int = 2
) -> Study:
    """Return a comparison over few batches: each arm at its best rate, and at its best share of the budget."""
    tune = ("--tune", "learning_rate", *setting.rates_when_scarce, "--tune", "max_passes", *stops)
    tune += ("--tune_seeds", str(tune_seeds))
    flags = (*NO_SKIPPING, "--max_passes", stops[-1], "--lora_alpha", "16", "--lora_dropout", "0")
    title = f"{batches} batches, up to {stops[-1]} passes"
    return Study("scarce", setting, title, arms, f"scarce-{batches}", flags, tune)


def dirty_study(setting: Setting, kinds: tuple[str, ...] = KINDS, shares: tuple[int, ...] = SHARES) -> Study:
    """Return the comparison of what skips broken batches, with everything that is broken, against clean data."""
    rules = {
        "no skipping": "baseline:skip_outliers=none",
        "robust": "baseline:skip_outliers=robust",
        "classic": "baseline:skip_outliers=classic",
    }
    if setting is STORIES:
        rules["gradient norm"] = "baseline:skip_outliers=none,skip_grad_norm=6"
    arms = {f"{name}, clean": rule for name, rule in rules.items()}
    dirty = {}
    for kind, share in itertools.product(kinds, shares):
        oracle = f"benchmarks.oracle:Oracle:file={{data}}/dirty-{kind}-{share}-{{seed}}.json,skip_outliers=none"
        for name, rule in {**rules, "oracle": oracle}.items():
            if name not in ("robust", "oracle") and share != 10:
                continue
            arm = f"{name}, {share} % {kind}"
            arms[arm] = f"{rule},train_file={{data}}/dirty-{kind}-{share}-{{seed}}.jsonl"
            dirty[arm] = (kind, share)
    flags = ("--max_passes", "100", "--learning_rate", setting.rates[1], "--train_sampling_strategy", "sequential")
    reference = ("--reference", rules["no skipping"])
    return Study("dirty", setting, "100 passes", arms, "fresh", flags, reference, dirty=dirty)


def quick(study: Study) -> Study:
    """Return the same study, small enough to see that everything works."""
    small = dirty_study(study.setting, kinds=("random",), shares=(10,)) if study.regime == "dirty" else study
    arms = {name: arm for name, arm in small.arms.items() if name in FEW or study.regime == "dirty"}
    flags = list(study.flags)
    for name, value in (("--max_passes", "40"), ("--max_steps", "15")):
        if name in flags:
            flags[flags.index(name) + 1] = value
    if "--learning_rate" not in flags:
        flags += ["--learning_rate", study.setting.rates[1]]
    options = study.options[: study.options.index("--tune")] if "--tune" in study.options else study.options
    return replace(small, arms=arms, flags=tuple(flags), options=options, seeds=(0, 1))


FEW = ("baseline", "abr q0.8", "fixed 2")


# ---- Data ----


def texts_of(corpus: str, split: str, data: Path) -> list[str]:
    """Return the documents of a split: lines of WikiText, dialogues, or paragraphs of stories."""
    if corpus == "wikitext2":
        name = {"validation": "valid"}.get(split, split)
        return [line + "\n" for line in (data / corpus / f"wiki.{name}.tokens").read_text("utf-8").splitlines()]
    if corpus == "tinystories":  # its stories are not marked off: whole stretches of it, so that at most one is in two
        paragraphs = (data / corpus / "valid_sample.txt").read_text("utf-8").split("\n\n")
        start, end = {"train": (0, 80), "validation": (80, 90), "test": (90, 100)}[split]
        return [text + "\n\n" for text in paragraphs[len(paragraphs) * start // 100 : len(paragraphs) * end // 100]]
    rows = (data / corpus / f"{split}.jsonl").read_text("utf-8").splitlines()
    texts = [as_text(json.loads(row)["dialog"]) + "\n\n" for row in rows]
    held_out = {text for other in HELD_OUT for text in texts_of(corpus, other, data)} if split == "train" else set()
    return [text for text in texts if text not in held_out]  # one in fourteen stands in the training split too


def blocks_of(texts: list[str], tokenizer: Any, length: int = BLOCK) -> list[list[int]]:
    """Return all whole blocks of these texts."""
    ids = [token for row in tokenizer(texts, add_special_tokens=False)["input_ids"] for token in row]
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]


def spoil(kind: str, blocks: list[list[int]], tokenizer: Any, draw: random.Random) -> list[list[int]]:
    """Return broken rows in the place of good ones, as long as these."""
    if kind == "random":
        return [[draw.randrange(3, len(tokenizer)) for _ in block] for block in blocks]
    if kind == "shuffled":
        return [draw.sample(block, len(block)) for block in blocks]
    if kind == "cipher":  # stands for another language: the words and their spaces, in other letters
        return [encoded(_rotated(tokenizer.decode(block)), tokenizer, len(block)) for block in blocks]
    if kind == "bytes":
        noise = ["".join(chr(draw.randrange(33, 0x17F)) for _ in range(2 * len(block))) for block in blocks]
        return [encoded(text, tokenizer, len(block)) for text, block in zip(noise, blocks, strict=True)]
    junk = "".join(chr(each) for each in random.Random(7).choices(range(33, 127), k=40))  # the same in all batches
    return [encoded(junk * len(block), tokenizer, len(block)) for block in blocks]


def _rotated(text: str) -> str:
    return "".join(
        chr((ord(letter) - start + 13) % 26 + start)
        if letter.isascii() and letter.isalpha() and (start := ord("A" if letter.isupper() else "a"))
        else letter
        for letter in text
    )


def encoded(text: str, tokenizer: Any, length: int) -> list[int]:
    """Return so many tokens of a text, which starts again where it ends."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return (ids * (1 + length // len(ids)))[:length]


def write_data(study: Study, args: argparse.Namespace) -> Path:
    """Write the blocks that a study trains on and is judged by, a file a seed, and return where."""
    folder: Path = args.out / "data" / f"{study.setting.model}-{study.setting.corpus}"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.models / study.setting.model)
    corpus = functools.partial(texts_of, study.setting.corpus, data=args.data)
    for split, count in HELD_OUT.items():
        _write(folder / f"{split}.jsonl", random.Random(0).sample(blocks_of(corpus(split), tokenizer), count))
    train = blocks_of(corpus("train"), tokenizer)
    for seed in study.seeds:
        counts = {name: min(len(train), batches * ROWS) for name, batches in MOST_BATCHES.items()}
        samples = {name: random.Random(seed).sample(train, count) for name, count in counts.items()}
        for name, blocks in samples.items():
            _write(folder / f"{name}-{seed}.jsonl", blocks)
        drawn = samples["fresh"]
        for batches in (20, 40):
            _write(folder / f"scarce-{batches}-{seed}.jsonl", drawn[: batches * ROWS])
        for kind, share in sorted(set(study.dirty.values())):
            _write_dirty(folder, kind, share, seed, drawn, tokenizer)
    return folder


def _write_dirty(folder: Path, kind: str, share: int, seed: int, drawn: list[list[int]], tokenizer: Any) -> None:
    draw = random.Random(f"{kind}-{share}-{seed}")
    batches = [drawn[start : start + ROWS] for start in range(0, len(drawn), ROWS)]
    broken = sorted(draw.sample(range(len(batches)), round(len(batches) * share / 100)))
    for index in broken:
        batches[index] = spoil(kind, batches[index], tokenizer, draw)
    _write(folder / f"dirty-{kind}-{share}-{seed}.jsonl", [block for batch in batches for block in batch])
    write_whole(folder / f"dirty-{kind}-{share}-{seed}.json", json.dumps(broken))


def write_runs(results: dict[str, Any], path: Path) -> None:
    """Write results, a line for each run."""
    others = {name: value for name, value in results.items() if name != "runs"}
    head = json.dumps(others, indent=1)[:-2]
    runs = ",\n".join(json.dumps(entry) for entry in results["runs"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, f'{head},\n "runs": [\n{runs}\n]}}\n')


def _write(path: Path, blocks: list[list[int]]) -> None:
    write_whole(path, "".join(json.dumps({"input_ids": block}) + "\n" for block in blocks))


# ---- Running, and reading what has come of it ----


def run(study: Study, data: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run a study, or go on with it, and return what it has shown: a row an arm, and how it was made."""
    out = args.out / study.folder
    files = {"train": f"{study.data}-{{seed}}.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"}
    flags = [part for split, name in files.items() for part in (f"--{split}_file", str(data / name))]
    arms = {name: arm.replace("{data}", str(data)) for name, arm in study.arms.items()}
    count = len(study.seeds)
    seeds = [str(count)] if study.seeds == tuple(range(count)) else map(str, study.seeds)
    command = [
        *(sys.executable, "-m", "abr_trainer", "compare", "--schedulers", *arms.values()),
        *("--seeds", *seeds, "--jobs", str(args.jobs), "--out", str(out), "--evaluations", "1"),
        *(*study.options, "--", "--model_name_or_path", str(args.models / study.setting.model)),
        *(*study.common, *flags, *study.flags),
    ]
    print(f"\n{study.folder}\n{shlex.join(command)}", flush=True)
    subprocess.run(command, check=True, cwd=ROOT)
    found = read_comparison(out)
    names = {arm: name for name, arm in arms.items()}
    pairs = [(entry["name"], entry["control"]) for entry in found["against_controls"]]
    return {
        "name": study.folder,
        "regime": study.regime,
        "setting": study.setting.name,
        "title": study.title,
        "schedulers": study.arms,
        "options": list(study.options),
        "flags": [*study.common, *study.flags],
        "git": found["runs"][0]["git"],
        "versions": found["runs"][0]["versions"],
        "machine": found["runs"][0]["machine"],
        "warnings": found["warnings"],
        "against_controls": [[names.get(arm, arm) for arm in pair] for pair in pairs],
        "rows": list(rows_of(study, names, found, out)),
    }


def rows_of(study: Study, names: dict[str, str], data: dict[str, Any], out: Path) -> Iterator[dict[str, Any]]:
    """Yield a row an arm: the nll that it has reached for each seed, what it spent, and what it skipped.

    Args:
        names: By what `abr compare` calls an arm; a control goes by that.
    """
    for entry in data["arms"]:
        arm = entry["name"]
        name = names.get(arm, arm)
        tuning = entry["tuning"] or {"chosen": {}, "at_edge": []}
        row = {
            "arm": name,
            "nll": in_nats(entry["test_perplexity"]["values"]),
            "validation": in_nats(entry["eval_perplexity"]["values"]),
            "cost": entry["cost"],
            "chosen": tuning["chosen"],
            "at_edge": tuning["at_edge"],
        }
        if name in study.dirty:
            row |= skipped(arm, study.dirty[name], data["runs"], out)
        yield row


def in_nats(perplexities: dict[str, float | None]) -> dict[str, float | None]:
    return {seed: None if value is None else math.log(value) for seed, value in perplexities.items()}


def skipped(arm: str, dirt: tuple[str, int], runs: list[dict[str, Any]], out: Path) -> dict[str, Any]:
    """Return how many broken and good batches an arm saw, and how many of each it skipped."""
    counts = {"broken": 0, "broken_skipped": 0, "good": 0, "good_skipped": 0}
    for each in (each for each in runs if each["arm"] == arm):
        train_file = Path(given_flags(each["argv"])["--train_file"][-1])
        broken = set(json.loads((ROOT / train_file).with_suffix(".json").read_text(encoding="utf-8")))
        for batch in read_lines(out / each["directory"] / TRACE_NAME):
            kind = "broken" if batch["step"] - 1 in broken else "good"
            counts[kind] += 1
            counts[f"{kind}_skipped"] += batch["repeats"] == 0
    return {"kind": dirt[0], "share": dirt[1], **counts}


# ---- Tables ----


def compared(row: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Return what the paired differences in nll between two rows show, and the verdict."""
    pairs = [(value, reference["nll"].get(seed)) for seed, value in row["nll"].items()]
    found = paired([value - other for value, other in pairs if value is not None and other is not None])
    return found | {"verdict": verdict(found, len(pairs))}


def difference(found: dict[str, Any]) -> str:
    """Return a paired difference in nats with its interval, and in percent of the perplexity.

    >>> difference(paired([-0.02, -0.03]))
    '-0.0250 (-0.0885 to +0.0385), -2.5 %'
    """
    if "t_low" not in found:
        return "n/a"
    percent = 100 * math.expm1(found["mean"])
    return f"{found['mean']:+.4f} ({found['t_low']:+.4f} to {found['t_high']:+.4f}), {percent:+.1f} %"


def mean(values: dict[str, float | None]) -> float:
    """Return the mean over seeds: infinite if one has diverged."""
    return statistics.fmean(math.inf if value is None else value for value in values.values())


def tables(studies: list[dict[str, Any]]) -> list[str]:
    """Return the tables of all studies as lines of Markdown."""
    lines = []
    for study in studies:
        lines += ["", f"## {study['regime'].capitalize()}: {study['setting']}, {study['title']}", ""]
        lines += dirty_table(study["rows"]) if study["regime"] == "dirty" else table(study["rows"])
        by_arm = {row["arm"]: row for row in study["rows"]}
        for rule, control in study["against_controls"]:
            found = compared(by_arm[rule], by_arm[control])
            lines += ["", f"{rule} beside {control}: {difference(found)}, {found['verdict']}."]
        edges = (
            " \\* the best of the values tried lies at their end."
            if any(row["at_edge"] for row in study["rows"])
            else ""
        )
        commit, _, dirty = study["git"].partition("-")
        lines += ["", f"{len(study['rows'][0]['nll'])} seeds, commit {commit[:7]}{dirty and '-' + dirty}.{edges}"]
    return lines


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return a line an arm: beside the first, and beside the best of the baselines on the validation split."""
    best = min((row for row in rows if row["arm"].startswith("baseline")), key=lambda row: mean(row["validation"]))
    heads = [
        "arm",
        "chosen",
        "repeats",
        "skips",
        "nll",
        f"beside {rows[0]['arm']} (95 %), perplexity",
        "lower in",
        "verdict",
    ]
    heads += [] if best is rows[0] else [f"beside {best['arm']} (95 %), perplexity", "verdict"]
    lines = _header([*heads, "passes", "FLOPs", "seconds"])
    for row in rows:
        cost = row["cost"]
        beside = []
        for other in [rows[0]] if best is rows[0] else [rows[0], best]:
            found = compared(row, other)
            wins = [str(found["wins"])] if other is rows[0] else []
            beside += ["", *[""] * len(wins), ""] if row is other else [difference(found), *wins, found["verdict"]]
        lines.append(
            _line(
                [
                    row["arm"],
                    ", ".join(value + r"\*" * (name in row["at_edge"]) for name, value in row["chosen"].items()),
                    f"{cost['repeats']:.2f}",
                    f"{cost['skips']:.1f}",
                    f"{mean(row['nll']):.4f}",
                    *beside,
                    f"{cost['passes']:g}",
                    f"{cost['flops']:.3g}",
                    f"{cost['seconds']:.1f}",
                ]
            )
        )
    return lines


def dirty_table(rows: list[dict[str, Any]]) -> list[str]:
    by_arm = {row["arm"]: row for row in rows}
    clean = by_arm["no skipping, clean"]
    heads = ["broken", "rule", "recall", "false skips", "to clean data without skipping", "to the oracle"]
    lines = _header([*heads, "verdict beside the oracle"])
    for row in rows:
        rule, data = row["arm"].split(", ", 1)
        oracle = by_arm.get(f"oracle, {data}")
        beside = compared(row, oracle) if oracle and oracle is not row else None
        lines.append(
            _line(
                [
                    data,
                    rule,
                    *counted(row),
                    "" if row is clean else difference(compared(row, clean)),
                    difference(beside) if beside else "",
                    beside["verdict"] if beside else "",
                ]
            )
        )
    for rule in ("robust", "classic", "gradient norm"):
        some = [row for row in rows if row["arm"].startswith(f"{rule}, ") and "kind" in row]
        if some:
            lines.append(_line(["all of these", rule, *counted(*some), "", "", ""]))
    return lines


def counted(*rows: dict[str, Any]) -> tuple[str, str]:
    """Return recall and false skips over these rows, each with the numbers of batches."""
    seeds = len(rows[0]["nll"])
    whole = [{**{name: round(seeds * row["cost"][name]) for name in ("skips", "batches")}, **row} for row in rows]
    broken, caught = (sum(row.get(name, 0) for row in whole) for name in ("broken", "broken_skipped"))
    good = sum(row.get("good", row["batches"]) for row in whole)
    wrong = sum(row.get("good_skipped", row["skips"]) for row in whole)
    return f"{caught / broken:.3f} ({caught}/{broken})" if broken else "", f"{wrong / good:.2%} ({wrong}/{good})"


def _header(heads: list[str]) -> list[str]:
    return [_line(heads), _line(["---"] * len(heads))]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write_tables(studies: list[dict[str, Any]]) -> None:
    """Write all tables, made of the results alone."""
    command = "python benchmarks/effectiveness.py --data DIR --models DIR --out runs/effectiveness"
    lines = ["# Which rule pays where", "", INTRODUCTION, "", f"    {command}", EXPENSIVE, *tables(studies), ""]
    write_whole(TABLES, "\n".join(lines))


INTRODUCTION = """Test nll in nats per token, paired by seed with the first line of each table; a 95 % t interval over
seeds; the perplexity in percent. Made by the command below, of `benchmarks/results/effectiveness.json`."""


EXPENSIVE = """
## When fresh batches are expensive

The studies below count passes, so a fresh batch costs as much as a repeat. Where it costs more, runs have to be
compared at equal seconds. Two other pages do that:

- [Slow input](waiting.md): training waits for its data. `wait` makes as many passes as fit into the wait. That lowers
  the perplexity by 16 to 19 % where a batch is waited for as long as one to four passes take.
- [Generated batches](rollouts.md): GRPO generates its batches. At tuned learning rates, more updates on each did not
  pay, although generating took four fifths of the time."""


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory of the corpora")
    parser.add_argument("--models", type=Path, help="directory of the models")
    parser.add_argument("--out", type=Path, default=Path("runs/effectiveness"))
    parser.add_argument("--only", nargs="+", default=[], help="parts of the names of studies, e.g. scarce-stories260k")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--quick", action="store_true", help="small studies, into --out instead of the results")
    parser.add_argument("--table", action="store_true", help="write the tables of the results anew, and run nothing")
    args = parser.parse_args(argv)
    if args.table:
        done: list[dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8"))
        write_tables(done)
        return done
    if args.data is None or args.models is None:
        parser.error("--data and --models say where corpora and models are")
    args.out, args.data, args.models = args.out.resolve(), args.data.resolve(), args.models.resolve()
    chosen = [quick(study) for study in studies() if study.setting == STORIES] if args.quick else list(studies())
    chosen = [study for study in chosen if not args.only or any(part in study.folder for part in args.only)]
    results = args.out / "effectiveness.json" if args.quick else RESULTS
    order = [each.folder for each in studies()]
    for study in chosen:
        done = json.loads(results.read_text(encoding="utf-8")) if results.exists() else []
        found = run(study, write_data(study, args), args)
        done = [other for other in done if other["name"] != study.folder]
        done = sorted([*done, found], key=lambda each: order.index(each["name"]) if each["name"] in order else 99)
        write_whole(results, json.dumps(done, indent=1) + "\n")
        print(*tables([found]), sep="\n", flush=True)
    if not args.quick:
        write_tables(json.loads(results.read_text(encoding="utf-8")))
    return done


if __name__ == "__main__":
    main()
