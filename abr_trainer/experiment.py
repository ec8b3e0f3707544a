"""Run every arm of a comparison with every seed, each run in a process of its own, and no run twice."""

from __future__ import annotations

import contextlib
import fcntl
import inspect
import itertools
import json
import multiprocessing
import os
import re
import shlex
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from .processes import Forked, Launched, Process
from .records import PROVENANCE, RESULTS, TRACE_NAME, last_complete_checkpoint
from .schedulers import SCHEDULERS, find_repeat_scheduler, get_repeat_scheduler

STACK = [f"abr_trainer.{name}" for name in ("command_line", "config", "data", "modeling", "trainer")]
"""What a process is to have imported before runs are forked from it: all that takes long."""

OF_THE_COMPARISON = {
    "--repeat_scheduler": "--schedulers",
    "--repeat_scheduler_kwargs": "--schedulers name:parameter=value",
    "--seed": "--seeds",
    "--output_dir": "--out",
    "--resume_from_checkpoint": "the same command once more, which resumes by itself",
    "--overwrite_output_dir": "another --out",
    "--push_to_hub": "a run of its own: every run of a comparison would push",
}

SAVING = ("--save_strategy", "--save_steps", "--save_total_limit")


class RunFailed(RuntimeError):
    """A run of the comparison ended with an error."""


# ---- What is compared ----


@dataclass(frozen=True)
class Arm:
    """One of the alternatives that are compared.

    Attributes:
        name: As typed; stands in tables and pictures.
        flags: What it adds to the command line.
        control_of: The name of the arm whose mean repeats this one spends without looking at anything.
    """

    name: str
    flags: tuple[str, ...]
    control_of: str | None = None

    @property
    def folder(self) -> str:
        return re.sub(r"[^\w.=-]+", "-", self.name).strip("-")


def parse_arm(text: str, control_of: str | None = None) -> Arm:
    """Parse `name`, `name:value`, `name:parameter=value,...` or `module:Class:parameter=value,...`.

    A bare value goes to the first parameter of the rule. A parameter that the rule does not have is a flag of the
    script, without its dashes.

    Raises:
        ValueError: There is no such rule, or it does not take the value.

    >>> parse_arm("abr:loss_threshold=2.0,skip_outliers=none").flags[2:]
    ('--repeat_scheduler_kwargs', '{"loss_threshold": 2.0}', '--skip_outliers', 'none')
    """
    pieces = text.split(":")
    is_own = len(pieces) > 1 and pieces[0] not in SCHEDULERS
    name, settings = ":".join(pieces[: 1 + is_own]), ":".join(pieces[1 + is_own :])
    takes = [] if name == "baseline" else list(inspect.signature(find_repeat_scheduler(name)).parameters)
    parameters: dict[str, Any] = {}
    flags: list[str] = []
    for setting in filter(None, settings.split(",")):
        key, has_key, value = setting.partition("=")
        if not has_key:
            if not takes:
                raise ValueError(f"--schedulers {text}: {name} has no parameter that could be {setting}.")
            key, value = takes[0], setting
        if key in takes:
            parameters[key] = _as_json(value)
        else:
            flags += [f"--{key}", value]
    if parameters:
        get_repeat_scheduler(name, **parameters)
        flags = ["--repeat_scheduler_kwargs", json.dumps(parameters), *flags]
    return Arm(text, ("--repeat_scheduler", name, *flags), control_of)


def _as_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


@dataclass(frozen=True)
class Run:
    """One training of the comparison.

    Attributes:
        argv: What the script gets; `--output_dir` and what resumes it come on top.
        tuned: The values of the tuned parameters, by flag without dashes.
    """

    arm: Arm
    seed: int
    directory: Path
    argv: tuple[str, ...]
    tuned: tuple[tuple[str, str], ...] = ()

    @property
    def title(self) -> str:
        return " ".join([self.arm.name, *(f"{name} {value}" for name, value in self.tuned), f"seed {self.seed}"])

    @property
    def log(self) -> Path:
        return self.directory.with_name(self.directory.name + ".log")

    @property
    def wanted_metrics(self) -> list[str]:
        wanted = ["train_passes", "eval_perplexity"]
        return [*wanted, "test_perplexity"] if _is_on("--do_predict", given_flags(self.argv)) else wanted

    def results(self) -> dict[str, float] | None:
        """Return what the finished run has reached, or None if it is not finished.

        Raises:
            ValueError: The directory holds a run with other arguments.
        """
        provenance = _read_json(self.directory / PROVENANCE)
        if provenance is None:
            return None
        if (before := _own_arguments(provenance["argv"][1:])) != (now := list(self.argv)):
            changed = [f"{old} -> {new}" for old, new in itertools.zip_longest(before, now) if old != new]
            raise ValueError(
                f"{self.directory} holds a run with other arguments ({', '.join(changed[:3])}). "
                "Give another --out, or remove that directory."
            )
        results = _read_json(self.directory / RESULTS)
        return results if results and all(name in results for name in self.wanted_metrics) else None

    def arguments(self) -> list[str]:
        """Return the whole command line of the script, to begin the run or to go on with it."""
        arguments = [*self.argv, "--output_dir", str(self.directory)]
        if last_complete_checkpoint(self.directory):
            arguments += ["--resume_from_checkpoint", "true"]
        elif self.directory.exists() and any(self.directory.iterdir()):
            arguments.append("--overwrite_output_dir")
        return arguments


