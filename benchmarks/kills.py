"""Runs that are killed and resumed, against runs that are not: what they leave must be the same, to the last bit.

    export PYTHONPATH=. HF_HUB_OFFLINE=1             # for the Hub of the tests
    python benchmarks/kills.py                       # 100 runs, a quarter of an hour; goes on where it was stopped
    python benchmarks/kills.py --only 17 --keep DIR  # one of them; its directories are kept

What is trained and when it is killed is drawn from `--seed` and the number of the run. A run is killed with SIGKILL:
after a random share of its time, before a random change to its files, in a random write of a file (part of it stays),
before a random batch of its evaluations, or before a random request to the Hub, which is a local server. A third of
the runs is killed a second time after it was resumed. Each fifth run has two processes over gloo, of which one is
killed; the other one must end, too.

All runs are forked from this process, so that one takes a few seconds. Numbers go to benchmarks/results/kills.json.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import math
import os
import random
import shutil
import signal
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from campaign import carry_on, parser_of
from forked import KINDS, Counts, Event, StillRunning, Watch, fork, ranks_at, wait

import run_clm_abr
from abr_trainer.cli import classify, sft
from abr_trainer.data.demo import demo_texts
from abr_trainer.records.files import (
    PROVENANCE,
    flaw_in,
    is_unused,
    last_complete_checkpoint,
    newest_first,
    read_lines,
)
from abr_trainer.training.engines import leave_ranks
from tests.conftest import point_client_at
from tests.hub_server import Hub

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "kills.json"

VERBS = {"train": run_clm_abr.run, "sft": sft.run, "classify": classify.run}

PATIENCE = 120.0
"""Seconds that a run may take, and a rank after SIGTERM."""

GRACE = 10.0
"""Seconds that the other rank may run on before it is ended as torchrun does it, which waits for none."""

LOG = "log-{rank}.txt"


# ---- What is drawn ----


@dataclass(frozen=True)
class Moment:
    """When a run is killed.

    Attributes:
        kind: "time", or a kind of event.
        share: Of the time that the unbroken run took, or of its events of this kind.
        kept: How much of a file stays if the run is killed while it writes that, as a share.
    """

    kind: str
    share: float
    kept: float = 0.0


@dataclass(frozen=True)
class Case:
    """A run, and when it is killed.

    Attributes:
        victim: The rank that is killed.
        pushes: Whether it pushes to a Hub.
    """

    number: int
    verb: str
    flags: tuple[str, ...]
    moments: tuple[Moment, ...]
    ranks: int = 1
    victim: int = 0
    pushes: bool = False


RULES: dict[str, tuple[str, ...]] = {
    "baseline": (),
    "fixed": ("--max_repeats 3", ""),
    "random": ("--max_repeats 3", "--max_repeats 3 --repeat_until 0.6"),
    "abr": ("--loss_threshold 1.5", "--loss_threshold q0.6", "--loss_threshold s0.5 --repeat_until 0.7"),
    "window": ("", '--repeat_scheduler_kwargs {"window_size":3,"trend":0.05}'),
    "gain": ("", '--repeat_scheduler_kwargs {"window":10,"probe_every":3}'),
    "replay": ('--repeat_scheduler_kwargs {"quantile":0.4,"spacing":2,"window":10}',),
    "learnable": ('--repeat_scheduler_kwargs {"warmup":5,"loss_threshold":1.5}',),
    "easy": ('--repeat_scheduler_kwargs {"quantile":0.5,"window":10}',),
    "follow": ("--trace {followed}",),
}
"""Rules, and flags that make them decide different things within a few batches."""

FEW_ROWS = (
    "--use_cpu",
    "--disable_tqdm true",
    "--do_train",
    "--do_eval",
    "--max_eval_samples 6",
    "--lora_dropout 0.1",
)


def draw(seed: int, number: int) -> Case:
    """Draw a run: flags that go together, and when it is killed."""
    rng = random.Random(f"{seed} {number}")

    def one(*options: str) -> str:
        return rng.choice(options)

    def perhaps(share: float, *options: str) -> list[str]:
        return [one(*options)] if rng.random() < share else []

    ranks = 2 if number % 5 == 4 else 1
    verb = rng.choices(("train", "sft", "classify"), (6, 2, 2))[0]
    flags = [*FEW_ROWS, one("--learning_rate 5e-3", "--learning_rate 2e-2"), f"--seed {rng.randrange(1000)}"]
    flags += [f"--per_device_train_batch_size {rng.choice((1, 2, 3))}"]
    flags += [f"--gradient_accumulation_steps {rng.choice((1, 1, 2, 3))}"]
    is_streamed = False
    if verb == "train":
        flags += ["--block_size 48", f"--max_train_samples {rng.randint(24, 60)}"]
        source = rng.choices(("demo", "file", "mix", "stream", "mixed streams"), (2, 2, 2, 2, 1))[0]
        is_streamed = "stream" in source
        mix = "--dataset_mix {data}/a=0.6,{data}/b=0.4"
        flags += {
            "demo": ["--dataset_name demo"],
            "file": [
                "--train_file {data}/a/train.jsonl",
                "--validation_file {data}/a/validation.jsonl",
                "--test_file {data}/a/test.jsonl",
            ],
            "mix": [mix, one("--mix_until all_exhausted", "--mix_until first_exhausted")],
            "stream": ["--dataset_name {data}/a", "--streaming"],
            "mixed streams": [mix, "--streaming"],
        }[source]
        if rng.random() < 0.2:
            flags += ["--primer_file {data}/primer.txt", f"--primer_batches {rng.randint(1, 6)}"]
    elif verb == "sft":
        flags += ["--dataset_name demo", "--chat_template alpaca", f"--max_train_samples {rng.randint(24, 50)}"]
        flags += perhaps(0.3, "--packing --max_length 96")
        flags += ["--activation_checkpointing false"]
    else:
        flags += ["--model_name_or_path demo", "--task_name demo", "--max_seq_length 24"]
        flags += [f"--max_train_samples {rng.randint(24, 50)}"]
    rules = [rule for rule in RULES if rule != "follow" or (verb == "train" and ranks == 1)]
    rule = rng.choice(rules)
    flags += [f"--repeat_scheduler {rule}", *perhaps(1.0, *(RULES[rule] or ("",)))]
    if rule != "follow":
        flags += perhaps(
            0.7,
            "--skip_outliers robust --outlier_sigmas 1.0 --outlier_window 10",
            "--skip_outliers classic --outlier_sigmas 0.8",
        )
        flags += perhaps(0.2, "--skip_grad_norm 1.0")
    flags += perhaps(0.4, "--skip_rows robust --row_sigmas 1.0 --row_window 64")
    if not is_streamed:
        flags += perhaps(0.3, "--rank_rows")
    # The length of the run
    has_budget = rng.random() < 0.5
    if has_budget:
        flags += [f"--max_passes {rng.randint(18, 45)}"]
    elif is_streamed or rng.random() < 0.5:
        flags += [f"--max_steps {rng.randint(12, 26)}"]
    else:
        flags += ["--num_train_epochs 2"]
    # Logs, evaluations, checkpoints
    flags += [f"--logging_steps {rng.choice((1, 2, 3, 10))}"]
    saves = rng.choices(("steps", "epoch", "passes", "best"), (6, 2, 2 * has_budget, 1))[0]
    flags += {
        "steps": [f"--save_steps {rng.choice((1, 2, 3, 4, 5, 7))}"],
        "epoch": ["--save_strategy epoch"],
        "passes": [f"--save_strategy no --save_passes {rng.choice((3, 5, 0.2))}"],
        "best": ["--save_strategy best"],
    }[saves]
    evaluates = rng.choices(("default", "steps", "passes", "no"), (4, 3, has_budget, 1))[0]
    finds_best = saves == "best" or (saves in ("steps", "epoch") and rng.random() < 0.4)
    if finds_best and evaluates == "no":
        evaluates = "default"
    flags += {
        "default": [],
        "steps": [f"--eval_strategy steps --eval_steps {rng.choice((2, 3, 5))}"],
        "passes": [f"--eval_passes {rng.choice((4, 0.25))}"],
        "no": ["--eval_strategy no"],
    }[evaluates]
    if finds_best:
        flags += perhaps(1.0, "--load_best_model_at_end", "--early_stopping_patience 2")
    flags += perhaps(0.5, "--save_total_limit 1", "--save_total_limit 2")
    # The model
    if verb != "classify":
        flags += perhaps(0.25, "--use_lora false")
    if "--use_lora false" not in flags:
        flags += perhaps(0.3, "--load_in_4bit --torch_dtype float32 --bnb_4bit_compute_dtype float32")
    flags += perhaps(0.3, "--lr_scheduler_type cosine --warmup_steps 4", "--lr_scheduler_type constant")
    flags += perhaps(0.2, "--neftune_noise_alpha 5")
    flags += perhaps(0.15, "--dataloader_num_workers 1")
    flags += perhaps(0.2, "--do_predict")
    if verb != "classify":
        flags += perhaps(0.7, "--sample_prompts 0")
    flags += [one("--report_to none", "--report_to none", "--report_to tensorboard")]
    pushes = ranks == 1 and rng.random() < 0.2
    if pushes:
        strategy = one("end", "every_save", "checkpoint", "all_checkpoints")
        flags += [f"--push_to_hub --hub_model_id me/run-{number} --hub_base_model demo-org/base"]
        flags += [f"--hub_strategy {strategy}"]
    moments = tuple(_moment(rng, pushes) for _ in range(rng.choices((1, 2), (2, 1))[0]))
    words = tuple(word for flag in flags for word in flag.split())
    return Case(number, verb, words, moments, ranks, rng.randrange(ranks), pushes)


def _moment(rng: random.Random, pushes: bool) -> Moment:
    weights = {"time": 4, "change": 3, "write": 3, "evaluated batch": 1.5, "request": 4 * pushes}
    kind = rng.choices(list(weights), list(weights.values()))[0]
    return Moment(kind, round(rng.random(), 3), round(rng.random(), 3))


def write_data(directory: Path) -> None:
    """Write texts of two kinds, each with a validation split, and a primer."""
    texts = {split: [text for text in demo_texts(split) if text.strip()] for split in ("train", "validation", "test")}
    for name, part in (("a", 0), ("b", 1)):
        for split, lines in texts.items():
            path = directory / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in lines[part::2][:150]))
    (directory / "primer.txt").write_text("\n".join(texts["train"][-60:]))


# ---- Running ----


@dataclass
class Attempt:
    """What became of a command.

    Attributes:
        statuses: Of the ranks: negative for a signal, None if it had to be ended.
        seconds: Until the last rank had ended.
        outlived: Seconds that the other rank ran on after the kill.
        batches: In the trace when it had ended.
        counts: Events of the victim, by kind.
    """

    statuses: list[int | None]
    seconds: float
    outlived: float | None
    batches: int
    counts: dict[str, int]

    @property
    def was_killed(self) -> bool:
        return -signal.SIGKILL in self.statuses


@dataclass
class Place:
    """Where runs are made.

    Attributes:
        directory: Of data and runs.
        hub: A Hub, for runs that push.
    """

    directory: Path
    hub: Hub

    @functools.cached_property
    def followed(self) -> Path:
        """A run whose trace others follow."""
        flags = [*(word for flag in FEW_ROWS for word in flag.split()), "--dataset_name", "demo", "--max_steps", "30"]
        flags += ["--block_size", "48", "--repeat_scheduler", "random", "--report_to", "none", "--sample_prompts", "0"]
        output = self.directory / "followed"
        log = self.directory / "followed.txt"
        if wait(fork(lambda: run_clm_abr.run([*flags, "--output_dir", str(output)]), log, {}), PATIENCE):
            raise RuntimeError(log.read_text()[-2000:])
        return output

    def filled_in(self, flags: Sequence[str]) -> list[str]:
        followed = str(self.followed) if "{followed}" in flags else ""
        data = str(self.directory / "data")
        return [flag.replace("{data}", data).replace("{followed}", followed) for flag in flags]


def attempt(
    case: Case, place: Place, argv: Sequence[str], output: Path, moment: Moment | None, unbroken: Attempt | None
) -> Attempt:
    """Run a command, and kill the victim at a moment of it, if there is one."""
    counts = Counts()
    if moment is not None and unbroken is not None and unbroken.counts.get(moment.kind) == 0:
        moment = replace(moment, kind="time")  # the second rank writes little
    at = None if moment is None or unbroken is None else _place_of(moment, unbroken)

    def kill(event: Event) -> None:
        is_due = moment is not None and (event.kind, event.number) == (moment.kind, at)
        if is_due and event.kind != "write":  # else it is killed in the write
            os.kill(os.getpid(), signal.SIGKILL)

    def kill_in_write(event: Event) -> None:
        if moment is not None and (event.kind, event.number) == (moment.kind, at) and event.path is not None:
            os.truncate(event.path, int(moment.kept * event.path.stat().st_size))
            os.kill(os.getpid(), signal.SIGKILL)

    def work(rank: int) -> None:
        if case.pushes:
            point_client_at(place.hub, pytest.MonkeyPatch())
        if rank == case.victim:
            Watch(output, counts, kill, kill_in_write).install()
        VERBS[case.verb]([*argv, "--output_dir", str(output)])
        if case.ranks > 1:
            leave_ranks()

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    begun = time.monotonic()
    pids = [
        fork(functools.partial(work, rank), output.with_name(f"{output.name}-{LOG.format(rank=rank)}"), environment)
        for rank, environment in enumerate(ranks_at(port, case.ranks))
    ]
    victim = pids[case.victim]
    if moment is not None and unbroken is not None and moment.kind == "time":
        while time.monotonic() - begun < moment.share * unbroken.seconds:
            time.sleep(0.001)
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    status = _status_of(victim)
    ended = time.monotonic()
    statuses = [status if pid == victim else _status_of(pid, status == -signal.SIGKILL) for pid in pids]
    outlived = time.monotonic() - ended if case.ranks > 1 and status == -signal.SIGKILL else None
    trace = output / "abr_trace.jsonl"
    batches = sum(1 for _ in read_lines(trace)) if trace.exists() else 0
    found = {kind: counts[kind] for kind in KINDS}
    return Attempt(statuses, time.monotonic() - begun, outlived, batches, found)


def _status_of(pid: int, is_left: bool = False) -> int | None:
    """Return the status of a rank; None if it had to be killed.

    Args:
        is_left: Whether another rank was killed. A launcher such as torchrun then ends the rest with SIGTERM. Here it
            is given `GRACE` seconds to end by itself.
    """
    with contextlib.suppress(StillRunning):
        return wait(pid, GRACE if is_left else PATIENCE, signal.SIGTERM if is_left else signal.SIGKILL)
    if is_left:
        with contextlib.suppress(StillRunning):
            return wait(pid, PATIENCE)
    return None


def _place_of(moment: Moment, unbroken: Attempt) -> int | None:
    if moment.kind == "time":
        return None
    return 1 + int(moment.share * unbroken.counts[moment.kind])


class Failed(RuntimeError):
    """A run that was not killed has failed."""


def try_case(case: Case, place: Place) -> dict[str, Any]:
    """Make a run without a kill and one with its kills, and return what was done and what differs."""
    own = Path(tempfile.mkdtemp(prefix=f"{case.number}-", dir=place.directory))
    argv = place.filled_in(case.flags)
    whole, broken = own / "whole", own / "broken"
    place.hub.repositories.clear()
    unbroken = attempt(case, place, argv, whole, None, None)
    if any(status != 0 for status in unbroken.statuses):
        raise Failed(f"{case.verb} {' '.join(argv)}\n{_ends_of(own)}")
    pushed = _pushed(place.hub)
    place.hub.repositories.clear()
    kills: list[dict[str, Any]] = []
    problems: list[str] = []
    for moment in (*case.moments, None):
        how = how_to_go_on(broken)
        if how == ["clear"]:
            problems.append("a user has to clear the directory")
            shutil.rmtree(broken)
            how = []
        done = attempt(case, place, [*argv, *how], broken, moment, unbroken)
        while moment is not None and not kills and not any(done.statuses):  # it has ended before it was killed
            shutil.rmtree(broken)
            moment = replace(moment, share=0.8 * moment.share)
            done = attempt(case, place, argv, broken, moment, unbroken)
        problems += ["a rank did not end"] * done.statuses.count(None)
        if moment is not None:
            total = unbroken.counts.get(moment.kind, 0)
            kills.append(
                {
                    "kind": moment.kind if total else "time",
                    "at": _place_of(moment, unbroken) if total else round(moment.share * unbroken.seconds, 3),
                    "of": total or round(unbroken.seconds, 3),
                    "begun": " ".join(how[:1]) or "new",
                    "killed": done.was_killed,
                    "batches": done.batches,
                    "checkpoint": last_complete_checkpoint(broken) is not None,
                    "statuses": done.statuses,
                    **({} if done.outlived is None else {"outlived": round(done.outlived, 1)}),
                }
            )
            if done.was_killed and 0 in done.statuses and not _has_ended(broken):
                problems.append("the other rank ended with status 0")
            if not done.was_killed and any(done.statuses):
                problems.append(f"failed before it was killed: {_ends_of(own)}")
        elif any(done.statuses):
            problems.append(f"the resumed run failed: {_ends_of(own)}")
        if not done.was_killed and not any(done.statuses):
            break  # it has ended before it was killed
    problems += differences(whole, broken)
    if case.pushes:
        problems += _different_pushes(pushed, _pushed(place.hub))
    problems += [f"the Hub: {error.strip().splitlines()[-1]}" for error in place.hub.errors]
    place.hub.errors.clear()
    if not problems:
        shutil.rmtree(own)
    return {
        **asdict(case),
        "flags": " ".join(case.flags),
        "moments": [asdict(moment) for moment in case.moments],
        "batches": unbroken.batches,
        "kills": kills,
        "compared": compared_in(whole) if whole.exists() else sorted(COMPARED),
        "equal": not problems,
        "problems": problems,
    }


def _has_ended(output: Path) -> bool:
    return (output / "all_results.json").exists()


def how_to_go_on(output: Path) -> list[str]:
    """Return the flags with which a user goes on after a kill."""
    if is_unused(output):
        return []
    if any(flaw_in(checkpoint) is None for checkpoint in newest_first(output)):
        return ["--resume_from_checkpoint", "true"]
    if (output / PROVENANCE).exists() or (output / "_previous-run").exists():
        return ["--overwrite_output_dir"]
    return ["clear"]


def _ends_of(own: Path) -> str:
    logs = sorted(own.glob(f"*{LOG.format(rank='*')}"), key=lambda path: path.stat().st_mtime)
    return " | ".join(path.read_text(errors="replace")[-1500:] for path in logs[-2:])


# ---- What is compared ----

COMPARED = (
    "weights",
    "checkpoints",
    "optimizer",
    "decisions",
    "trace",
    "ledger",
    "log",
    "evaluations",
    "rows",
    "push",
)

OF_CLOCKS = ("seconds", "runtime", "per_second", "memory", "preparation_time", "jit_compilation_time")
OF_ONE_CALL = ("train_loss",)
"""Mean of the batches of a call of `train`, as in Trainer."""

OWN = (
    "abr_checksums.json",
    "run.json",
    "_push.json",
    "_push_names.json",
    "training_args.bin",
    "README.md",
    "log-*.txt",
)
"""Files that say when and how a run was made."""


def files_of(output: Path) -> set[str]:
    """Return the files of a run that another one must have, too."""
    found = (path.relative_to(output) for path in output.rglob("*") if path.is_file())
    return {
        str(path)
        for path in found
        if path.parts[0] != "runs"
        and not path.parts[0].startswith("abandoned-")
        and not any(path.match(name) for name in OWN)
    }


def differences(whole: Path, broken: Path) -> list[str]:
    """Return in what the files of two runs differ, apart from times."""
    one, other = files_of(whole), files_of(broken)
    told = [f"{name} is missing" for name in sorted(one - other)] + [f"{name} is left" for name in sorted(other - one)]
    for name in sorted(one & other):
        if not alike(content_of(whole / name, whole), content_of(broken / name, broken)):
            told.append(f"{name} differs: {_first_difference(whole, broken, name)}")
    return told


def _first_difference(whole: Path, broken: Path, name: str) -> str:
    def walk(one: Any, other: Any, at: str) -> Iterator[str]:
        if isinstance(one, dict) and isinstance(other, dict):
            for key in sorted({*map(str, one)} | {*map(str, other)}):
                yield from walk(one.get(key, "nothing"), other.get(key, "nothing"), f"{at}.{key}")
        elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
            for index, pair in enumerate(zip(one, other, strict=True)):
                yield from walk(*pair, f"{at}[{index}]")
        elif not alike(one, other):
            yield f"{at}: {str(one)[:300]} / {str(other)[:300]}"

    return next(walk(content_of(whole / name, whole), content_of(broken / name, broken), ""), "?")


def content_of(path: Path, output: Path) -> Any:
    """Return what a file says, without times and without the name of its directory."""
    if path.suffix in (".pt", ".pth"):
        return torch.load(path, weights_only=False)
    if path.suffix == ".npz":
        with np.load(path) as saved:
            return {name: saved[name] for name in saved.files}
    if path.suffix == ".jsonl":
        return [_plain(line, output) for line in map(json.loads, path.read_text().splitlines())]
    if path.suffix == ".json" and not path.name.startswith("tokenizer"):
        return _plain(json.loads(path.read_text()), output)
    return path.read_bytes()


def _plain(value: Any, output: Path) -> Any:
    if isinstance(value, dict):
        return {
            name: _plain(each, output)
            for name, each in value.items()
            if not name.endswith(OF_CLOCKS) and name not in OF_ONE_CALL and name != "waiting"
        }
    if isinstance(value, list):
        return [_plain(each, output) for each in value]
    return value.replace(str(output), "OUTPUT") if isinstance(value, str) else value


def alike(one: Any, other: Any) -> bool:
    """Tell whether two values are the same to the last bit; NaN is the same as NaN."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and _bytes(one) == _bytes(other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, dict):
        return list(map(str, one)) == list(map(str, other)) and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float) and math.isnan(one):
        return math.isnan(other)
    return bool(one == other) if not hasattr(one, "__dict__") else alike(vars(one), vars(other))


