"""Mutate good files and flags at random: each run of `abr` ends well, or in one line with status 2.

    python benchmarks/fuzz.py --out runs/fuzz --cases 5000       # goes on where it was stopped
    python benchmarks/fuzz.py --out runs/fuzz --only 1234        # one case again, and all that it prints

A case follows from its seed and its number alone. It runs in a fork of this process, which has imported everything, in
a directory of its own. It is a fault if it

- ends with a traceback, a signal, another status, or an error that is not one clear line (`crash`, `unclear`);
- is refused, and has left or changed a file (`half-written`);
- ends well, and has read other rows than a plain reader finds, recorded another value than was given, or trained
  weights that are not finite (`silent`).

What ends neither way within its time is killed; it is no fault if it was training by then.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1", "COLUMNS": "100"}

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from effectiveness import write_runs

from abr_trainer.cli.main import main as abr
from abr_trainer.cli.quick import FLAGS_FILE
from abr_trainer.records.provenance import versions_and_machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "fuzz.json"

SECONDS = 45
"""After which a case is killed."""

MEMORY = 12 * 2**30
"""Bytes of address space that a case may have."""

CRASHED, SILENT = 99, 98
"""Exit statuses of a case: an exception that nobody caught, and a result that is not what was asked for."""

IN_A_LINE = 250
"""Cases in a line of the results."""

# ---- Good inputs ----

TEXTS = [
    f"The {noun} of line {number} {verb} over the {place}, and nobody in the town knew why it did so."
    for number, (noun, verb, place) in enumerate(
        (noun, verb, place)
        for noun in ("river", "fox", "train", "letter")
        for verb in ("jumped", "went", "came")
        for place in ("hill", "bridge", "old house")
    )
]


def make_inputs(good: Path, runs: Sequence[str]) -> None:
    """Write the good files, and train the runs whose directories are mutated."""
    good.mkdir(parents=True)
    (good / "notes.txt").write_text("\n".join(TEXTS) + "\n")
    (good / "notes.jsonl").write_text(
        "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS))
    )
    (good / "notes.json").write_text(json.dumps([{"text": text} for text in TEXTS[:12]], indent=1))
    for name, separator in (("notes.csv", ","), ("notes.tsv", "\t")):
        rows = [["id", "text"], *([str(i), text] for i, text in enumerate(TEXTS))]
        (good / name).write_text(table_text(rows, separator))
    pq.write_table(pa.table({"id": list(range(len(TEXTS))), "text": TEXTS}), good / "notes.parquet")
    chats = [
        {"messages": [{"role": "user", "content": text[:20]}, {"role": "assistant", "content": text[20:]}]}
        for text in TEXTS
    ]
    (good / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (good / "asked.jsonl").write_text(
        "".join(json.dumps({"prompt": t[:20], "completion": t[20:]}) + "\n" for t in TEXTS)
    )
    labelled = [["sentence", "label"], *([text, "yes" if i % 3 else "no"] for i, text in enumerate(TEXTS[:24]))]
    (good / "labelled.csv").write_text(table_text(labelled, ","))
    (good / "labelled.jsonl").write_text(
        "".join(json.dumps({"sentence": text, "label": label}) + "\n" for text, label in labelled[1:])
    )
    for verb in ("train", "sft", "classify"):
        (good / f"{verb}.yaml").write_text(yaml.safe_dump(as_flags(BASES[verb][1:])))
    for name in runs:
        ended = in_fork(lambda argv=RUNS[name]: call(argv), good, 300)  # type: ignore[misc]
        if ended.status:
            raise SystemExit(f"error: {name} cannot be made: {ended.stderr[-2000:]}")
    for found in sorted((ROOT / "docs" / "compare").glob("*/comparison.json")):
        (good / "compared" / found.parent.name).mkdir(parents=True)
        shutil.copy(found, good / "compared" / found.parent.name / found.name)


def table_text(rows: Sequence[Sequence[str]], separator: str) -> str:
    written = io.StringIO()
    csv.writer(written, delimiter=separator, lineterminator="\n").writerows(rows)
    return written.getvalue()


def as_flags(argv: Sequence[str]) -> dict[str, Any]:
    """Return a command line as the mapping of a file of flags."""
    flags: dict[str, Any] = {}
    for word in argv:
        if word.startswith("--"):
            flags[word[2:]] = True
            name = word[2:]
        else:
            flags[name] = int(word) if word.isdigit() else word
    return flags


QUIET = "--use_cpu --disable_tqdm true --report_to none --max_steps 2 --save_strategy no"
FAST = f"--do_train {QUIET} --per_device_train_batch_size 2 --eval_strategy no --max_train_samples 6 --output_dir out"
LINES: dict[str, str] = {
    "train": f"train --train_file notes.jsonl --block_size 16 --sample_prompts 0 {FAST}",
    "sft": f"sft --train_file chats.jsonl --chat_template alpaca --max_length 64 --sample_prompts 0 {FAST}",
    "classify": f"classify --train_file labelled.csv --model_name_or_path demo --max_seq_length 32 {FAST}",
    "perplexity": "perplexity --text_file notes.txt --token_length 32 --max_windows 2 --use_cpu --output_file f.json",
    "prune": "prune --output_dir pruned",
    "export": "export --adapter_name_or_path trained --output_dir whole --use_cpu",
    "evaluate": "evaluate --adapter_name_or_path classified --test_file labelled.csv --use_cpu --output_file f.jsonl",
    "compare": "compare --schedulers baseline abr --seeds 2 --out cmp -- --dataset_name demo --block_size 32 "
    "--max_passes 20 --use_cpu",
    "compare-prompts": "compare-prompts --prompts none perfect --seeds 2 --out cmp -- --task_name demo "
    "--model_name_or_path demo --use_cpu",
    "report": "report trained",
    "why": "why trained 3",
    "rows": "rows trained",
    "push": "push trained --hub_model_id me/mine",
}
BASES = {verb: line.split() for verb, line in LINES.items()}
"""A command line of each verb that works in the directory of good inputs."""

OF_RUNS = {
    "trained": "train --train_file notes.jsonl --block_size 16 --do_train --do_eval --sample_prompts 1 --use_cpu "
    "--disable_tqdm true --report_to none --max_steps 24 --save_steps 12 --skip_rows robust --rank_rows "
    "--repeat_scheduler window --max_eval_samples 2 --output_dir trained",
    "chatted": "sft --train_file chats.jsonl --chat_template alpaca --max_length 64 --do_train --do_eval "
    f"--sample_prompts 1 {QUIET} --skip_rows robust --output_dir chatted",
    "classified": "classify --train_file labelled.csv --validation_file labelled.csv --model_name_or_path demo "
    f"--do_train --do_eval --max_seq_length 32 {QUIET} --output_dir classified",
}
RUNS = {name: line.split() for name, line in OF_RUNS.items()}
"""How the runs are trained whose directories are mutated."""

# ---- Mutations ----

Draw = random.Random

NUMBERS = [
    "0",
    "1",
    "-1",
    "2",
    "-0.5",
    "0.5",
    "1.5",
    "1e-3",
    "1e400",
    "nan",
    "inf",
    "-inf",
    "1e18",
    "99999999999999999999",
]
NUMBERS += ["1_0", "0x10", "010", "\u0661", " 3 ", "1,5", "1e3", "100%", "2**3"]
WORDS = [
    "",
    " ",
    "none",
    "null",
    "true",
    "false",
    "yes",
    "no",
    "on",
    "maybe",
    "abc",
    "ünï-🦙",
    "-",
    "--",
    "...",
    "/",
    "a" * 3000,
]
WORDS += [
    "../x",
    "/nonexistent/x",
    "notes.txt",
    "trained",
    "out",
    "\n",
    "a\nb",
    "{}",
    "[]",
    '{"a": 1}',
    "a:b",
    "a=b",
    "\x1b[31m",
]
WORDS += ["module:Class", "os:path", "baseline", "robust", "demo", "{seed}", "%s", "*", "~", "$HOME"]
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1.5,
    10**30,
    math.nan,
    math.inf,
    "",
    "x",
    "3",
    [],
    {},
    [1],
    {"a": 1},
    "ü🦙\u2028",
    [None],
]

SLOW_OR_FAR = {"torch_compile", "torch_compile_backend", "torch_compile_mode", "push_to_hub", "hub_token", "deepspeed"}
SLOW_OR_FAR |= {"fsdp", "fsdp_config", "parallelism_config", "ddp_backend", "local_rank", "use_liger_kernel"}
"""Flags that load much, or leave the machine."""


def damaged(data: bytes, draw: Draw) -> tuple[bytes, str]:
    """Return bytes with one thing changed, and what."""
    kind = draw.choice(["cut", "cut", "flip", "zero", "drop", "insert", "double", "empty", "swap", "tail"])
    size = len(data)
    at, length = draw.randrange(size + 1), draw.choice([1, 1, 4, 64, 512])
    if kind == "cut":
        return data[:at], f"cut at byte {at} of {size}"
    if kind == "empty":
        return b"", "emptied"
    if kind == "flip":
        flipped = bytearray(data)
        for _ in range(draw.choice([1, 1, 3, 20])):
            if size:
                flipped[draw.randrange(size)] ^= 1 << draw.randrange(8)
        return bytes(flipped), "bits flipped"
    if kind == "zero":
        return data[:at] + bytes(min(length, size - at)) + data[at + length :], f"{length} bytes zeroed at {at}"
    if kind == "drop":
        return data[:at] + data[at + length :], f"{length} bytes dropped at {at}"
    if kind == "insert":
        new = draw.choice(
            [b"\xff\xfe", b"\0", b"\xef\xbb\xbf", b"\r", b'"', b",", b"\n", b"{", "\u2028".encode(), b"\xc3"]
        )
        return data[:at] + new + data[at:], f"{new!r} inserted at {at}"
    if kind == "double":
        return data[:at] + data[max(0, at - length) :], f"{length} bytes doubled at {at}"
    if kind == "tail":
        return data + draw.choice(
            [b"\n", b"\n\n\n", b"\0" * 9, b"xyz", b"}", data[: size // 2]]
        ), "something at the end"
    other = draw.randrange(size + 1)
    low, high = sorted((at, other))
    return data[high:] + data[low:high] + data[:low], "parts swapped"


def twisted(value: Any, draw: Draw) -> tuple[Any, str]:
    """Return a JSON value with one thing changed somewhere in it, and what."""
    path, node = [], value
    while isinstance(node, dict | list) and node and (not path or draw.random() < 0.75):
        key = draw.choice(list(node)) if isinstance(node, dict) else draw.randrange(len(node))
        path.append(key)
        node = node[key]
    if not path:
        new = draw.choice(VALUES)
        return new, f"{shortly(new)} instead of all"
    value = json.loads(json.dumps(value))
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    where = ".".join(map(str, path))
    kind = draw.choice(["remove", "replace", "replace", "replace", "scale", "rename", "wrap"])
    if kind == "remove":
        del parent[path[-1]]
        return value, f"{where} removed"
    if kind == "rename" and isinstance(parent, dict):
        parent[f"{path[-1]}_"] = parent.pop(path[-1])
        return value, f"{where} renamed"
    if kind == "wrap":
        parent[path[-1]] = [node]
        return value, f"{where} in a list"
    if kind == "scale" and isinstance(node, int | float):
        parent[path[-1]] = -node * draw.choice([1, 10**6, 0.5])
        return value, f"{where} is {shortly(parent[path[-1]])}"
    parent[path[-1]] = draw.choice(VALUES)
    return value, f"{where} is {shortly(parent[path[-1]])}"


def shortly(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:60]}..."


def mutate_lines(text: str, draw: Draw) -> tuple[str, str]:
    """Return JSON lines of which one is another, and what was changed."""
    lines = text.splitlines(keepends=True)
    at = draw.randrange(len(lines))
    kind = draw.choice(["twist"] * 6 + ["blank", "double", "drop", "shuffle", "text", "crlf", "not an object"])
    if kind == "twist":
        with contextlib.suppress(ValueError):
            row, what = twisted(json.loads(lines[at]), draw)
            lines[at] = json.dumps(row, ensure_ascii=draw.random() < 0.5) + "\n"
            return "".join(lines), f"line {at + 1}: {what}"
    if kind == "blank":
        lines.insert(at, draw.choice(["\n", "  \n", "\t\n", "\x0c\n"]))
    elif kind == "double":
        lines.insert(at, lines[at])
    elif kind == "drop":
        del lines[at]
    elif kind == "shuffle":
        draw.shuffle(lines)
    elif kind == "crlf":
        lines = [line.replace("\n", "\r\n") for line in lines]
    else:
        lines[at] = draw.choice(
            ["hello\n", "[1, 2]\n", "null\n", '"text"\n', "42\n", "{}\n", "{'text': 'a'}\n", "NaN\n", "# no\n"]
        )
    return "".join(lines), f"line {at + 1}: {kind}"


def mutate_cells(text: str, separator: str, draw: Draw) -> tuple[str, str]:
    """Return a table of which one cell or row is another, and what was changed."""
    rows = list(csv.reader(io.StringIO(text), delimiter=separator))
    at, column = draw.randrange(len(rows)), draw.randrange(len(rows[0]))
    kind = draw.choice(
        ["cell", "cell", "extra", "missing", "header", "twice", "blank", "separator", "quote", "drop", "raw"]
    )
    if kind == "cell":
        rows[at][column] = draw.choice(
            ["", " ", "nan", "NA", "null", "1", "1e5", 'a "b" c', "a\nb", "a,b", "\x00", "ü🦙", "=1+1", "x" * 200_000]
        )
    elif kind == "extra":
        rows[at].append("more")
    elif kind == "missing":
        del rows[at][column]
    elif kind == "header":
        rows[0][column] = draw.choice(["", " text", "Text", rows[0][column - 1], "1", "text\n"])
    elif kind == "twice":
        rows = [[*row, row[column]] for row in rows]
    elif kind == "blank":
        rows.insert(at, [])
    elif kind == "drop":
        del rows[at]
    elif kind == "separator":
        return table_text(rows, draw.choice([";", "|", "\t", ","])), "another separator"
    elif kind in ("quote", "raw"):
        lines = table_text(rows, separator).splitlines()
        lines[at % len(lines)] += '"' if kind == "quote" else separator * 3
        return "\n".join(lines) + "\n", f"line {at + 1}: {kind}"
    return table_text(rows, separator), f"row {at}, column {column}: {kind}"


def mutate_table(draw: Draw) -> tuple[pa.Table, str]:
    """Return a table for Parquet with odd columns, and what is odd."""
    n = len(TEXTS)
    odd: dict[str, pa.Array] = {
        "nulls": pa.array([text if i % 5 else None for i, text in enumerate(TEXTS)]),
        "all null": pa.array([None] * n),
        "typed null": pa.array([None] * n, pa.string()),
        "integers": pa.array(list(range(n))),
        "floats": pa.array([math.nan] * n),
        "dictionary": pa.array([text[:5] for text in TEXTS]).dictionary_encode(),
        "large": pa.array(TEXTS, pa.large_string()),
        "view": pa.array(TEXTS, pa.string_view()),
        "binary": pa.array([text.encode() for text in TEXTS]),
        "bad utf-8": pa.Array.from_buffers(
            pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
        ),
        "lists": pa.array([text.split() for text in TEXTS]),
        "empty lists": pa.array([[] for _ in TEXTS], pa.list_(pa.string())),
        "structs": pa.array([{"a": text} for text in TEXTS]),
        "booleans": pa.array([True] * n),
        "dates": pa.array([0] * n, pa.timestamp("s")),
        "empty texts": pa.array([""] * n),
        "spaces": pa.array([" "] * n),
        "no rows": pa.array([], pa.string()),
        "token ids": pa.array([[1, 2, 3]] * n),
        "huge ids": pa.array([[1, 2, 10**9]] * n),
        "negative ids": pa.array([[1, -2, 3]] * n),
    }
    what = draw.choice(sorted(odd))
    name = draw.choice(["text", "text", "text", "input_ids", "label", "", "ü"])
    columns = {name: odd[what]}
    if draw.random() < 0.3:
        columns["other"] = pa.array(["more words here"] * len(odd[what]))
    return pa.table(columns), f"{name!r} holds {what}"


def mutate_yaml(text: str, draw: Draw) -> tuple[str, str]:
    """Return a file of flags with one thing changed, and what."""
    lines = text.splitlines()
    at = draw.randrange(len(lines))
    name = lines[at].partition(":")[0]
    kind = draw.choice(
        [
            "value",
            "value",
            "value",
            "twice",
            "tab",
            "indent",
            "list",
            "mapping",
            "name",
            "drop",
            "anchor",
            "document",
            "damage",
        ]
    )
    if kind == "value":
        value = draw.choice(
            [
                *NUMBERS,
                *WORDS,
                "1.10",
                "12:30:00",
                "2024-01-01",
                ".nan",
                "yes",
                "off",
                "~",
                "'x'",
                "|",
                "!!python/object:os.system x",
            ]
        )
        lines[at] = f"{name}: {value}"
    elif kind == "twice":
        lines.append(f"{name}: {draw.choice(NUMBERS)}")
    elif kind == "tab":
        lines[at] = f"\t{lines[at]}"
    elif kind == "indent":
        lines[at] = f"  {lines[at]}"
    elif kind == "list":
        lines[at] = f"{name}: [{draw.choice(NUMBERS)}, {draw.choice(['a', '1', 'null', '[1]'])}]"
    elif kind == "mapping":
        lines[at] = f"{name}: {{a: 1, b: [2]}}"
    elif kind == "name":
        lines[at] = draw.choice(
            [
                f"{name}x: 1",
                "1: 2",
                "null: 3",
                "--seed: 1",
                "'': 1",
                "? [a]\n: 1",
                "env: 3",
                "env: {A: null, B: [1]}",
                "seed : 1",
                f"{name.upper()}: 1",
            ]
        )
    elif kind == "drop":
        del lines[at]
    elif kind == "anchor":
        lines[at] = f"{name}: *missing"
    elif kind == "document":
        lines.insert(at, "---")
    else:
        data, what = damaged(text.encode(), draw)
        return data.decode("utf-8", "surrogateescape"), what
    return "\n".join(lines) + "\n", f"{name}: {kind} {lines[at % len(lines)] if lines else ''}"


def mutate_file(path: Path, draw: Draw) -> str:
    """Change one thing in a file, by its format, and return what."""
    data = path.read_bytes()
    format_known = path.suffix in (".json", ".jsonl", ".csv", ".tsv", ".yaml", ".parquet")
    if not format_known or draw.random() < 0.25:
        new, what = damaged(data, draw)
        path.write_bytes(new)
    elif path.suffix == ".parquet":
        table, what = mutate_table(draw)
        pq.write_table(table, path)
    elif path.suffix == ".json":
        value, what = twisted(json.loads(data), draw)
        path.write_text(json.dumps(value))
    else:
        text = data.decode()
        if path.suffix == ".jsonl":
            new_text, what = mutate_lines(text, draw) if text else ("{}\n", "a line")
        elif path.suffix == ".yaml":
            new_text, what = mutate_yaml(text, draw)
        else:
            new_text, what = mutate_cells(text, "\t" if path.suffix == ".tsv" else ",", draw)
        path.write_bytes(new_text.encode("utf-8", "surrogateescape"))
    return f"{path.name}: {what}"


def mutate_flags(argv: list[str], known: Sequence[dict[str, Any]], draw: Draw) -> tuple[list[str], str]:
    """Return a command line with one flag changed, and what."""
    verb, *words = argv
    flags = [word for word in words if word.startswith("--") and word != "--"]
    kind = draw.choice(["value"] * 9 + ["missing", "drop", "twice", "typo", "junk", "equals", "dashes", "two", "no"])
    if kind == "value":
        flag = draw.choice(
            [flag for flag in known if flag["dest"] not in SLOW_OR_FAR and flag["names"]]
            or [{"names": [""], "dest": ""}]
        )
        value = draw.choice(
            NUMBERS if flag.get("type") in ("int", "float") and draw.random() < 0.8 else [*NUMBERS, *WORDS]
        )
        if flag.get("choices") and draw.random() < 0.6:
            value = str(draw.choice(flag["choices"]))
        at = len(words) if "--" not in words or draw.random() < 0.5 else words.index("--")
        added = [flag["names"][0], value] if flag["names"][0] else [value]
        return [verb, *words[:at], *added, *words[at:]], f"{shortly(' '.join(added))}"
    if kind == "junk":
        at, word = (
            draw.randrange(len(words) + 1),
            draw.choice([*WORDS, *NUMBERS, "-x", "--", "--=", "--=3", "---seed", "-h1", "@file", "run.yaml"]),
        )
        return [verb, *words[:at], word, *words[at:]], f"{shortly(word)} at word {at}"
    if not flags:
        return [verb, *words[:-1]], "the last word dropped"
    flag = draw.choice(flags)
    at = words.index(flag)
    end = next((i for i in range(at + 1, len(words)) if words[i].startswith("--")), len(words))
    if kind == "missing":
        return [verb, *words[: at + 1], *words[end:]], f"{flag} without its value"
    if kind == "drop":
        return [verb, *words[:at], *words[end:]], f"{flag} dropped"
    if kind == "twice":
        value = draw.choice([*NUMBERS, *WORDS])
        return [verb, *words[:end], flag, value, *words[end:]], f"{flag} again, {shortly(value)}"
    if kind == "typo":
        letter = draw.randrange(2, len(flag))
        typed = flag[:letter] + draw.choice(["", "x", flag[letter] * 2]) + flag[letter + 1 :]
        return [verb, *words[:at], typed, *words[at + 1 :]], f"{typed} for {flag}"
    if kind == "equals":
        value = draw.choice([*NUMBERS, *WORDS])
        return [verb, *words[:at], f"{flag}={value}", *words[end:]], f"{flag}={shortly(value)}"
    if kind == "dashes":
        return [verb, *words[:at], flag.replace("_", "-"), *words[at + 1 :]], f"{flag} with dashes"
    if kind == "no":
        return [verb, *words, f"--no_{flag[2:]}"], f"--no_{flag[2:]}"
    return [verb, *words[:end], draw.choice(WORDS), *words[end:]], f"{flag} with one value more"


# ---- Cases ----


@dataclass
class Case:
    """One run of `abr`, or of a loader, in a directory of its own.

    Attributes:
        kind: "flags", "data", "yaml" or "records".
        changed: What was mutated.
        loads: The file that is read with our loader and with a plain one, instead of running a verb.
        given: Flag and value that `run.json` must hold if the run ends well.
    """

    kind: str
    argv: list[str]
    changed: str = ""
    loads: str = ""
    given: tuple[str, str] | None = None


KINDS = {"flags": 30, "load": 32, "data": 6, "yaml": 12, "records": 14, "compared": 6}
"""Kinds of cases, and how many of a hundred are of each."""


def make_case(number: int, seed: int, good: Path, folder: Path, known: dict[str, Any], kinds: dict[str, int]) -> Case:
    """Make a directory with mutated inputs, and say what to run there."""
    draw = Draw(f"{seed}-{number}")
    folder.mkdir(parents=True)
    kind = draw.choices(list(kinds), list(kinds.values()))[0]
    if kind == "flags":
        verb = draw.choice(sorted(BASES))
        copy_inputs(good, folder, BASES[verb])
        of_verb = known["verbs"][verb]
        flags = [*of_verb["flags"], *(known["trainer"] if of_verb["takes_trainer"] else [])]
        if verb.startswith("compare"):
            flags += known["verbs"]["train" if verb == "compare" else "classify"]["flags"]
        argv, changed = mutate_flags(BASES[verb], flags, draw)
        if draw.random() < 0.25:
            argv, more = mutate_flags(argv, flags, draw)
            return Case(kind, argv, f"{changed}; {more}")
        given = (
            (argv[-2], argv[-1])
            if len(argv) > 2 and argv[-2].startswith("--") and argv[-1] not in BASES[verb]
            else None
        )
        return Case(kind, argv, changed, given=given)
    if kind == "load":
        name = draw.choice(["notes.txt", "notes.jsonl", "notes.json", "notes.csv", "notes.tsv", "notes.parquet"])
        shutil.copy(good / name, folder)
        changed = mutate_file(folder / name, draw)
        return Case(kind, ["(load)", name], changed, loads=name)
    if kind == "data":
        verb, name = draw.choice(
            [("train", f"notes.{each}") for each in ("txt", "jsonl", "json", "csv", "parquet")]
            + [("sft", "chats.jsonl"), ("sft", "chats.jsonl"), ("sft", "asked.jsonl"), ("sft", "notes.parquet")]
            + [("classify", "labelled.csv"), ("classify", "labelled.jsonl"), ("evaluate", "labelled.jsonl")]
        )
        argv = [
            name if word.endswith((".jsonl", ".csv")) and "." in word and word in os.listdir(good) else word
            for word in BASES[verb]
        ]
        copy_inputs(good, folder, argv)
        return Case(kind, argv, mutate_file(folder / name, draw))
    if kind == "yaml":
        verb = draw.choice(["train", "sft", "classify"])
        copy_inputs(good, folder, [*BASES[verb], f"{verb}.yaml"])
        return Case(kind, [verb, f"{verb}.yaml"], mutate_file(folder / f"{verb}.yaml", draw))
    if kind == "compared":
        name = draw.choice(sorted(path.name for path in (good / "compared").iterdir()))
        shutil.copytree(good / "compared" / name, folder / "compared")
        return Case(kind, ["report", "compared"], mutate_file(folder / "compared" / "comparison.json", draw))
    run = draw.choice(["trained", "trained", "chatted", "classified"])
    data = {"trained": "notes.jsonl", "chatted": "chats.jsonl", "classified": "labelled.csv"}[run]
    again = [word if word != "out" else run for word in [*BASES["train"], "--resume_from_checkpoint", "true"]]
    followed = [*BASES["train"], "--repeat_scheduler", "follow", "--trace", run]
    readers = [["report", run], ["why", run, draw.choice(["1", "2", "24"])], ["rows", run], ["rows", run, "--csv"]]
    readers += [["rows", run, "--clean", data, f"clean{Path(data).suffix}"], ["push", run]]
    measured = [*BASES["perplexity"], "--adapter_name_or_path", run]
    resumed = [*RUNS[run], "--resume_from_checkpoint", "true"]
    whole = ["export", "--adapter_name_or_path", run, "--output_dir", "whole", "--use_cpu"]
    readers += {
        "trained": [["rows", run, "--all", "--json"], resumed, followed, whole, again, measured],
        "chatted": [measured],
        "classified": [BASES["evaluate"], whole],
    }[run]
    argv = draw.choice(readers)
    copy_inputs(good, folder, [*argv, data, run])
    files = sorted(
        path for path in (folder / run).rglob("*") if path.is_file() and path.suffix not in (".png", ".svg")
    )
    read = [path for path in files if path.suffix in (".json", ".jsonl", ".npz")]
    path = draw.choice(read if draw.random() < 0.7 and read else files)
    if draw.random() < 0.1:
        path.unlink()
        return Case(kind, argv, f"{path.relative_to(folder)} removed")
    return Case(kind, argv, f"{path.parent.relative_to(folder)}/{mutate_file(path, draw)}")


def copy_inputs(good: Path, folder: Path, argv: Sequence[str]) -> None:
    """Copy the good inputs that a command line names."""
    for word in argv:
        source = good / word
        if word and "/" not in word and source.exists() and word not in (".", "..") and not (folder / word).exists():
            if source.is_dir():
                shutil.copytree(source, folder / word)
            else:
                shutil.copy(source, folder / word)


# ---- Running a case ----


@dataclass
class Ended:
    """How a case ended."""

    status: int | None
    stdout: str = ""
    stderr: str = ""
    seconds: float = 0.0
    changed: list[str] = field(default_factory=list)


def in_fork(work: Callable[[], int], folder: Path, seconds: float) -> Ended:
    """Do work in a fork of this process, in a directory, and tell how it ended; status None if it was killed."""
    begun = time.monotonic()
    logs = {name: folder.with_name(f"{folder.name}.{name}") for name in ("stdout", "stderr")}
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = CRASHED
        try:
            os.setsid()
            os.chdir(folder)
            os.environ["TMPDIR"] = str(folder)
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(logs[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False, errors="replace") for n in (1, 2))
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            status = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    status: int | None = None
    while time.monotonic() - begun < seconds:
        pid, ended = os.waitpid(child, os.WNOHANG)
        if pid:
            status = os.waitstatus_to_exitcode(ended)
            break
        time.sleep(0.01)
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    texts = [path.read_text(errors="replace") for path in logs.values()]
    for path in logs.values():
        path.unlink()
    return Ended(status, *texts, time.monotonic() - begun)


def call(argv: list[str]) -> int:
    """Run a verb as its command does, and return its status."""
    import datasets.config

    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        setattr(datasets.config, name, Path.cwd().with_name(f"{Path.cwd().name}.cache"))
    sys.argv = ["abr", *argv]
    try:
        if argv[0].startswith("compare"):
            check_comparison(argv)
        else:
            abr(argv)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    return 0


def check_comparison(argv: list[str]) -> None:
    """Check a comparison as its verb does before its first run, the flags of its runs among that."""
    from abr_trainer.comparison.experiment import Experiment

    class Checked(Exception):
        pass

    class Sender:
        def send(self, found: Any) -> None:
            raise found if isinstance(found, ValueError) else Checked

    def prepare(experiment: Any) -> None:
        runs = [
            experiment.run_of(arm, experiment.seeds[0], some)
            for arm in experiment.arms
            for some in experiment.candidates(arm)
        ]
        experiment.check(experiment.module, [list(run.argv) for run in runs], Sender())

    Experiment.prepare = prepare  # type: ignore[method-assign]  # in this fork alone; it would start a process
    with contextlib.suppress(Checked):
        abr(argv)


def load(name: str) -> int:
    """Read a file as `abr train` and `abr perplexity` do, and compare what a plain reader finds in it."""
    import datasets.config

    from abr_trainer.data.arguments import TextArguments
    from abr_trainer.data.sources import load_texts
    from abr_trainer.records.errors import one_line_errors

    datasets.config.HF_DATASETS_CACHE = Path.cwd().with_name(f"{Path.cwd().name}.cache")
    warned = io.StringIO()
    with contextlib.redirect_stderr(warned):
        try:
            with one_line_errors(ValueError):
                texts, _ = load_texts(TextArguments(text_file=name))
        except SystemExit as end:
            os.write(2, f"{end}\n".encode())
            return 2
    expected = plain_texts(Path(name))
    found = [text for text in texts if text.strip()]
    if Path(name).suffix == ".txt":
        same = "".join(texts) == (expected or [""])[0]
    else:
        same = expected is not None and found == [text for text in expected if text.strip()]
    if same or "left out" in warned.getvalue():
        return 0
    print(f"ours: {len(found)} rows, plain: {None if expected is None else len(expected)}", file=sys.stderr)
    for one, other in zip(found, expected or [], strict=False):
        if one != other:
            print(f"ours:  {one[:200]!r}\nplain: {other[:200]!r}", file=sys.stderr)
            break
    return SILENT


def plain_texts(path: Path) -> list[str] | None:
    """Return the texts in a file as a reader of a few lines finds them; None if it is not what its name says."""
    csv.field_size_limit(2**31 - 1)
    try:
        if path.suffix == ".parquet":
            table = pq.read_table(path).to_pydict()
            [values] = [table[name] for name in ("text", *table) if name in table][:1]
            return [as_one(value) for value in values if value is not None]
        text = path.read_bytes().decode("utf-8-sig")
        if path.suffix == ".txt":
            return [text.replace("\r\n", "\n").replace("\r", "\n")]
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.replace("\r\n", "\n").split("\n") if line.strip()]
        elif path.suffix == ".json":
            rows = json.loads(text)
        else:
            reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",")
            header, *lines = [line for line in reader if line]
            if "text" not in header:
                header = ["text" if name.strip().lower() in ("text", "1", "") else name for name in header]
            if header.count("text") != 1 or any(len(line) != len(header) for line in lines):
                return None
            rows = [dict(zip(header, line, strict=True)) for line in lines]
        return [as_one(row["text"]) for row in rows if row.get("text") is not None]
    except (ValueError, TypeError, KeyError, AttributeError, csv.Error, pa.ArrowInvalid):
        return None


def as_one(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(part.strip() for part in value)
    if not isinstance(value, str):
        raise TypeError
    return value


# ---- Verdicts ----

UNCLEAR = ("object has no attribute", "NoneType", "not subscriptable", "out of range", "unhashable", "object is not")
UNCLEAR += ("unexpected keyword", "positional argument", "could not convert", "invalid literal", "'>' not supported")
UNCLEAR += (
    "'<' not supported",
    "unsupported operand",
    "Errno",
    "must be str",
    "argument of type",
    "IndexError",
)
"""Parts of messages that Python wrote, not we."""


def verdict(case: Case, ended: Ended, folder: Path) -> str:
    """Return "ended well", "refused", "killed in training", or what is wrong."""
    if ended.status is None:
        return "killed in training" if list(folder.glob("*/abr_trace.jsonl")) else "hangs"
    if ended.status == SILENT:
        return "silent"
    if ended.status == 0:
        return silent_fault(case, folder) or "ended well"
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    if ended.status not in (1, 2) or "Traceback (most recent call last)" in ended.stderr:
        return "crash"
    if len(errors) != 1 or not ended.stderr.rstrip().splitlines()[-1].startswith("error: "):
        return "unclear: not one line"
    if any(part in errors[0] for part in UNCLEAR) or len(errors[0]) < 25:
        return "unclear: " + next((part for part in UNCLEAR if part in errors[0]), "short")
    if ended.status == 1 and "error: HF_HUB_OFFLINE is set." in errors:
        return "refused"  # a push that fails for want of a network is a failure
    if ended.status == 1:
        return "refused, with status 1"
    began = any((folder / name / "run.json").exists() for name in ("out",))
    left = [name for name in ended.changed if not (began and name.startswith("out/") and not name.endswith(".tmp"))]
    if left and not (case.kind == "records" and case.argv[0] in ("train", "sft", "classify")):
        return "half-written"
    return "refused"


def silent_fault(case: Case, folder: Path) -> str:
    """Return what a run that ended well has done other than asked."""
    record = folder / "out" / "run.json"
    if case.argv[0] not in ("train", "sft", "classify") or not record.exists():
        return ""
    from safetensors.torch import load_file

    for path in folder.glob("out/*.safetensors"):
        if not all(bool(tensor.isfinite().all()) for tensor in load_file(path).values()):
            return "silent: weights are not finite"
    if case.given is not None:
        flag, given = case.given
        recorded = json.loads(record.read_text())["arguments"].get(flag[2:].replace("-", "_"), given)
        if isinstance(recorded, int | float) and not isinstance(recorded, bool):
            try:
                if not (float(given) == recorded or (math.isnan(float(given)) and math.isnan(recorded))):
                    return f"silent: {flag} is {recorded}"
            except ValueError:
                return f"silent: {flag} is {recorded}"
        elif isinstance(recorded, str) and recorded.lower() != given.lower() and not recorded.endswith(given):
            return f"silent: {flag} is {recorded!r}"
    return ""


def snapshot(folder: Path) -> dict[str, str]:
    """Return a digest of each file in a directory, and a word for each directory."""
    return {
        str(path.relative_to(folder)): hashlib.md5(path.read_bytes()).hexdigest() if path.is_file() else "directory"
        for path in sorted(folder.rglob("*"))
    }


def run_case(
    number: int, seed: int, out: Path, seconds: float = SECONDS, kinds: dict[str, int] = KINDS
) -> tuple[Case, Ended, str]:
    """Run a case, and leave nothing of it."""
    folder = out / "cases" / str(number)
    shutil.rmtree(folder, ignore_errors=True)
    known = json.loads(FLAGS_FILE.read_text())
    case = make_case(number, seed, out / "good", folder, known, kinds)
    before = snapshot(folder)
    ended = in_fork(lambda: load(case.loads) if case.loads else call(case.argv), folder, seconds)
    after = snapshot(folder)
    ended.changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    found = verdict(case, ended, folder)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(folder.with_name(f"{folder.name}.cache"), ignore_errors=True)
    return case, ended, found


FINE = ("ended well", "refused", "killed in training")
"""Verdicts that are no faults."""


def import_everything() -> None:
    """Import what any verb imports, so that a fork need not."""
    import importlib

    import torch

    from abr_trainer.cli.main import VERBS

    for verb in VERBS.values():
        importlib.import_module(verb.module)
    for name in (
        "trl",
        "peft",
        "matplotlib.figure",
        "bitsandbytes",
        "abr_trainer.integrations.trl",
        "abr_trainer.data.cleaning",
    ):
        importlib.import_module(name)
    from trl import SFTConfig, SFTTrainer  # noqa: F401  # lazy

    torch.set_num_threads(1)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"), help="for inputs, cases and faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=5000, help="stop after so many, those of earlier calls included")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a case, after which it is killed")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no case after so many")
    parser.add_argument("--only", type=int, nargs="+", help="run these cases, and print what they print")
    parser.add_argument("--results", type=Path, help=f"write the counts there; the committed ones are {RESULTS.name}")
    args = parser.parse_args(argv)
    begun = time.monotonic()
    import_everything()
    out = args.out.absolute()
    if not (out / "good" / "compared").exists():
        shutil.rmtree(out / "good", ignore_errors=True)
        make_inputs(out / "good", list(RUNS))
    if args.only:
        return {"cases": [shown(*run_case(number, args.seed, out, args.seconds)) for number in args.only]}
    done = out / f"seed-{args.seed}.jsonl"
    lines = list(map(json.loads, done.read_text().splitlines())) if done.exists() else []
    with done.open("a") as log:
        for number in range(len(lines), args.cases):
            if time.monotonic() - begun > 60 * args.minutes:
                break
            case, ended, found = run_case(number, args.seed, out, args.seconds)
            line: dict[str, Any] = {"case": number, "kind": case.kind, "verb": case.argv[0], "verdict": found}
            line["seconds"] = round(ended.seconds, 2)
            if found not in FINE:
                line |= {"argv": case.argv, "changed": case.changed, "status": ended.status, "left": ended.changed}
                line["stderr"] = ended.stderr[-1500:]
                print(json.dumps(line), flush=True)
            lines.append(line)
            log.write(json.dumps(line) + "\n")
            log.flush()
    results = {**versions_and_machine("cpu", 1, 1), "seed": args.seed, "runs": list(counted(lines))}
    if args.results:
        write_runs(results, args.results)
    print(Counter(line["verdict"].partition(":")[0] for line in lines), file=sys.stderr)
    return results


def counted(lines: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the counts of verdicts, by kind of case, of so many cases at a time."""
    for first in range(0, len(lines), IN_A_LINE):
        part = lines[first : first + IN_A_LINE]
        counts: dict[str, Counter[str]] = {}
        for line in part:
            counts.setdefault(line["kind"], Counter())[line["verdict"].partition(":")[0]] += 1
        yield {"first": first, "cases": len(part), "seconds": round(sum(line["seconds"] for line in part)), **counts}


def shown(case: Case, ended: Ended, found: str) -> dict[str, Any]:
    print(f"abr {' '.join(case.argv)}\nchanged: {case.changed}\n{ended.stdout}\n{ended.stderr}")
    print(f"status {ended.status} after {ended.seconds:.1f} s: {found}; changed files: {ended.changed}")
    return {"verdict": found}


if __name__ == "__main__":
    main()