def _own_arguments(argv: list[str]) -> list[str]:
    """Leave out of a command line what `Run.arguments` adds."""
    return argv[: argv.index("--output_dir")] if "--output_dir" in argv else argv


def _read_json(path: Path) -> Any:
    """Return what a JSON file holds, or None if it is missing or half-written."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def given_flags(argv: Sequence[str]) -> dict[str, list[str]]:
    """Return the flags of a command line with their values, those in a file of flags at its beginning among them."""
    flags: dict[str, list[str]] = {}
    if argv and Path(argv[0]).suffix in (".yaml", ".yml", ".json"):
        with contextlib.suppress(OSError, yaml.YAMLError, AttributeError):  # the script will say what is wrong
            for name, value in yaml.safe_load(Path(argv[0]).read_text(encoding="utf-8")).items():
                flags[f"--{name}"] = [str(item) for item in (value if isinstance(value, list) else [value])]
    values: list[str] = []
    for argument in argv:
        if argument.startswith("--"):
            name, has_value, value = argument.partition("=")
            values = flags[name] = [value] if has_value else []
        else:
            values.append(argument)
    return flags


def asks_to_save(rest: Sequence[str]) -> bool:
    """Tell whether these arguments say when to save: then the checkpoints are wanted for themselves."""
    return not given_flags(rest).keys().isdisjoint(SAVING)


def parse_tuning(settings: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """Parse what `--tune FLAG VALUE ...` was given, each time.

    >>> parse_tuning([["learning_rate", "1e-4", "1e-3"]])
    {'learning_rate': ['1e-4', '1e-3']}
    """
    for name, *values in settings:
        if not values:
            raise ValueError(f"--tune {name} needs values to try, e.g. --tune {name} 1e-4 1e-3.")
    return {name.removeprefix("--"): values for name, *values in settings}


def _is_on(flag: str, flags: dict[str, list[str]]) -> bool:
    return flag in flags and flags[flag] not in (["false"], ["False"], ["no"], ["0"])


def complete_flags(rest: Sequence[str], match: str, evaluations: int) -> list[str]:
    """Return the flags that all runs share: those given, and what a comparison needs where nothing else is said.

    Args:
        rest: Arguments of `run_clm_abr.py`.
        match: "passes" or "batches": what is to be equal between runs.
        evaluations: How often to evaluate in the course of a run, at equal distances on that clock.

    Raises:
        ValueError: An argument is not for one run to decide, or what is to be equal is not given.
    """
    given = given_flags(rest)
    if evaluations < 1:
        raise ValueError(f"--evaluations must be at least 1, got {evaluations}.")
    for flag, instead in OF_THE_COMPARISON.items():
        if flag in given:
            raise ValueError(f"{flag} is not for the runs to decide. Use {instead}.")
    if match == "passes" and "--max_passes" not in given:
        raise ValueError("--match passes needs the budget of each run: give --max_passes N after the --.")
    for flag in ("--max_steps",) if match == "passes" else ("--max_passes",):
        if flag in given:
            raise ValueError(f"--match {match} leaves no room for {flag}: runs would end before what is matched.")
    added = [] if "--do_train" in given else ["--do_train"]
    added += [] if "--do_eval" in given else ["--do_eval"]
    has_test = "--test_file" in given or not {"--train_file", "--validation_file"} & given.keys()
    if "--do_predict" not in given and has_test and given.get("--dataset_name") != ["c4"]:
        added.append("--do_predict")
    if not {"--eval_strategy", "--eval_steps", "--eval_passes", "--load_best_model_at_end"} & given.keys():
        share = str(round(1 / evaluations, 4))
        added += ["--eval_passes", share] if match == "passes" else ["--eval_strategy", "steps", "--eval_steps", share]
    added += [] if "--eval_on_start" in given else ["--eval_on_start"]
    if not asks_to_save(rest):
        added += ["--save_strategy", "steps", "--save_steps", "0.1", "--save_total_limit", "1"]
    added += [] if "--report_to" in given else ["--report_to", "none"]
    added += [] if "--disable_tqdm" in given else ["--disable_tqdm", "true"]
    return [*rest, *added]


@dataclass
class Experiment:
    """A comparison as asked for.

    Attributes:
        out: Directory of all runs and of the report.
        script: The script that each run is.
        flags: Arguments of the script that all runs share, complete.
        match: What the runs have in common: "passes" or "batches".
        reference: Name of the arm that the others are compared with; empty for the baseline, or the first.
        tune: Values to try, by flag without dashes.
        tune_seeds: Seeds to choose the values by.
        launcher: What starts the script, e.g. `accelerate launch`; empty for one process.
        jobs: Runs at a time.
        keep_going: Leave out runs that fail, instead of stopping.
        keeps_checkpoints: They are wanted for themselves. Else they are there to resume by, and go when a run is
            finished.
    """

    out: Path
    script: Path
    arms: list[Arm]
    seeds: list[int]
    flags: list[str]
    match: str = "passes"
    reference: str = ""
    tune: dict[str, list[str]] = field(default_factory=dict)
    tune_seeds: list[int] = field(default_factory=list)
    launcher: str = ""
    jobs: int = 1
    keep_going: bool = False
    keeps_checkpoints: bool = False
    failures: dict[Run, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [arm.folder for arm in self.arms]
        if twice := next((arm.name for arm in self.arms if names.count(arm.folder) > 1), None):
            raise ValueError(f"--schedulers {twice} stands there twice, or goes by the same directory as another one.")
        if self.reference and self.reference not in [arm.name for arm in self.arms]:
            raise ValueError(f"--reference {self.reference} is none of --schedulers.")
        if not self.reference:
            baselines = [arm.name for arm in self.arms if arm.flags[1] == "baseline"]
            self.reference = (baselines or [self.arms[0].name])[0]
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"--seeds must be one number above 0, or several different ones, got {self.seeds}.")
        if self.jobs < 1:
            raise ValueError(f"--jobs must be at least 1, got {self.jobs}.")
        if self.jobs > 1 and self.launcher:
            raise ValueError("--jobs does not go with --launcher, which takes all devices for one run.")
        if self.tune and not self.tune_seeds:
            raise ValueError("--tune_seeds must be at least 1.")

    @property
    def candidates(self) -> list[tuple[tuple[str, str], ...]]:
        """All combinations of the values to tune; one empty combination where nothing is tuned."""
        return [tuple(zip(self.tune, values, strict=True)) for values in itertools.product(*self.tune.values())]

    def run_of(self, arm: Arm, seed: int, tuned: tuple[tuple[str, str], ...] = ()) -> Run:
        folder = [f"{name}={value}" for name, value in tuned]
        flags = [part for name, value in tuned for part in (f"--{name}", value)]
        return Run(
            arm,
            seed,
            self.out.joinpath("runs", arm.folder, *folder, f"seed-{seed}"),
            (*self.flags, *arm.flags, *flags, "--seed", str(seed)),
            tuned,
        )

    def tuning_runs(self, arms: Iterable[Arm]) -> list[Run]:
        """Return what has to run before the values of these arms can be chosen."""
        return [self.run_of(arm, seed, tuned) for seed in self.tune_seeds for tuned in self.candidates for arm in arms]

    def chosen(self, arm: Arm) -> tuple[tuple[str, str], ...]:
        """Return the candidate of the lowest mean validation perplexity."""

        def mean(tuned: tuple[tuple[str, str], ...]) -> float:
            runs = [self.run_of(arm, seed, tuned) for seed in self.tune_seeds]
            reached = [results["eval_perplexity"] for run in runs if (results := self.results(run))]
            total = sum(reached) / len(reached) if reached else float("inf")
            return total if total == total else float("inf")

        return self.candidates[0] if len(self.candidates) == 1 else min(self.candidates, key=mean)

    def results(self, run: Run) -> dict[str, float] | None:
        """Return what a run has reached; None if it is not finished or has failed."""
        return None if run in self.failures else run.results()

    def final_runs(self, arms: Iterable[Arm]) -> list[Run]:
        """Return the runs that the comparison is made of, one seed of all arms after the other."""
        chosen = {arm.name: self.chosen(arm) for arm in arms}
        return [self.run_of(arm, seed, chosen[arm.name]) for seed in self.seeds for arm in arms]

    def controls(self) -> list[Arm]:
        """Return two controls for each arm that decides: one spreads the same mean repeats evenly, one at random.

        Batches that are skipped are left out of the mean: the controls skip by the same rule.
        """
        controls: dict[str, Arm] = {}
        for arm in self.arms:
            if arm.flags[1] in ("baseline", "fixed", "random"):
                continue
            finished = [results for run in self.final_runs([arm]) if (results := self.results(run))]
            kept = sum(results["train_batches"] - results["train_skips"] for results in finished)
            mean = round(sum(results["train_updates"] for results in finished) / kept, 2) if kept else 1.0
            if mean <= 1:
                continue
            most = max(5, -int(-mean // 1))
            shared = arm.flags[2 + 2 * ("--repeat_scheduler_kwargs" in arm.flags) :]
            settings = "".join(f",{shared[i][2:]}={shared[i + 1]}" for i in range(0, len(shared), 2))
            for text in (f"fixed:{mean:g}", f"random:mean_repeats={mean:g}" + f",max_repeats={most}" * (most > 5)):
                controls.setdefault(text + settings, parse_arm(text + settings, control_of=arm.name))
        existing = {arm.name for arm in self.arms}
        return [arm for name, arm in controls.items() if name not in existing]

    # ---- Carrying it out ----

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second comparison out of the directory, for as long as this process lives.

        Raises:
            ValueError: Another one is at work there.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        with open(self.out / ".lock", "w", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f"Another comparison is running in {self.out}.") from None
            yield

    def carry_out_all(self, with_controls: bool) -> None:
        """Run everything: what values are chosen by, the arms with the chosen ones, and the controls of these arms.

        Raises:
            RunFailed: A run has failed, unless `keep_going`.
            ValueError: The script would not take the arguments.
        """
        self._facts = self._prepare()
        with contextlib.closing(Progress(self._facts)) as progress:
            self._stage(self.arms, progress)
            if with_controls:
                controls = self.controls()
                self.arms += controls
                self._stage(controls, progress)

    def _stage(self, arms: list[Arm], progress: Progress) -> None:
        if self.tune:
            self.carry_out(self.tuning_runs(arms), progress)
        self.carry_out(self.final_runs(arms), progress)

    def carry_out(self, runs: list[Run], progress: Progress) -> None:
        """Run what is not finished. On an error or an interrupt, end what is running: it can be resumed.

        Raises:
            RunFailed: A run has failed, unless `keep_going`.
        """
        pending = deque(run for run in runs if self.results(run) is None and run not in self.failures)
        progress.expect(runs, len(pending))
        active: dict[int, tuple[Run, Process, Any]] = {}
        try:
            while pending or active:
                for slot in range(self.jobs):
                    if pending and slot not in active:
                        run = pending.popleft()
                        active[slot] = (run, self._start(run, slot), time.monotonic())
                time.sleep(0.05)
                for slot, (run, process, started) in list(active.items()):
                    status = process.poll()
                    if status is None:
                        progress.is_at(run)
                        continue
                    del active[slot]
                    self._finish(run, status, time.monotonic() - started, progress)
        finally:
            for _, process, _ in active.values():
                process.terminate()
            for _, process, _ in active.values():
                process.wait()

    def _finish(self, run: Run, status: int, seconds: float, progress: Progress) -> None:
        results = run.results() if status == 0 else None
        if results is None:
            reason = f"{run.title} failed with exit status {status}: {_last_line(run.log)} Its log: {run.log}"
            if not self.keep_going:
                raise RunFailed(f"{reason}. The same command goes on; --keep-going leaves such runs out.")
            self.failures[run] = reason
            progress.finish(run, reason)
            return
        if not self.keeps_checkpoints:
            for checkpoint in run.directory.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
        metrics = [f"{name.partition('_')[0]} {results[name]:.3f}" for name in run.wanted_metrics[1:]]
        spent = f"{results['train_passes']:g} passes, {results['train_updates']:g} updates, {seconds:.0f} s"
        progress.finish(run, f"{run.title}: perplexity {', '.join(metrics)}; {spent}")

    def _prepare(self) -> dict[str, Any]:
        """Check the arguments of all arms before the first run, in a process of its own.

        Returns:
            What the runs will be: `device`, `devices` (how many GPUs), `max_passes`, `max_steps`, `epochs`.

        Raises:
            ValueError: The script would not take them.
        """
        if self.jobs > 1:
            share = max(1, len(os.sched_getaffinity(0)) // self.jobs)
            os.environ.setdefault("OMP_NUM_THREADS", str(share))
        self._stack = multiprocessing.get_context("forkserver")
        self._stack.set_forkserver_preload(STACK)
        arguments = [list(self.run_of(arm, self.seeds[0], self.candidates[0]).argv) for arm in self.arms]
        with ProcessPoolExecutor(1, mp_context=self._stack) as pool:
            facts: dict[str, Any] = pool.submit(_parse_all, arguments).result()
        return facts

    def _start(self, run: Run, slot: int) -> Process:
        run.directory.parent.mkdir(parents=True, exist_ok=True)
        if not self.launcher and self._facts["device"] == "cpu":
            return Forked(self._stack, self.script, run.arguments(), run.log)
        environment = dict(os.environ)
        if self.jobs > 1 and self._facts["devices"] > 1:
            environment["CUDA_VISIBLE_DEVICES"] = device_of(slot, self._facts["devices"])
        launcher = shlex.split(self.launcher) or [sys.executable]
        return Launched([*launcher, str(self.script), *run.arguments()], environment, run.log)


def _parse_all(arguments: list[list[str]]) -> dict[str, Any]:
    """Parse these command lines as the script does, and tell what the first of them asks for."""
    from .command_line import parse_arguments
    from .config import ABRConfig
    from .data import DataArguments
    from .modeling import ModelArguments

    parsed = [parse_arguments((ModelArguments, DataArguments, ABRConfig), argv)[-1] for argv in arguments]
    first: ABRConfig = parsed[0]
    return {
        "device": first.device.type,
        "devices": _visible_gpus(),
        "max_passes": first.max_passes,
        "max_steps": first.most_batches,
        "epochs": first.num_train_epochs,
    }


def device_of(slot: int, devices: int) -> str:
    """Return which of the visible GPUs the runs of a slot use.

    >>> [device_of(slot, devices=2) for slot in range(3)]
    ['0', '1', '0']
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(devices)))).split(",")
    return visible[slot % len(visible)]


