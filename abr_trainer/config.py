"""The arguments of a run: everything `TrainingArguments` takes, and which batches to repeat or skip."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import inspect
import json
import math
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from .ledger import forward_share
from .schedulers import (
    OUTLIER_RULES,
    SCHEDULERS,
    RepeatScheduler,
    get_outlier_rule,
    get_repeat_scheduler,
)

CHEAPEST_BATCH = forward_share(frozen_base=False, activation_checkpointing=True)
"""The least a batch can cost, in passes."""

RUN_FILES = (
    *("checkpoint-*", "abandoned-checkpoint-*", "runs", "abr_trace.jsonl", "*_results.json", "trainer_state.json"),
    *("run.json", "adapter_*", "model*.safetensors*", "config.json", "generation_config.json", "training_args.bin"),
)
"""What a run leaves in its output directory. An adapter left beside full weights would be loaded on top of them."""


@dataclass
class ABRConfig(TrainingArguments):
    """`TrainingArguments` with the fields below.

    Defaults that differ from `TrainingArguments`: `report_to="tensorboard"`, `logging_steps=10`, and `eval_strategy`,
    which is "epoch" where `do_eval` asks for evaluation and "no" elsewhere. `greater_is_better` is False for a
    perplexity. `max_passes` sets `max_steps` to the most batches that the budget can buy; a `max_steps` given beside
    it caps the number of batches.
    """

    repeat_scheduler: str = field(
        default="abr",
        metadata={
            "help": "How often to train on each batch: 'baseline' (once), 'fixed' (--max_repeats times), 'random' (1 "
            "to --max_repeats times), 'abr' (once for every whole --loss_threshold in its first-pass loss, at most "
            "--max_repeats times), or your own rule as package.module:ClassName."
        },
    )
    repeat_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Parameters of the repeat scheduler as JSON, e.g. '{\"max_repeats\": 3}'. They win over flags."
        },
    )
    loss_threshold: float = field(
        default=1.0,
        metadata={"help": "First-pass loss, in nats per target token, that buys one update under 'abr'."},
    )
    max_repeats: int = field(default=5, metadata={"help": "Most updates made on one batch."})
    skip_outliers: str = field(
        default="robust",
        metadata={
            "help": "Skip batches whose first-pass loss stands out: 'robust' (median and MAD of the recent losses), "
            "'classic' (mean and standard deviation, the published rule) or 'none'.",
            "choices": [*sorted(OUTLIER_RULES), "none"],
        },
    )
    outlier_sigmas: float | None = field(
        default=None,
        metadata={
            "help": "Spreads above the recent losses that make an outlier. Default: 4.0 (robust), 2.5 (classic)."
        },
    )
    outlier_window: int = field(default=100, metadata={"help": "Number of recent losses that outliers are judged by."})
    max_consecutive_skips: int = field(
        default=20,
        metadata={"help": "Save a checkpoint and stop with an error after this many skipped batches in a row."},
    )
    max_passes: int | None = field(
        default=None,
        metadata={
            "help": "Compute budget, in forward-backward passes over a batch. Training ends when it is spent, over "
            "as many epochs as that takes, and the learning rate follows the share of it that is spent. A skipped "
            "batch costs its forward: 1/3 of a pass, 1/2 with a frozen base. Less than a pass can be left at the end."
        },
    )
    primer_batches: int = field(
        default=0,
        metadata={"help": "Train on this many batches at the start once each, neither repeating nor skipping them."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Let the script delete what an earlier run left in --output_dir."}
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Log every so many batches; below 1, a share of the run."}
    )
    report_to: None | str | list[str] = field(  # noqa: RUF036  # HfArgumentParser takes the second type
        default="tensorboard", metadata={"help": "Where to report logs: tensorboard, wandb, ..., all or none."}
    )
    eval_strategy: str | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "When to evaluate while training: no, steps or epoch. Default: epoch if --do_eval, else no."
        },
    )

    def __post_init__(self) -> None:
        if self.eval_strategy is None:
            self.eval_strategy = "epoch" if self.do_eval else "no"
        if str(self.resume_from_checkpoint).lower() in ("false", "no"):
            self.resume_from_checkpoint = None
        if self.hub_token is not None:
            raise ValueError(
                "--hub_token would be written to training_args.bin, which is pushed. "
                "Set the environment variable HF_TOKEN or run `hf auth login` instead."
            )
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith("perplexity"):
            self.greater_is_better = False
        self._check_repetition()
        if self.max_passes is not None:
            most_batches = math.ceil(self.max_passes / CHEAPEST_BATCH)
            self.max_steps = min(self.max_steps, most_batches) if self.max_steps > 0 else most_batches
        super().__post_init__()

    def _check_repetition(self) -> None:
        if isinstance(self.repeat_scheduler_kwargs, str):
            self.repeat_scheduler_kwargs = _parse_json_object(
                "--repeat_scheduler_kwargs", self.repeat_scheduler_kwargs
            )
        for name, least in (
            ("max_repeats", 1),
            ("max_consecutive_skips", 1),
            ("primer_batches", 0),
            ("max_passes", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}.")
        self.build_repeat_scheduler()

    def build_repeat_scheduler(self) -> RepeatScheduler:
        """Return a new scheduler as the fields describe it, outlier skipping included.

        Raises:
            ValueError: A name is unknown, or a parameter out of range.
        """
        scheduler = get_repeat_scheduler(self.repeat_scheduler, **self._scheduler_parameters())
        if self.skip_outliers == "none":
            return scheduler
        sigmas = {} if self.outlier_sigmas is None else {"sigmas": self.outlier_sigmas}
        return get_outlier_rule(self.skip_outliers, scheduler, window=self.outlier_window, **sigmas)

    def _scheduler_parameters(self) -> dict[str, Any]:
        """Return the flags that the named scheduler takes, under the explicit `repeat_scheduler_kwargs`."""
        flags = {"loss_threshold": self.loss_threshold, "max_repeats": self.max_repeats, "seed": self.seed}
        if self.repeat_scheduler == "fixed":
            flags["repeats"] = self.max_repeats
        registered = SCHEDULERS.get(self.repeat_scheduler)
        takes = inspect.signature(registered).parameters if registered else {}
        explicit = self.repeat_scheduler_kwargs or {}
        if isinstance(explicit, str):
            explicit = _parse_json_object("--repeat_scheduler_kwargs", explicit)
        return {name: value for name, value in flags.items() if name in takes} | explicit


def _parse_json_object(flag: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{flag} is not valid JSON: {error}. Got: {text}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{flag} must be a JSON object such as '{{\"max_repeats\": 3}}', got: {text}")
    return value


def parse_arguments(argument_classes: Any, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Parse a command line into these dataclasses, with `HfArgumentParser`.

    The first argument may be a `.yaml`, `.yml` or `.json` file of flags without their dashes; flags after it win.

    Raises:
        ValueError: A flag is unknown or has a bad value.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(argument_classes)
    parser.error = _raise_value_error  # type: ignore[method-assign]
    known = {option: action for action in parser._actions for option in action.option_strings}
    if argv and Path(argv[0]).suffix in (".yaml", ".yml", ".json"):
        argv = [*_flags_from_file(Path(argv[0]), known), *argv[1:]]
    for flag in (argument.partition("=")[0] for argument in argv if argument.startswith("--")):
        if flag not in known:
            close = difflib.get_close_matches(flag, known, n=1)
            raise ValueError(f"Unknown flag {flag}." + (f" Did you mean {close[0]}?" if close else " See --help."))
    return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)


def _raise_value_error(message: str) -> NoReturn:
    raise ValueError(message)


def _flags_from_file(path: Path, known: dict[str, argparse.Action]) -> list[str]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of flags to values.")
    flags = []
    for name, value in values.items():
        if isinstance(value, bool) and getattr(known.get(f"--{name}"), "type", None) is not string_to_bool:
            value = "yes" if value else "no"  # YAML reads `save_strategy: no` as false
        if isinstance(value, dict):
            flags += [f"--{name}", json.dumps(value)]
        elif value is not None:
            flags += [f"--{name}", *(str(item) for item in (value if isinstance(value, list) else [value]))]
    return flags


@contextlib.contextmanager
def one_line_errors(*kinds: type[Exception]) -> Iterator[None]:
    """End the program with the message of an exception of these kinds, on one line, instead of a traceback."""
    try:
        yield
    except kinds as error:
        raise SystemExit(f"error: {' '.join(str(error).split())}") from error


def check_output_dir(config: ABRConfig) -> None:
    """Refuse to mix two runs in one directory.

    Raises:
        ValueError: The directory is not empty, and the run neither resumes nor overwrites.
    """
    path = Path(str(config.output_dir))
    if path.exists() and not path.is_dir():
        raise ValueError(f"--output_dir {path} is a file.")
    allowed = config.resume_from_checkpoint or config.overwrite_output_dir or not config.do_train
    if config.process_index == 0 and not allowed and path.exists() and any(path.iterdir()):
        raise ValueError(
            f"--output_dir {path} is not empty. Give --resume_from_checkpoint true to go on with the run in it, "
            "--overwrite_output_dir to start over, or another directory."
        )


def clear_output_dir(config: ABRConfig) -> None:
    """With `overwrite_output_dir`, remove what an earlier run left, unless this one resumes it or does not train.

    Nothing else is touched.
    """
    starts_over = config.overwrite_output_dir and config.do_train and not config.resume_from_checkpoint
    if config.process_index == 0 and starts_over:
        for pattern in RUN_FILES:
            for old in Path(str(config.output_dir)).glob(pattern):
                shutil.rmtree(old) if old.is_dir() else old.unlink()


def write_provenance(config: ABRConfig, argv: Sequence[str]) -> None:
    """Write `run.json`: the command line, versions, code and machine that made this run."""
    packages = ("abr_trainer", "torch", "transformers", "accelerate", "peft", "bitsandbytes", "datasets")
    versions = {name: metadata.version(name) for name in packages if _is_installed(name)}
    provenance = {
        "argv": list(argv),
        "versions": {"python": platform.python_version(), **versions},
        "git": _git_commit(),
        "machine": {"platform": platform.platform(), "device": str(config.device), "processes": config.world_size},
    }
    Path(str(config.output_dir), "run.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")


def _git_commit() -> str | None:
    """Return the commit of this checkout, with "-dirty" if it was changed; None without git or outside a checkout."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() == root:
            return git("describe", "--always", "--dirty", "--abbrev=40")
    except (OSError, subprocess.CalledProcessError):
        pass
    return None


def checkpoints_activations(args: TrainingArguments) -> bool:
    """Tell whether the backward recomputes activations, by the name that this version of transformers has for it."""
    return bool(getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing)


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
