"""Read and complete the command lines of runs without torch and transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from .errors import one_line

VARIED = {
    "scheduler": {
        "--repeat_scheduler": "--schedulers",
        "--repeat_scheduler_kwargs": "--schedulers name:parameter=value",
    },
    "prompt": {"--prompt": "--prompts"},
}
"""Flags of a run that a comparison varies, and what to use instead."""

OF_THE_COMPARISON = {
    "--seed": "--seeds",
    "--output_dir": "--out",
    "--resume_from_checkpoint": "the same command again, which resumes by itself",
    "--overwrite_output_dir": "another --out",
    "--push_to_hub": "a separate run, because every run of a comparison would push",
}

BUDGETS = {"passes": "--max_passes", "seconds": "--max_seconds"}
"""The flag for the budget of each run, by what is equal for all runs of a comparison."""

SHARED = (
    *(*BUDGETS.values(), "--max_steps", "--num_train_epochs", "--do_train", "--do_eval", "--do_predict"),
    *("--validation_file", "--test_file", "--max_eval_samples", "--block_size", "--task_name"),
    *("--max_length", "--chat_template", "--assistant_only_loss", "--completion_only_loss"),
)
"""Flags for the length and the evaluation of a run. They must be equal for all runs of a comparison."""

ORDER = "--train_sampling_strategy"
SAVING = ("--save_strategy", "--save_steps", "--save_passes", "--save_total_limit")
CONFIG = "--config"
ENVIRONMENT = "env"
"""Key for environment variables in a file of flags."""

EVALUATING = ("--eval_strategy", "--eval_steps", "--eval_passes")


WITHOUT_TEST_SPLIT = (["c4"], ["allenai/c4"])

WITH_TEST_LABELS = ("mrpc", "demo")
"""Tasks with known labels of the test split, which other GLUE tasks hide. The first one is the default task."""


def is_flags_file(argument: str) -> bool:
    return Path(argument).suffix in (".yaml", ".yml", ".json")


def read_flags_file(path: Path) -> list[str]:
    """Return the content of a file of flags as a command line, without its `env`.

    Raises:
        ValueError: The file cannot be read, or contains no flags.
    """
    flags: list[str] = []
    for name, value in _values_in(path).items():
        if name == ENVIRONMENT or value is None:
            continue
        if isinstance(value, list):
            flags += [f"--{name}", *map(_as_argument, value)]
            continue
        text = json.dumps(value, default=str) if isinstance(value, dict) else _as_argument(value)
        flags += [f"--{name}={text}"] if text.startswith("--") else [f"--{name}", text]  # it is no flag
    return flags


def _values_in(path: Path) -> dict[str, Any]:
    """Return the values in a file of flags, with its numbers and dates as they are written.

    YAML takes `010` for 8, `1:30` for 90 and `1.10` for 1.1, which would change names and numbers.
    """
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))  # JSON is YAML
        try:
            values = _as_written(loader, loader.get_single_node(), path)
        finally:
            loader.dispose()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {one_line(error)}. Save it as UTF-8.") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is not valid: {one_line(error)}") from error
    names: dict[str, str] = {}
    for name, value in values.items():
        if not name.strip():
            raise ValueError(f"{path} has a value without the name of a flag.")
        other = names.setdefault(name.replace("-", "_"), name)
        if other != name:
            raise ValueError(f"{path} has {other} twice, also as {name}. Leave one out.")
        if isinstance(value, list) and any(each is None or isinstance(each, list | dict) for each in value):
            raise ValueError(f"{path}: the list of {name} must hold texts or numbers.")
    environment = values.get(ENVIRONMENT, {})
    if not isinstance(environment, dict) or any(
        each is None or isinstance(each, list | dict) for each in environment.values()
    ):
        raise ValueError(f"{path}: {ENVIRONMENT} must be a mapping of environment variables to values.")
    return values


def _as_written(loader: Any, root: Any, path: Path) -> dict[str, Any]:
    """Return a mapping of YAML by names, with numbers and dates in it, and in its lists, as text.

    Raises:
        ValueError: It is no mapping, or has a name twice, of which YAML would take the last.
    """
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path} must contain a mapping of flags to values.")
    loader.flatten_mapping(root)
    values: dict[str, Any] = {}
    for key, node in root.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"{path} must contain a mapping of flags to values.")
        if key.value in values:
            raise ValueError(f"{path} has {key.value} twice. Leave one out.")
        if key.value == ENVIRONMENT and isinstance(node, yaml.MappingNode):
            values[key.value] = _as_written(loader, node, path)
        elif isinstance(node, yaml.SequenceNode):
            values[key.value] = [_value_of(loader, each) for each in node.value]
        else:
            values[key.value] = _value_of(loader, node)
    return values


def _value_of(loader: Any, node: Any) -> Any:
    as_text = ("int", "float", "timestamp")
    if isinstance(node, yaml.ScalarNode) and node.tag.rpartition(":")[2] in as_text:
        return node.value
    return loader.construct_object(node, deep=True)


def _as_argument(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "no"  # YAML reads `save_strategy: no` as false
    return str(value)


def expand_flags_file(argv: Sequence[str]) -> list[str]:
    """Put the flags of a file at the beginning of a command line, so that the command line overrides them.

    The file is the first argument or the value of `--config`, as in TRL. Environment variables in its `env` are set.

    Raises:
        ValueError: The file cannot be read, or contains no flags.
    """
    path, rest = flags_file_in(argv)
    if path is None:
        return rest
    environment = _values_in(path).get(ENVIRONMENT, {})
    try:
        os.environ.update({name: str(value) for name, value in environment.items()})
    except ValueError as error:
        raise ValueError(f"{path}: {ENVIRONMENT} cannot be set: {error}.") from error
    return [*read_flags_file(path), *rest]


def flags_file_in(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Return the file of flags in a command line, if any, and the other arguments.

    Raises:
        ValueError: The value of `--config` is not such a file.

    >>> flags_file_in(["--bf16", "--config", "run.yaml"])
    (PosixPath('run.yaml'), ['--bf16'])
    """
    rest = list(argv)
    if rest and is_flags_file(rest[0]):
        return Path(rest[0]), rest[1:]
    for index, argument in enumerate(rest):
        flag, has_value, value = argument.partition("=")
        if flag == CONFIG:
            value = value if has_value else "".join(rest[index + 1 : index + 2])
            if not is_flags_file(value):
                raise ValueError(f"{CONFIG} takes a .yaml, .yml or .json file of flags, got {value or 'nothing'}.")
            return Path(value), rest[:index] + rest[index + 1 + (not has_value) :]
    return None, rest