def _visible_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "it said nothing."


# ---- Progress ----


class Progress:
    """A bar over all runs that moves within each of them, and a line for each run that ends."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self._facts = facts
        bar_format = "{l_bar}{bar}| {n:.1f}/{total} runs, {remaining} left"
        self._bar: tqdm[Any] = tqdm(total=0, disable=None, bar_format=bar_format)
        self._done = self._total = 0
        self._looked: dict[Path, float] = {}
        self._shares: dict[Path, float] = {}
        self._seen: set[Path] = set()

    def expect(self, runs: list[Run], pending: int) -> None:
        """Take these runs into account, all but `pending` of them finished before."""
        new = [run for run in runs if run.directory not in self._seen]
        self._seen.update(run.directory for run in new)
        self._total += min(pending, len(new))
        self._bar.total = self._total
        self._bar.refresh()
        if kept := len(new) - min(pending, len(new)):
            tqdm.write(f"{kept} finished runs are kept")

    def is_at(self, run: Run) -> None:
        """Look up how far a run has come, at most once a second."""
        if time.monotonic() - self._looked.get(run.directory, 0) < 1:
            return
        self._looked[run.directory] = time.monotonic()
        self._shares[run.directory] = share_done(run.directory / TRACE_NAME, self._facts)
        self._show()

    def finish(self, run: Run, line: str) -> None:
        self._shares.pop(run.directory, None)
        self._done += 1
        tqdm.write(f"[{self._done}/{self._total}] {line}")
        self._show()

    def _show(self) -> None:
        self._bar.update(self._done + sum(self._shares.values()) - self._bar.n)

    def close(self) -> None:
        self._bar.close()


def share_done(trace: Path, facts: dict[str, Any]) -> float:
    """Return the share of a run that is behind it, by the last line of its trace."""
    try:
        with open(trace, "rb") as file:
            file.seek(max(0, trace.stat().st_size - 4096))
            line = json.loads(file.read().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return 0.0
    if facts["max_passes"]:
        share = line["passes"] / facts["max_passes"]
    elif facts["max_steps"] > 0:
        share = line["step"] / facts["max_steps"]
    else:
        share = (line["epoch"] or 0.0) / facts["epochs"]
    return min(1.0, float(share))