def _bytes(tensor: torch.Tensor) -> bytes:
    return (
        tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
        if tensor.dim()
        else str(tensor.item()).encode()
    )


def _pushed(hub: Hub) -> dict[str, dict[str, bytes]]:
    """Return the files at the root of each repository. Which checkpoint lies below it depends on when pushes end."""
    return {
        name: {path: content for path, content in repository.files().items() if "/" not in path}
        for name, repository in hub.repositories.items()
    }


def _different_pushes(one: dict[str, dict[str, bytes]], other: dict[str, dict[str, bytes]]) -> list[str]:
    """Return in what two repositories differ: their files, and the weights."""
    if one.keys() != other.keys():
        return [f"pushed to {sorted(one)} / {sorted(other)}"]
    told = []
    for name in one:
        if one[name].keys() != other[name].keys():
            told.append(f"the repository has other files: {sorted(one[name].keys() ^ other[name].keys())}")
        for path in one[name].keys() & other[name].keys():
            if path.endswith(".safetensors") and one[name][path] != other[name][path]:
                told.append(f"{path} was pushed with other weights")
    return told


def compared_in(output: Path) -> list[str]:
    return sorted(files_of(output))


# ---- The campaign ----


def warm() -> None:
    """Make what each run would make anew, and keep the garbage collector from looking at it."""
    torch.set_num_threads(1)
    for name in ("deepspeed", "sklearn.metrics", "torch.utils.tensorboard", "peft.tuners.lora.bnb", "trl"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)  # which each run would do
    demo_texts("train")
    gc.collect()
    gc.freeze()