def given_flags(argv: Iterable[str]) -> dict[str, list[str]]:
    """Return the flags of a command line with their values, by their names with underscores.

    >>> given_flags(["--max-passes", "9", "--bf16", "--lora_r=8"])
    {'--max_passes': ['9'], '--bf16': [], '--lora_r': ['8']}
    """
    flags: dict[str, list[str]] = {}
    values: list[str] = []
    for argument in argv:
        if argument.startswith("--"):
            name, has_value, value = argument.partition("=")
            values = flags[f"--{name[2:].replace('-', '_')}"] = [value] if has_value else []
        else:
            values.append(argument)
    return flags


def without_flags(argv: Iterable[str], names: Container[str]) -> list[str]:
    """Return a command line without some flags and their values.

    Args:
        names: With dashes and underscores.

    >>> without_flags(["--max-passes", "9", "--bf16", "--lora_r=8"], {"--max_passes", "--lora_r"})
    ['--bf16']
    """
    kept, keeps = [], True
    for argument in argv:
        if argument.startswith("--"):
            keeps = f"--{argument[2:].partition('=')[0].replace('-', '_')}" not in names
        if keeps:
            kept.append(argument)
    return kept


def is_on(flag: str, flags: dict[str, list[str]]) -> bool:
    """Tell whether a boolean flag is given and true."""
    return flag in flags and [value.lower() for value in flags[flag]] not in (["false"], ["no"], ["0"], ["f"], ["n"])


