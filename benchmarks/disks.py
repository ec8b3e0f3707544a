"""Disks that get full or fail under a run, and checkpoints that are damaged: nothing that was complete may be lost.

    export PYTHONPATH=. HF_HUB_OFFLINE=1             # for the Hub of the tests
    python benchmarks/disks.py                       # as root: it mounts file systems of a few MB

Four runs (LoRA, all weights, chats, a classifier) are made over and over again, and each time something else happens,
drawn from `--seed`:

- "full": the file system of the output directory, a tmpfs, has a random part of the space that the run needs.
- "no space", "read-only", "input/output error": from a random change or write on, each one fails with this error.
- "damage": a file of the newest checkpoint is cut, emptied, zeroed, has bits flipped, or is missing.

A run must end with one line and a status that is not 0, or as if nothing had happened. Then it is resumed, and must
leave what an undisturbed run leaves, to the last bit. Numbers go to benchmarks/results/disks.json.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from campaign import carry_on, parser_of
from forked import KINDS, Counts, Event, Watch, fork, wait
from kills import FEW_ROWS, PATIENCE, VERBS, differences, how_to_go_on, warm

from abr_trainer.records.files import files_to_check, flaw_in, last_complete_checkpoint, newest_first

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "disks.json"

SHORT = ("--learning_rate 5e-3", "--per_device_train_batch_size 2", "--max_steps 9", "--logging_steps 2")

JOBS: dict[str, tuple[str, tuple[str, ...]]] = {
    "LoRA": (
        "train",
        (
            *("--dataset_name demo", "--block_size 48", "--max_train_samples 18", "--save_steps 2", "--rank_rows"),
            *("--repeat_scheduler random", "--skip_rows robust", "--row_sigmas 1.0", "--row_window 64"),
            *("--sample_prompts 2", "--report_to tensorboard", "--do_predict"),
        ),
    ),
    "all weights": (
        "train",
        (
            *("--dataset_name demo", "--block_size 48", "--max_train_samples 18", "--use_lora false"),
            *("--save_strategy epoch", "--load_best_model_at_end", "--eval_strategy steps", "--eval_steps 3"),
            *("--repeat_scheduler replay", '--repeat_scheduler_kwargs {"quantile":0.4,"spacing":2,"window":10}'),
            *("--sample_prompts 0", "--report_to none"),
        ),
    ),
    "chats": (
        "sft",
        (
            *("--dataset_name demo", "--chat_template alpaca", "--max_train_samples 24", "--save_steps 3"),
            *("--activation_checkpointing false", "--sample_prompts 0", "--report_to none", "--save_total_limit 2"),
        ),
    ),
    "classifier": (
        "classify",
        (
            *("--model_name_or_path demo", "--task_name demo", "--max_seq_length 24", "--max_train_samples 24"),
            *("--save_steps 2", "--do_predict", "--report_to none", "--skip_rows robust", "--row_sigmas 1.0"),
        ),
    ),
}

QUICK = ("train", ("--block_size 48 --max_train_samples 8 --max_steps 3 --save_steps 1", "--sample_prompts 0"))
"""A job for a test."""

ERRORS = {"no space": errno.ENOSPC, "read-only": errno.EROFS, "input/output error": errno.EIO}

DAMAGE = ("cut", "emptied", "zeroed", "flipped", "missing")


@dataclass(frozen=True)
class Case:
    """What happens to a run.

    Attributes:
        what: "full", one of `ERRORS`, or one of `DAMAGE`.
        share: Of the space, of the changes and writes, or of the file.
        file: Which of the files of the checkpoint is damaged, as a share of their number.
    """

    number: int
    job: str
    what: str
    share: float
    file: float = 0.0


def draw(seed: int, number: int, is_root: bool) -> Case:
    rng = random.Random(f"{seed} {number}")
    kinds = {**({"full": 4} if is_root else {}), **dict.fromkeys(ERRORS, 1.5), **dict.fromkeys(DAMAGE, 1.2)}
    what = rng.choices(list(kinds), list(kinds.values()))[0]
    return Case(number, rng.choice(list(JOBS)), what, round(rng.random(), 4), round(rng.random(), 4))


# ---- Running ----


@dataclass(frozen=True)
class Ended:
    """How a run has ended: its status, the lines that it wrote, and its events by kind."""

    status: int
    lines: list[str]
    counts: dict[str, int]

    @property
    def errors(self) -> list[str]:
        return [line for line in self.lines if line.startswith("error: ")]

    @property
    def problem(self) -> str | None:
        """What is wrong with how the run told of its failure; None if nothing is."""
        if self.status == 0:
            return None
        if self.status != 1:
            return f"status {self.status}"
        if any("Traceback" in line or "Exception ignored" in line for line in self.lines):
            return "a traceback: " + " / ".join(self.lines[-12:])[-1200:]
        if len(self.errors) != 1:
            return "not one line: " + " / ".join(self.lines[-6:])[-800:]
        return None


def run(
    job: str,
    output: Path,
    more: Sequence[str] = (),
    before: Callable[[Event], None] = lambda event: None,
    after: Callable[[Event], None] = lambda event: None,
) -> Ended:
    verb, flags = JOBS.get(job, QUICK)
    argv = [word for flag in (*FEW_ROWS, *SHORT, *flags) for word in flag.split()]
    counts, log = Counts(), output.parent.with_suffix(".log")
    log.unlink(missing_ok=True)

    def work() -> None:
        Watch(output, counts, before, after).install()
        VERBS[verb]([*argv, "--output_dir", str(output), *more])

    status = wait(fork(work, log, {}), PATIENCE)
    lines = log.read_text(errors="replace").splitlines()
    return Ended(status, [line for line in lines if line.strip()], {kind: counts[kind] for kind in KINDS})


@contextlib.contextmanager
def disk_of(directory: Path, size: int | None) -> Iterator[Callable[[], None]]:
    """Make a directory, on a file system of its own with so many bytes if a size is given.

    Yields:
        Makes the file system large.
    """
    directory.mkdir(parents=True)
    if size is None:
        yield lambda: None
        return

    def mount(options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)], check=True)

    mount(f"size={size}")
    try:
        yield lambda: mount("remount,size=256m")
    finally:
        subprocess.run(["umount", str(directory)], check=True)


class Baseline:
    """Undisturbed runs, and what they need."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._made: dict[str, tuple[Path, Ended, int]] = {}

    def of(self, job: str) -> tuple[Path, Ended, int]:
        """Return the output of a job, its events, and the bytes that it takes."""
        if job not in self._made:
            self._made[job] = self._make(job)
        return self._made[job]

    def _make(self, job: str) -> tuple[Path, Ended, int]:
        output = self.directory / f"whole {job}" / "run"
        output.parent.mkdir()
        ended = run(job, output)
        if ended.status:
            raise RuntimeError("\n".join(ended.lines[-20:]))
        return output, ended, sum(-(-path.stat().st_size // 4096) * 4096 for path in output.rglob("*"))


def try_case(case: Case, baseline: Baseline) -> dict[str, Any]:
    """Let it happen, resume, and return what was wrong."""
    whole, unbroken, needed = baseline.of(case.job)
    place = baseline.directory / str(case.number)
    size = max(1 << 14, int(case.share * 1.1 * needed)) if case.what == "full" else None
    with disk_of(place, size) as enlarge:
        output = place / "run"
        told: dict[str, Any]
        if case.what in DAMAGE:
            told = _damaged(case, output)
        elif case.what == "full":
            told = _told(run(case.job, output))
        else:
            told = _failing(case, unbroken, output)
        enlarge()
        before = last_complete_checkpoint(output) if output.exists() else None
        lost = [each.name for each in newest_first(output)] if output.exists() and before is None else []
        problems = [*told.pop("problems"), *(f"only damaged checkpoints: {lost}" for _ in lost[1:])]
        how = how_to_go_on(output)
        if how == ["clear"]:
            problems.append("a user has to clear the directory")
            shutil.rmtree(output)
            how = []
        again = run(case.job, output, how)
        if again.status:
            problems.append("not resumed: " + " / ".join(again.lines[-8:])[-1200:])
        else:
            problems += differences(whole, output)
        if (
            "wants" in told
            and how[:1] == ["--resume_from_checkpoint"]
            and not any(told["wants"] in line for line in again.lines)
        ):
            problems.append(f"not said: {told['wants']}")
        if not problems:
            shutil.rmtree(output)
    if not problems:
        place.rmdir()
    sound = {"from": " ".join(how[:1]) or "new", "checkpoint": before and Path(before).name}
    return {**vars(case), **told, **sound, "right": not problems, "problems": problems}


def _told(ended: Ended) -> dict[str, Any]:
    message = re.sub(r"/\S*/run\b", "RUN", " ".join(ended.errors))
    return {"status": ended.status, "said": message, "problems": [ended.problem] if ended.problem else []}


def _failing(case: Case, unbroken: Ended, output: Path) -> dict[str, Any]:
    """Run, with changes and writes that fail from some on."""
    number = ERRORS[case.what]
    total = unbroken.counts["change"] + unbroken.counts["write"]
    first, seen = 1 + int(case.share * total), 0

    def fail(event: Event) -> None:
        nonlocal seen
        seen += event.kind in ("change", "write")
        if event.kind in ("change", "write") and seen >= first:
            raise OSError(number, os.strerror(number), str(event.path))

    return {"at": first, "of": total, **_told(run(case.job, output, before=fail))}


def _damaged(case: Case, output: Path) -> dict[str, Any]:
    """Make a run, remove what it wrote after its last checkpoint, and damage that."""
    finished = run(case.job, output)
    for path in [*output.iterdir()]:
        if path.name.endswith(("_results.json", ".safetensors")) or path.name in ("trainer_state.json", "README.md"):
            path.unlink()
    checkpoint = newest_first(output)[0]
    files = files_to_check(checkpoint)
    path = files[int(case.file * len(files))]
    damage(path, case.what, case.share)
    flaw = flaw_in(checkpoint)
    name = path.relative_to(checkpoint).as_posix()
    told = {"damaged": name, "flaw": flaw, "problems": finished.lines[-3:] if finished.status else []}
    return told | ({} if flaw is None else {"wants": f"{checkpoint.name} is passed over: {flaw}"})


def damage(path: Path, how: str, share: float) -> None:
    """Damage a file, at a share of its length."""
    content = bytearray(path.read_bytes())
    at = int(share * len(content))
    if how == "missing":
        path.unlink()
        return
    if how == "cut":
        content = content[:at]
    elif how == "emptied":
        content = bytearray()
    elif how == "zeroed":
        content[at : at + 4096] = bytes(len(content[at : at + 4096]))
    else:
        content[at] ^= 1 << (len(content) % 8)
    path.write_bytes(content)


# ---- The campaign ----


def summary_of(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    damaged = [run for run in runs if run["what"] in DAMAGE]
    return {
        "runs": len(runs),
        "right": sum(run["right"] for run in runs),
        "by what happened": dict(Counter(run["what"] for run in runs)),
        "ended with one line": sum(run.get("status") == 1 for run in runs),
        "damage seen": f"{sum(run['flaw'] is not None for run in damaged)} of {len(damaged)}",
        "not seen": [f"{run['damaged']} {run['what']}" for run in damaged if run["flaw"] is None],
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parser_of(__doc__, 150, RESULTS).parse_args(argv)

    def told(run: dict[str, Any]) -> tuple[str, str]:
        verdict = "right" if run["right"] else " | ".join(run["problems"])
        return f"{run['job']}, {run['what']} {run['share']}: {verdict}", run.get("said") or run.get("flaw") or ""

    with tempfile.TemporaryDirectory() as directory:
        warm()
        baseline = Baseline(Path(directory).resolve())
        is_root = os.getuid() == 0
        return carry_on(
            args, lambda number: try_case(draw(args.seed, number, is_root), baseline), "right", told, summary_of
        )


if __name__ == "__main__":
    main()