def summary_of(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    kills = [kill for run in runs for kill in run["kills"] if kill["killed"]]
    of_ranks = [kill for kill in kills if "outlived" in kill]
    return {
        "runs": len(runs),
        "equal": sum(run["equal"] for run in runs),
        "on two ranks": sum(run["ranks"] == 2 for run in runs),
        "killed twice": sum(sum(kill["killed"] for kill in run["kills"]) > 1 for run in runs),
        "kills": dict(Counter(kill["kind"] for kill in kills)),
        "other ranks that ended by themselves": sum(-signal.SIGTERM not in kill["statuses"] for kill in of_ranks),
        "other ranks that SIGTERM ended": sum(-signal.SIGTERM in kill["statuses"] for kill in of_ranks),
        "longest life of the other rank in seconds": max((kill.get("outlived", 0) for kill in kills), default=0),
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = parser_of(__doc__, 100, RESULTS)
    parser.add_argument("--keep", type=Path, help="Directory for the runs. Those that differ are kept there.")
    args = parser.parse_args(argv)

    def told(run: dict[str, Any]) -> tuple[str, str]:
        where = "; ".join(f"{kill['kind']} {kill['at']} of {kill['of']}" for kill in run["kills"])
        verdict = "equal" if run["equal"] else " | ".join(run["problems"])[:1500]
        return f"{run['verb']} x{run['ranks']}, {where}: {verdict}", ""

    with contextlib.ExitStack() as stack:
        directory = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory.mkdir(parents=True, exist_ok=True)
        write_data(directory / "data")
        warm()
        place = Place(directory.resolve(), stack.enter_context(Hub(directory / "hub")))
        return carry_on(args, lambda number: try_case(draw(args.seed, number), place), "equal", told, summary_of)


if __name__ == "__main__":
    main()