def asks_to_save(rest: Sequence[str]) -> bool:
    """Tell whether these arguments say when to save, so that checkpoints should be kept."""
    return not given_flags(rest).keys().isdisjoint(SAVING)


def refuse(
    flags: Iterable[str],
    where: str,
    shared: Sequence[str] = SHARED,
    budget: tuple[str, str] | None = None,
    varied: str = "scheduler",
) -> None:
    """Refuse flags that the comparison sets itself, or that make runs incomparable.

    Args:
        where: Where the flags come from, for the message.
        shared: Flags that must be equal for all runs.
        budget: The flag for the budget of each run, and its value. Here it may be lower.
        varied: What the comparison varies: "scheduler" or "prompt".

    Raises:
        ValueError: There is such a flag.
    """
    for flag, values in given_flags(flags).items():
        if instead := (VARIED[varied] | OF_THE_COMPARISON).get(flag):
            raise ValueError(f"{where}{flag} cannot be set for the runs of a comparison. Use {instead}.")
        if budget is not None and flag == budget[0]:
            if not all(value.isdigit() and int(value) <= int(budget[1]) for value in values):
                raise ValueError(f"{where}{flag} {' '.join(values)} must be at most {budget[1]}, that of all runs.")
            continue
        if flag in shared:
            raise ValueError(f"{where}{flag} must be the same for all runs, or they cannot be compared.")


def budget_in(argv: Iterable[str], match: str) -> tuple[str, str] | None:
    """Return the flag for the budget of a run and its value, if there is one.

    Args:
        match: What is equal for all runs.

    >>> budget_in(["--max-seconds", "60"], "seconds")
    ('--max_seconds', '60')
    """
    flag = BUDGETS.get(match, "")
    values = given_flags(argv).get(flag, [])
    return (flag, values[-1]) if values else None


def complete_flags(rest: Sequence[str], match: str, evaluations: int) -> list[str]:
    """Return the flags that all runs share: the given ones, and defaults for a comparison.

    Args:
        rest: Arguments of `abr train` or `abr sft`, with a file of flags expanded.
        match: "passes", "seconds" or "batches": what is equal for all runs.
        evaluations: Number of evaluations during a run, at equal distances in passes, seconds or batches.

    Raises:
        ValueError: An argument cannot be set for a comparison, or the budget is missing.
    """
    given = given_flags(rest)
    if evaluations < 1:
        raise ValueError(f"--evaluations must be at least 1, got {evaluations}.")
    ends = {**BUDGETS, "batches": "--max_steps"}
    for other, flag in ends.items():
        if other != match and flag in given:
            raise ValueError(
                f"{flag} cannot be used with --match {match}: runs could end at different {match}. --match {other} "
                "goes with it."
            )
    if match in BUDGETS and BUDGETS[match] not in given:
        raise ValueError(f"--match {match} needs the budget of each run. Give {BUDGETS[match]} N after the --.")
    refuse(rest, "", shared=())
    added = _what_to_do(given)
    has_test = "--test_file" in given or not {"--train_file", "--validation_file"} & given.keys()
    if "--do_predict" not in given and has_test and given.get("--dataset_name") not in WITHOUT_TEST_SPLIT:
        added.append("--do_predict")
    evaluating, saving = _when_to_evaluate_and_save(given, match, evaluations)
    added += evaluating
    added += [] if "--eval_on_start" in given else ["--eval_on_start"]
    added += [] if "--sample_prompts" in given else ["--sample_prompts", "0"]  # nobody reads those of many runs
    return [*rest, *added, *saving, *_quietly(given)]


