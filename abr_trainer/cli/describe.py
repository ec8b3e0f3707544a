"""Write `flags.json`: the flags of all verbs as data, so that help and typing errors need no heavy import.

From these data it also writes the page of the documentation, docs/reference/flags.md.

python -m abr_trainer.cli.describe    # after a flag, a default or a help text has changed
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from ..records.files import write_whole
from .command_line import build_parser
from .help_page import reference_page
from .main import VERBS
from .parsing import boolean
from .quick import FLAGS_FILE

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "flags.md"
"""Where the page lies in a checkout."""

USUAL = {
    "model": (
        *("model_name_or_path", "adapter_name_or_path", "torch_dtype"),
        *("load_in_8bit", "load_in_4bit", "use_lora", "lora_r", "lora_alpha"),
    ),
    "data": (
        *("dataset_name", "dataset_config_name", "task_name", "train_file", "validation_file", "test_file"),
        *("chat_template", "text_column", "block_size", "max_length", "packing", "padding_free"),
        *(
            "assistant_only_loss",
            "completion_only_loss",
            "sentence_columns",
            "label_column",
            "max_seq_length",
            "prompt",
        ),
        *("max_train_samples", "max_eval_samples"),
    ),
    "which batches": (
        "repeat_scheduler",
        "repeat_scheduler_kwargs",
        "loss_threshold",
        "max_repeats",
        "skip_outliers",
        "skip_rows",
    ),
    "training and budget": (
        *("do_train", "max_passes", "num_train_epochs", "max_steps", "learning_rate"),
        *("per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "activation_checkpointing", "seed"),
    ),
    "evaluation": (
        *("do_eval", "do_predict", "eval_strategy", "eval_passes", "load_best_model_at_end"),
        *("early_stopping_patience", "sample_prompts"),
    ),
    "output": (
        *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "logging_steps", "report_to"),
        *("save_strategy", "save_steps", "save_total_limit", "push_to_hub"),
    ),
}
"""The flags that `--help` shows of verbs that train, in the order of the page."""

SHORT = {
    "do_train": "Train the model.",
    "do_eval": "Evaluate on the validation split.",
    "do_predict": "Evaluate on the test split.",
    "num_train_epochs": "How often to go over the training set.",
    "max_steps": "Stop after so many batches; -1: after --num_train_epochs.",
    "learning_rate": "Learning rate of the first batch after warm-up.",
    "per_device_train_batch_size": "Rows of a micro-batch, on each device.",
    "gradient_accumulation_steps": "Micro-batches in a batch.",
    "packing": "Put several rows into one, of --max_length.",
    "padding_free": "Put the rows of a micro-batch into one, without padding.",
    "bf16": "Compute in bf16: mixed precision.",
    "activation_checkpointing": "Need less memory: compute activations twice.",
    "seed": "Seed of the order of rows, of dropout and of new weights.",
    "load_best_model_at_end": "End with the best checkpoint, by --metric_for_best_model.",
    "output_dir": "Directory of the run.",
    "resume_from_checkpoint": "true: go on from the last checkpoint; auto: if any; or a name.",
    "save_strategy": "When to save a checkpoint: no, steps, epoch or best.",
    "save_steps": "Batches between checkpoints, with --save_strategy steps.",
    "save_total_limit": "Keep only so many checkpoints.",
    "push_to_hub": "Push to the Hub whenever a checkpoint is saved.",
}
"""What the short page says of flags whose help is that of `TrainingArguments` or of TRL."""

GROUP_OF = {
    "LoadArguments": "model",
    "AdaptedArguments": "model",
    "ModelArguments": "model",
    "ClassifierArguments": "model",
    "ChatArguments": "data",
    "DataArguments": "data",
    "TextArguments": "data",
    "OptionalTextArguments": "data",
    "SentenceArguments": "data",
    "EvaluationArguments": "evaluation",
    "GenerationArguments": "evaluation",
    "MeasureArguments": "evaluation",
    "EvaluateArguments": "evaluation",
    "PruneArguments": "pruning",
    "MergeArguments": "merging",
    "ABRConfig": "which batches",
    "ClassifierConfig": "which batches",
    "SFTJobConfig": "which batches",
}
"""Where `--help-all` shows the flags of a class that are not among the usual ones."""

ELSEWHERE = {
    "evaluation": ("eval_on_start", "early_stopping_threshold"),
    "output": ("save_passes", "hub_base_model"),
    "training and budget": ("max_seconds", "scale_with_batch_size", "base_learning_rate", "base_samples"),
}
"""Flags that are not where the others of their class are."""

OF_TRL = {
    "data": ("eos_token", "eval_packing", "packing_strategy", "pad_to_multiple_of", "shuffle_dataset"),
    "training and budget": ("activation_offloading", "loss_type", "router_aux_loss_coef"),
}
"""Where the flags stand that TRL declares."""


class _Parser(BaseException):
    """Carries a parser out of the command that has built it."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


