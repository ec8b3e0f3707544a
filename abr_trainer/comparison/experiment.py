"""Run every arm of a comparison with every seed, each run in a separate process, without repeating finished runs."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import multiprocessing
import os
import shlex
import shutil
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..records.commands import arguments_in, as_module
from ..records.errors import Failure, refuse_below
from ..records.files import (
    PROVENANCE,
    RESULTS,
    TRAINER_STATE,
    is_unused,
    last_complete_checkpoint,
    read_json,
    write_whole,
)
from ..records.flags import budget_in, given_flags, is_on, refuse, without_flags
from ..records.locking import locked
from .arms import Arm, quoted
from .processes import Forked, Launched, Process, start_quietly
from .progress import Progress
from .scores import SCORES, SPLITS, Score, main_metric, metrics_in, score_of

EXPERIMENT = "experiment.json"

CHANGE_NO_TRAINING = {"--sample_prompts"}
"""Flags in which a finished run may differ: an earlier version did not add them."""

Check = Callable[[str, list[list[str]], Any], None]
"""Takes a module, command lines, and the end of a pipe to send the result to."""

Values = tuple[tuple[str, str], ...]
"""A value for each tuned flag, by its name without dashes."""


class RunFailed(Failure):
    """A run of the comparison ended with an error."""


@dataclass(frozen=True)
class Run:
    """One training of the comparison.

    Attributes:
        argv: The arguments of the run, without `--output_dir` and arguments to resume it.
        varied: What the comparison varies: "scheduler" or "prompt".
    """

    arm: Arm
    seed: int
    directory: Path
    argv: tuple[str, ...]
    tuned: Values = ()
    varied: str = "scheduler"

    @property
    def title(self) -> str:
        return " ".join(
            [quoted(self.arm.name), *(f"{name} {value}" for name, value in self.tuned), f"seed {self.seed}"]
        )

    @property
    def log(self) -> Path:
        return self.directory.with_name(self.directory.name + ".log")

    @property
    def parts(self) -> list[str]:
        """Prefixes of the results that a finished run must have. A test split without labels has no scores."""
        return ["train_passes", "eval_", *(["test_"] if is_on("--do_predict", given_flags(self.argv)) else [])]

    def results(self) -> dict[str, float] | None:
        """Return the results of the finished run; None if it is not finished.

        Raises:
            ValueError: The directory contains a run with other arguments.
        """
        provenance = read_json(self.directory / PROVENANCE)
        if provenance is None:
            return None
        before, now = given_flags(_own_arguments(arguments_in(provenance["argv"]))), given_flags(self.argv)
        flags = [flag for flag in {**before, **now} if flag not in CHANGE_NO_TRAINING]
        differing = [flag for flag in flags if before.get(flag) != now.get(flag)]
        if changed := [flag for flag in differing if self.arm.reads(flag[2:], self.argv)]:
            each = [f"{flag}: {_values(before.get(flag))} -> {_values(now.get(flag))}" for flag in changed[:3]]
            raise ValueError(
                f"{self.directory} contains a run with other arguments ({', '.join(each)}). "
                "Give another --out, or remove that directory."
            )
        results: dict[str, float] = read_json(self.directory / RESULTS) or {}
        is_finished = (self.directory / TRAINER_STATE).exists() and all(
            any(name.startswith(part) for name in results) for part in self.parts
        )
        return results if is_finished and metrics_in(results, self.varied) else None

    def arguments(self) -> list[str]:
        """Return all arguments to start or to resume the run."""
        arguments = [*self.argv, "--output_dir", str(self.directory)]
        if last_complete_checkpoint(self.directory):
            arguments += ["--resume_from_checkpoint", "true"]
        elif not is_unused(self.directory):
            arguments.append("--overwrite_output_dir")
        return arguments


def _own_arguments(argv: list[str]) -> list[str]:
    """Remove from a command line the arguments that `Run.arguments` adds."""
    return argv[: argv.index("--output_dir")] if "--output_dir" in argv else argv


def _values(values: list[str] | None) -> str:
    return "not given" if values is None else " ".join(values) or "given"


@dataclass
class Experiment:
    """A comparison: its arms, seeds and runs.

    Attributes:
        out: Directory for all runs and the report.
        module: The module that each run executes, as `python -m` does.
        flags: All arguments that the runs share.
        varied: What the arms vary: "scheduler" or "prompt".
        match: What is equal for all runs: "passes", "seconds" or "batches".
        reference: Name of the arm that the others are compared with. Empty for the arm without what is varied
            (baseline or none), or else the first.
        tune: Values to try, by flag without dashes.
        tune_seeds: Seeds of the runs that choose these values.
        launcher: Command that starts the module, e.g. `accelerate launch`; empty for one process.
        jobs: Number of runs at a time.
        keep_going: Leave out runs that fail, instead of stopping.
        keeps_checkpoints: Keep the checkpoints of finished runs. By default they are removed, because they only serve
            to resume a run.
        check: Called in a separate process. Sends the settings in the first of these command lines: `device`,
            `devices` (number of GPUs), `max_passes`, `max_seconds`, `max_steps` and `epochs`; or a ValueError.
            `prepare` needs it.
        preload: Slow modules to import once in the process from which runs are forked.
        controlled: Pairs of names: an arm that decides, and a control with the same mean number of repeats.
        failures: Error of each failed run.
    """

    out: Path
    module: str
    arms: list[Arm]
    seeds: list[int]
    flags: list[str]
    varied: str = "scheduler"
    match: str = "passes"
    reference: str = ""
    tune: dict[str, list[str]] = field(default_factory=dict)
    tune_seeds: list[int] = field(default_factory=list)
    launcher: str = ""
    jobs: int = 1
    keep_going: bool = False
    keeps_checkpoints: bool = False
    check: Check | None = None
    preload: Sequence[str] = ()
    controlled: list[tuple[str, str]] = field(default_factory=list)
    failures: dict[Run, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [arm.folder for arm in self.arms]
        if twice := next((arm.name for arm in self.arms if names.count(arm.folder) > 1), None):
            raise ValueError(
                f"{self.option} has {twice} twice, or another one with the same directory name. Remove or rename one."
            )
        for arm in self.arms if self.varied == "scheduler" else []:
            self._refuse(arm.flags, f"{self.option} {arm.name}: ")
        for name, values in self.tune.items():
            for value in values:
                self._refuse([f"--{name}", value], "--tune: ")
        if self.reference and self.reference not in [arm.name for arm in self.arms]:
            raise ValueError(f"--reference {self.reference} must be one of {self.option}.")
        if not self.reference:
            self.reference = next((arm.name for arm in self.arms if self._is_plain(arm)), self.arms[0].name)
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"--seeds must be one number above 0, or several different numbers, got {self.seeds}.")
        refuse_below(self, {"jobs": 1})
        if self.jobs > 1 and self.launcher:
            raise ValueError("--jobs cannot be used with --launcher, which uses all devices for one run.")
        if self.jobs > 1 and self.match == "seconds":
            raise ValueError(
                f"--jobs {self.jobs} cannot be used with --match seconds: runs at the same time slow each other down."
            )
        if self.tune and not self.tune_seeds:
            raise ValueError("--tune_seeds must be at least 1.")
        self._seen: set[Path] = set()

    @property
    def option(self) -> str:
        return f"--{self.varied}s"

    def _is_plain(self, arm: Arm) -> bool:
        return arm.name == "none" if self.varied == "prompt" else arm.rule == "baseline"

    def _refuse(self, flags: Iterable[str], where: str) -> None:
        """Refuse flags that an arm may not set. Its budget may be lower than that of the others."""
        refuse(flags, where, budget=budget_in(self.flags, self.match), varied=self.varied)

    # ---- Runs and their results ----

    def candidates(self, arm: Arm) -> list[Values]:
        """Return all combinations of values to tune for an arm; one empty combination if there are none."""
        tune = {name: values for name, values in self.tune.items() if arm.leaves_open(name, self.flags)}
        return [tuple(zip(tune, values, strict=True)) for values in itertools.product(*tune.values())]

    def flags_of(self, arm: Arm) -> list[str]:
        """Return the flags that all runs share, without those that are for the rules of other arms.

        What no arm reads stays: a run refuses it.
        """
        others = {
            flag
            for flag in given_flags(self.flags)
            if not arm.reads(flag[2:], self.flags) and any(other.reads(flag[2:], self.flags) for other in self.arms)
        }
        return without_flags(self.flags, others)

    def run_of(self, arm: Arm, seed: int, tuned: Values = ()) -> Run:
        folder = [f"{name}={value}" for name, value in tuned]
        flags = [part for name, value in tuned for part in (f"--{name}", value)]
        argv = (part.replace("{seed}", str(seed)) for part in (*self.flags_of(arm), *arm.arguments, *flags))
        return Run(
            arm,
            seed,
            self.out.joinpath("runs", arm.folder, *folder, f"seed-{seed}"),
            (*argv, "--seed", str(seed)),
            tuned,
            self.varied,
        )

    def results(self, run: Run) -> dict[str, float] | None:
        """Return the results of a run; None if it is not finished or has failed."""
        return None if run in self.failures else run.results()

    def tuning_runs(self, arms: Iterable[Arm]) -> list[Run]:
        """Return the runs that are needed to choose the values of these arms."""
        tried = [(arm, tuned) for arm in arms for tuned in self.candidates(arm) if tuned]
        return [self.run_of(arm, seed, tuned) for seed in self.tune_seeds for arm, tuned in tried]

    def score(self, runs: Iterable[Run]) -> Score:
        """Return the score to compare these runs by: the first of `SCORES` that a finished run has."""
        return score_of(main_metric({name for run in runs for name in self.results(run) or ()}, self.varied))

    def tried(self, arm: Arm) -> dict[Values, float]:
        """Return the mean validation score of each candidate; the worst possible if one of its runs is missing or
        diverged.
        """
        runs = {tuned: [self.run_of(arm, seed, tuned) for seed in self.tune_seeds] for tuned in self.candidates(arm)}
        score = self.score(run for some in runs.values() for run in some)
        means = {}
        for tuned, some in runs.items():
            values = [(self.results(run) or {}).get(f"eval_{score.name}", score.worst) for run in some]
            means[tuned] = statistics.fmean(values) if all(map(math.isfinite, values)) else score.worst
        return means

    def chosen(self, arm: Arm) -> Values:
        """Return the candidate with the best mean validation score."""
        first, *others = self.candidates(arm)
        if not others:
            return first
        tried = self.tried(arm)
        best = min if SCORES[self.varied][0].lower_is_better else max
        return best(tried, key=tried.__getitem__)

    def final_runs(self, arms: Iterable[Arm]) -> list[Run]:
        """Return the runs of the comparison, ordered by seed and then by arm."""
        chosen = {arm: self.chosen(arm) for arm in arms}
        return [self.run_of(arm, seed, chosen[arm]) for seed in self.seeds for arm in chosen]

    def add_controls(self) -> list[Arm]:
        """Add two controls with the same mean number of repeats for each arm that decides, and return the added arms.

        Skipped batches are left out of the mean, because the controls skip by the same rule. The mean is measured
        once, so that seeds added later get the same controls.
        """
        means: dict[str, float] = self._recorded().get("mean_repeats", {})
        states_most = "max_repeats" in self.tune or "--max_repeats" in given_flags(self.flags)
        added = []
        for arm in [arm for arm in self.arms if arm.decides]:
            key = shlex.join(self.run_of(arm, 0, self.chosen(arm)).argv[:-2])  # without the seed
            mean = means.get(key) or self._mean_repeats(arm)
            if mean is None or mean <= 1:
                continue
            means[key] = mean
            for control in arm.controls(mean, states_most):
                self.controlled.append((arm.name, control.name))
                if control.name not in [each.name for each in self.arms]:
                    self.arms.append(control)
                    added.append(control)
        self._record({"mean_repeats": means})
        return added

    def _mean_repeats(self, arm: Arm) -> float | None:
        finished = [results for run in self.final_runs([arm]) if (results := self.results(run))]
        kept = sum(results["train_batches"] - results["train_skips"] for results in finished)
        return round(sum(results["train_updates"] for results in finished) / kept, 2) if kept else None

    # ---- The directory ----

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the directory against other comparisons, until this process and those that it launched have ended.

        Raises:
            ValueError: Another comparison is running there, or its runs had another launcher or another command.
        """
        with locked(self.out, "--out") as self._lock:
            before = self._recorded().get("launcher", self.launcher)
            if before != self.launcher:
                raise ValueError(
                    f"--launcher {self.launcher or '(none)'}: the runs in {self.out} were started with "
                    f"{before or 'none'}. Give another --out."
                )
            module = self._recorded().get("module", self.module)
            if module != self.module:
                raise ValueError(
                    f"The runs in {self.out} are of {module}, but these are of {self.module}. Give another --out."
                )
            yield

    def _recorded(self) -> dict[str, Any]:
        return read_json(self.out / EXPERIMENT) or {}

    def _record(self, facts: dict[str, Any]) -> None:
        write_whole(self.out / EXPERIMENT, json.dumps(self._recorded() | facts, indent=1) + "\n")

    # ---- Running ----

    def prepare(self) -> None:
        """Check the arguments of all arms before the first run, in a separate process.

        Raises:
            ValueError: A run would not accept them.
        """
        if self.jobs > 1:
            share = max(1, len(os.sched_getaffinity(0)) // self.jobs)
            os.environ.setdefault("OMP_NUM_THREADS", str(share))
        for name in self.tune:
            if not any(arm.leaves_open(name, self.flags) for arm in self.arms):
                arms = " ".join(arm.name for arm in self.arms)
                raise ValueError(f"--tune {name}: of {self.option} {arms} none has a use for it, or all set it.")
        assert self.check is not None
        self._stack = multiprocessing.get_context("forkserver")
        self._stack.set_forkserver_preload(list(self.preload))
        arguments = [
            list(self.run_of(arm, self.seeds[0], tuned).argv) for arm in self.arms for tuned in self.candidates(arm)
        ]
        start_quietly()
        receiver, sender = self._stack.Pipe(duplex=False)
        process = self._stack.Process(target=self.check, args=(self.module, arguments, sender), daemon=True)
        process.start()
        sender.close()
        try:
            found = receiver.recv()
        except EOFError:
            raise RunFailed("The process that checks the arguments failed; see its messages above.") from None
        finally:
            process.kill()
        if isinstance(found, ValueError):
            raise found
        self._facts: dict[str, Any] = found
        self._check_rules()
        self._record({"launcher": self.launcher, "module": self.module})

    def _check_rules(self) -> None:
        """Refuse to continue if the code of the user's own rule has changed, or a trace: runs would use two versions.

        Raises:
            ValueError: The file of a rule has changed since its first run.
        """
        before: dict[str, str] = self._recorded().get("rules", {})
        names = {arm: arm.name if arm.rule == "follow" else arm.rule for arm in self.arms}
        now = {names[arm]: fingerprint for arm in self.arms if (fingerprint := arm.fingerprint)}
        for arm, name in names.items():
            folder = self.out / "runs" / arm.folder
            if folder.exists() and before.get(name, now.get(name)) != now.get(name):
                what = "trace" if arm.rule == "follow" else "code"
                raise ValueError(f"The {what} of {name} has changed. Give another --out, or remove {folder}.")
        self._record({"rules": before | now})

    def carry_out(self, with_controls: bool) -> None:
        """Run everything: the tuning runs, the arms with the chosen values, and the controls of these arms.

        Raises:
            RunFailed: A run has failed, unless `keep_going`.
            ValueError: A directory contains a run with other arguments.
        """
        with contextlib.closing(Progress(self._facts)) as progress:
            self._stage(self.arms, progress)
            if with_controls:
                self._stage(self.add_controls(), progress)

    def _stage(self, arms: list[Arm], progress: Progress) -> None:
        self._run_all(self.tuning_runs(arms), progress)
        self._run_all(self.final_runs(arms), progress)

    def _run_all(self, runs: list[Run], progress: Progress) -> None:
        """Run those that are not finished. On an error or an interrupt, end the active runs; they can be resumed."""
        new = [run for run in runs if run.directory not in self._seen]
        self._seen.update(run.directory for run in new)
        kept = [run for run in new if self.results(run)]
        pending = deque(run for run in new if run not in kept)
        progress.expect(len(kept), len(pending))
        for run in kept:
            self._tidy(run)
        active: dict[int, tuple[Run, Process, float]] = {}
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
                        progress.is_at(run.directory)
                        continue
                    del active[slot]
                    progress.finish(run.directory, self._finish(run, status, time.monotonic() - started))
        finally:
            for _, process, _ in active.values():
                process.terminate()
            for _, process, _ in active.values():
                process.wait()

    def _start(self, run: Run, slot: int) -> Process:
        run.directory.parent.mkdir(parents=True, exist_ok=True)
        if not self.launcher and self._facts["device"] == "cpu":
            return Forked(self._stack, self.module, run.arguments(), run.log)
        environment = dict(os.environ)
        if not self.launcher and self._facts["devices"] > 1:
            environment["CUDA_VISIBLE_DEVICES"] = device_of(slot, self._facts["devices"])
        command = [*as_module(self.launcher or shlex.quote(sys.executable), self.module), *run.arguments()]
        return Launched(command, environment, run.log, held=(self._lock,))

    def _finish(self, run: Run, status: int, seconds: float) -> str:
        """Return a line about a run that has ended.

        Raises:
            RunFailed: It has failed, unless `keep_going`.
        """
        results = run.results() if status == 0 else None
        if results is None:
            reason = f"{run.title} {self._why_useless(run, status)}. Its log: {run.log}"
            if not self.keep_going:
                raise RunFailed(
                    f"{reason}. Run the same command again to continue; --keep-going leaves out runs that fail."
                )
            self.failures[run] = reason
            return reason
        self._tidy(run)
        score = score_of(main_metric(results, self.varied))
        names = {f"{split}_{score.name}": words for split, words in SPLITS.items()}
        metrics = [f"{words} {results[name]:.3f}" for name, words in names.items() if name in results]
        spent = f"{results['train_passes']:g} passes, {results['train_updates']:g} updates, {seconds:.0f} s"
        return f"{run.title}: {score.words} {', '.join(metrics)}; {spent}"

    def _why_useless(self, run: Run, status: int) -> str:
        """Return why a run has no results, as the end of a sentence."""
        if status:
            return f"failed with exit status {status}: {error_in(run.log).rstrip('.')}"
        left = read_json(run.directory / RESULTS) or {}
        if not metrics_in(left, self.varied):
            wanted = " or ".join(score.words for score in SCORES[self.varied])
            measured = ", ".join(name for name in left if name.startswith(tuple(SPLITS))) or "nothing"
            return f"ended without an error, but did not measure {wanted}; it measured {measured}"
        return f"ended without an error, but {run.directory} does not contain all results of a finished run"

    def _tidy(self, run: Run) -> None:
        """Remove the checkpoints of a finished run, unless they are to be kept."""
        if not self.keeps_checkpoints:
            for checkpoint in [*run.directory.glob("checkpoint-*"), *run.directory.glob("abandoned-checkpoint-*")]:
                shutil.rmtree(checkpoint)


def device_of(slot: int, devices: int) -> str:
    """Return the visible GPU that the runs of a slot use.

    >>> [device_of(slot, devices=2) for slot in range(3)]
    ['0', '1', '0']
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(devices)))).split(",")
    return visible[slot % len(visible)]


def error_in(log: Path) -> str:
    """Return the line of a log that explains best why a run failed. Launchers write more lines after it."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    errors = [line for line in lines if line.startswith("error: ")]
    words = [line.strip() for line in lines if any(map(str.isalpha, line))]
    return next(reversed(errors or words), "the log is empty.")