def complete_prompt_flags(rest: Sequence[str]) -> list[str]:
    """Return the flags that all runs of a comparison of prompts share: the given ones, and defaults.

    By default, runs evaluate before training, after every epoch and at the end.

    Args:
        rest: Arguments of `abr classify`, with a file of flags expanded.

    Raises:
        ValueError: An argument cannot be set for a comparison.
    """
    given = given_flags(rest)
    refuse(rest, "", shared=(), varied="prompt")
    added = _what_to_do(given)
    has_files = not {"--train_file", "--validation_file", "--dataset_name"}.isdisjoint(given)
    if given.get(ORDER, [])[-1:] == ["group_by_length"]:
        raise ValueError(
            f"{ORDER} group_by_length cannot be used: a prompt changes the lengths of rows, and so their order. "
            "Leave it out."
        )
    if "--max_seconds" in given:
        raise ValueError(
            "--max_seconds cannot be used: a longer prompt takes longer, and so the runs would not see the same rows. "
            "Use --num_train_epochs."
        )
    task = "".join(given.get("--task_name", WITH_TEST_LABELS[:1])[-1:]).lower()
    has_test = "--test_file" in given or (not has_files and task in WITH_TEST_LABELS)
    if "--do_predict" not in given and has_test:
        added.append("--do_predict")
    saves = not given.keys().isdisjoint(SAVING)
    saving = [] if saves else ["--save_strategy", "epoch", "--save_total_limit", "1"]
    return [*rest, *added, *saving, *_quietly(given)]


def _what_to_do(given: dict[str, list[str]]) -> list[str]:
    """Return the flags that make every run train and evaluate, except those already given.

    Raises:
        ValueError: One of them is given as false.
    """
    for flag in ("--do_train", "--do_eval"):
        if flag in given and not is_on(flag, given):
            raise ValueError(
                f"{flag} {' '.join(given[flag])} cannot be used: a comparison trains and evaluates every run."
            )
    return [flag for flag in ("--do_train", "--do_eval") if flag not in given]


def _quietly(given: dict[str, list[str]]) -> list[str]:
    reporting = [] if "--report_to" in given else ["--report_to", "none"]
    return [*reporting, *([] if "--disable_tqdm" in given else ["--disable_tqdm", "true"])]


def _when_to_evaluate_and_save(
    given: dict[str, list[str]], match: str, evaluations: int
) -> tuple[list[str], list[str]]:
    """Return flags for when to evaluate and when to save, unless they are given."""
    share, part, limit = str(round(1 / evaluations, 4)), "0.1", ["--save_total_limit", "1"]
    by_budget = match in BUDGETS
    evaluates, saves = not given.keys().isdisjoint(EVALUATING), not given.keys().isdisjoint(SAVING)
    if is_on("--load_best_model_at_end", given) and not (evaluates and saves):
        if evaluates or saves or evaluations == 1:
            raise ValueError(
                "--load_best_model_at_end needs both --eval_strategy and --save_strategy, or neither of them and at "
                "least --evaluations 2."
            )
        if match == "seconds":  # of the batches nobody knows a share
            return ["--eval_passes", share], ["--save_strategy", "best", "--save_passes", part, *limit]
        by_budget, part = False, share  # Trainer requires both at the same batches
    evaluating = ["--eval_passes", share] if by_budget else ["--eval_strategy", "steps", "--eval_steps", share]
    if evaluations == 1:
        evaluating = ["--eval_strategy", "no"]  # runs always evaluate at the end
    saving = ["--save_strategy", "no", "--save_passes"] if by_budget else ["--save_strategy", "steps", "--save_steps"]
    return [] if evaluates else evaluating, [] if saves else [*saving, part, *limit]


def parse_tuning(settings: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """Parse the arguments of each `--tune FLAG VALUE ...`.

    Raises:
        ValueError: There are no values, or a flag or a value is given twice.

    >>> parse_tuning([["learning_rate", "1e-4", "1e-3"]])
    {'learning_rate': ['1e-4', '1e-3']}
    """
    tune: dict[str, list[str]] = {}
    for given, *values in settings:
        name = given.replace("-", "_")
        if not values:
            raise ValueError(f"--tune {name} needs values to try, e.g. --tune {name} 1e-4 1e-3.")
        if name in tune:
            raise ValueError(f"--tune {name} is given twice. Give all its values together.")
        if twice := next((value for value in values if values.count(value) > 1), None):
            raise ValueError(f"--tune {name} has the value {twice} twice. Leave one out.")
        tune[name] = values
    return tune