@contextmanager
def _stopping_at_parsers() -> Iterator[None]:
    usual = argparse.ArgumentParser.parse_known_args

    def stop(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        raise _Parser(self)

    argparse.ArgumentParser.parse_known_args = stop  # type: ignore[method-assign]
    try:
        yield
    finally:
        argparse.ArgumentParser.parse_known_args = usual  # type: ignore[method-assign]


def parser_of(main: Callable[[list[str]], Any]) -> argparse.ArgumentParser:
    """Return the parser that a command builds: the command is stopped where it would parse an empty command line.

    Raises:
        RuntimeError: It parses nothing.
    """
    with _stopping_at_parsers():
        try:
            main([])
        except _Parser as stopped:
            return stopped.parser
    raise RuntimeError(f"{main} parses no command line.")


def describe() -> dict[str, Any]:
    """Return what `flags.json` holds.

    `trainer` has the flags of `TrainingArguments` under its own headings, `verbs` those of each verb; a verb that
    `takes_trainer` has the former beside its own, except where it has another of the same name. `of_trl` names those
    that are as TRL declares them, in the version that `needs` tells.
    """
    headings = _headings()
    trainer = [_flag(action, headings.get(action.dest)) for action in _actions(build_parser(TrainingArguments))]
    verbs = {}
    for verb, known in VERBS.items():
        module = importlib.import_module(known.module)
        parser = parser_of(module.main)
        classes: list[Any] = list(parser.dataclass_types) if isinstance(parser, HfArgumentParser) else []
        own = _own_groups(classes)
        takes_trainer = any(issubclass(each, TrainingArguments) for each in classes)
        flags = [
            _flag(action, own.get(action.dest, headings.get(action.dest) if takes_trainer else None))
            for action in _actions(parser)
        ]
        of_trl = _of_trl(classes)
        usual = {group: [name for name in names if name in _dests(parser)] for group, names in USUAL.items()}
        verbs[verb] = {
            "description": _lines_as_written(inspect.cleandoc(module.__doc__ or "")),
            "exact": bool(classes),
            "takes_trainer": takes_trainer,
            "usual": usual if takes_trainer else {},
            **({"needs": {"trl": importlib.metadata.version("trl")}, "of_trl": of_trl} if of_trl else {}),
            "flags": [flag for flag in flags if flag not in trainer] if takes_trainer else flags,
        }
    return {
        "transformers": importlib.metadata.version("transformers"),
        "short": SHORT,
        "trainer": trainer,
        "verbs": verbs,
    }


def _lines_as_written(text: str) -> str:
    """Break the lines of commands again that a backslash in a docstring has joined."""
    lines = []
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip()))
        lines.append(indent + re.sub(r" {2,}(?=[^#\s])", f" \\\\\n{indent}    ", line.lstrip()))
    return "\n".join(lines)


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]


def _dests(parser: argparse.ArgumentParser) -> set[str]:
    return {action.dest for action in parser._actions}


def _headings() -> dict[str, str]:
    """Return the heading above each field of `TrainingArguments`, which its source has as comments."""
    found, heading = {}, "trainer"
    for line in inspect.getsource(TrainingArguments).splitlines():
        if comment := re.fullmatch(r"    # -+ (.+?) -+", line):
            heading = comment[1].lower()
        elif name := re.match(r"    (\w+):", line):
            found[name[1]] = heading
    return found


def _own_groups(classes: Sequence[Any]) -> dict[str, str]:
    """Return the group of each flag that a class of this project has declared, or that is among the usual ones."""
    groups: dict[str, str] = {}
    for kind in classes:
        inherited = {field.name for field in fields(TrainingArguments)} if issubclass(kind, TrainingArguments) else ()
        own = [field.name for field in fields(kind) if field.name not in inherited]
        groups |= dict.fromkeys(own, GROUP_OF[kind.__name__])
    for group, names in itertools.chain(USUAL.items(), ELSEWHERE.items(), OF_TRL.items()):
        groups |= {name: group for name in names if name in groups}
    return groups


def _of_trl(classes: Sequence[Any]) -> list[str]:
    """Return the flags that are as TRL declares them; another version of it may have others."""
    found: set[str] = set()
    for kind in classes:
        for base in reversed(kind.__mro__):
            declared = set(vars(base).get("__annotations__", ()))
            found = found | declared if base.__module__.startswith("trl.") else found - declared
    return sorted(found)


def _flag(action: argparse.Action, group: str | None) -> dict[str, Any]:
    """Return an argument of a parser as data, without what it does not have."""
    help_text = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%") or None
    described = {
        "names": list(action.option_strings),
        "dest": action.dest,
        "type": _type_name(action),
        "default": _plain(action.default),
        "nargs": action.nargs if action.nargs != 0 else None,
        "const": action.const,
        "choices": None if action.choices is None else [_plain(choice) for choice in action.choices],
        "required": action.required if action.option_strings and action.required else None,
        "metavar": list(action.metavar) if isinstance(action.metavar, tuple) else action.metavar,
        "action": _action_name(action),
        "group": group,
        "help": help_text,
    }
    return {name: value for name, value in described.items() if value is not None}


def _type_name(action: argparse.Action) -> str | None:
    """Return "int", "float" or "bool" where a value must be one; any other is read by the command itself."""
    known: dict[Any, str] = {int: "int", float: "float", string_to_bool: "bool", boolean: "bool"}
    return known.get(action.type)


def _action_name(action: argparse.Action) -> str | None:
    names = {argparse._AppendAction: "append"}
    if action.nargs == 0:
        return "store_true" if action.const else "store_false"
    return names.get(type(action))  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str | list) else str(value)


def main() -> None:
    flags = describe()
    write_whole(FLAGS_FILE, json.dumps(flags, indent=1) + "\n")
    write_whole(PAGE, reference_page(flags))


if __name__ == "__main__":
    main()
