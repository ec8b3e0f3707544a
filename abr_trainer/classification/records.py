"""Files of a classifier in addition to its weights: its task, for later evaluations, and its predictions."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from huggingface_hub import hf_hub_download
from peft import load_peft_weights
from transformers import PreTrainedConfig, Trainer
from transformers.trainer_utils import PredictionOutput
from transformers.utils import logging

from ..data.tasks import BY_NAME, Task
from ..models.adapters import FLAG, FLAGS
from ..records.files import (
    CHECKPOINT_PREFIX,
    PREDICTIONS_NAME,
    QUANT_CONFIG_NAME,
    TASK_NAME,
    read_json,
    read_lines,
    write_whole,
)
from ..records.flags import expand_flags_file, given_flags, is_on
from .labels import key_of, shown
from .scores import logits_of, predictions_of
from .sentences import SentenceArguments

logger = logging.get_logger(__name__)

TOLD = (
    *("task_name", "sentence_columns", "label_column", "classes", "regression", "prompt", "max_seq_length"),
    *(
        "config_name",
        "attn_implementation",
        "torch_dtype",
        "load_in_8bit",
        "load_in_4bit",
        "bnb_4bit_compute_dtype",
        "use_lora",
    ),
    *("bf16", "fp16", "per_device_eval_batch_size"),
)
"""Flags of the training that predictions depend on. A later evaluation uses them as defaults."""

OF_TASK = ("task_name", "sentence_columns", "classes", "regression")


def remember_task(directory: Path, arguments: Sequence[Any]) -> None:
    """Write `task.json`: the flags that predictions depend on, for a later evaluation.

    Args:
        arguments: The dataclasses of the command line.
    """
    values = {name: getattr(each, name) for each in arguments for name in TOLD if hasattr(each, name)}
    if values["config_name"] is not None and Path(values["config_name"]).exists():
        values["config_name"] = None  # a path of this machine
    flags = {name: values[name] for name in TOLD if values[name] is not None}
    write_whole(directory / TASK_NAME, _task_file(flags))


def remember_model(directory: Path, model: Any) -> None:
    """Write the configuration of a model as `config.json`, and its quantisation, if any, as `quant_config.json`."""
    config: PreTrainedConfig = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    write_whole(directory / "config.json", config.to_json_string())
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is not None:
        settings = quantisation if isinstance(quantisation, dict) else quantisation.to_dict()
        write_whole(directory / QUANT_CONFIG_NAME, json.dumps(settings, indent=1, default=str) + "\n")


def recall_task(name: str) -> dict[str, Any]:
    """Return the flags that a classifier was trained with, from its directory, that of its run, or the Hub."""
    flags = _recall(name, TASK_NAME).get("flags", {})
    return {flag: flags[flag] for flag in TOLD if flag in flags}


def _recall(name: str, file: str) -> dict[str, Any]:
    """Return the content of a JSON file of a classifier; empty if there is none."""
    places = [Path(name, file)]
    if Path(name).name.startswith(CHECKPOINT_PREFIX):
        places.append(Path(name).parent / file)
    found = next((content for place in places if (content := read_json(place)) is not None), None)
    if found is None and not Path(name).exists():
        with contextlib.suppress(OSError, ValueError):  # no such repository, no such file in it, no network
            found = read_json(Path(hf_hub_download(name, file)))
    return found if isinstance(found, dict) else {}


def classes_in(config: Mapping[Any, Any] | None) -> list[str]:
    """Return the names of classes, in order, from the `id2label` of a model; empty if they are only numbered.

    >>> classes_in({1: "pos", 0: "neg"}), classes_in({0: "LABEL_0", 1: "LABEL_1"})
    (['neg', 'pos'], [])
    """
    by_index = {int(index): str(name) for index, name in (config or {}).items()}
    names = [by_index[index] for index in sorted(by_index)]
    return [] if names == [f"LABEL_{index}" for index in range(len(names))] else names


def classes_told(flags: Mapping[str, Any]) -> list[str]:
    """Return the classes in recorded flags, in order."""
    task = BY_NAME.get(flags.get("task_name") or "")
    return list(task.labels) if task is not None else flags.get("classes") or []


def differ_in_order(before: Sequence[str], now: Sequence[str]) -> bool:
    """Tell whether these are the same classes in another order."""
    keys = [list(map(key_of, names)) for names in (before, now)]
    return keys[0] != keys[1] and sorted(keys[0]) == sorted(keys[1])


def take_up_classes(arguments: SentenceArguments, checkpoint: str) -> None:
    """Use the classes of the checkpoint for a resumed run.

    Raises:
        ValueError: The command line gives other classes.
    """
    told = recall_task(checkpoint)
    if arguments.task_name is None and arguments.classes is None and not arguments.regression:
        arguments.classes = told.get("classes")
        if arguments.regression is None:
            arguments.regression = told.get("regression")
    before, now = classes_told(told), classes_told(vars(arguments))
    if before and now and before != now:
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint} was trained with the classes {shown(before)}, not {shown(now)}."
        )


def recall_labels(name: str) -> dict[str, Any]:
    """Return the settings for the labels of an adapter in a model's configuration: their names, or at least their
    number.

    Raises:
        ValueError: Neither the configuration of the adapter's model nor the adapter's head has them.
    """
    config = _recall(name, "config.json")
    if config:
        labels = {name: config[name] for name in ("id2label", "label2id", "problem_type") if config.get(name)}
        if "id2label" in labels:
            labels["id2label"] = {int(index): label for index, label in labels["id2label"].items()}
        return labels
    heads = [
        weight
        for key, weight in load_peft_weights(name, device="cpu").items()
        if weight.dim() == 2 and {"score", "classifier"} & set(key.split("."))
    ]
    if not heads:
        raise ValueError(f"{FLAG} {name} has no config.json, so its labels are not known.")
    return {"num_labels": len(heads[-1])}


def task_of_merged(name: str) -> dict[str, str]:
    """Return the task file for a classifier with a merged adapter, for later evaluations; empty if there is none."""
    of_base = ("config_name", "torch_dtype", "load_in_8bit", "load_in_4bit", "bnb_4bit_compute_dtype")
    flags = {flag: value for flag, value in recall_task(name).items() if flag not in of_base}
    return {TASK_NAME: _task_file({**flags, "use_lora": False})} if flags else {}


def _task_file(flags: dict[str, Any]) -> str:
    return json.dumps({"format": 1, "flags": flags}, indent=1) + "\n"


def named_in(argv: Sequence[str] | None, names: Sequence[str]) -> str | None:
    """Return the value of the first of these flags in a command line.

    Args:
        argv: The command line; None for that of this process.
    """
    given = given_flags(expand_flags_file(sys.argv[1:] if argv is None else argv))
    return next((given[name][-1] for name in names if given.get(name)), None)


def recalled_flags(classes: Sequence[Any], argv: Sequence[str] | None, names: Sequence[str] = FLAGS) -> dict[str, Any]:
    """Return the flags that a classifier was trained with, as defaults for a command line that uses it.

    Args:
        classes: Dataclasses that the command line is parsed into.
        argv: The command line; None for that of this process.
        names: Flags for a classifier. The first one given is used.

    Raises:
        ValueError: The command line gives the classes in another order.
    """
    found = named_in(argv, names)
    if found is None:
        return {}
    given = given_flags(expand_flags_file(sys.argv[1:] if argv is None else argv))
    told = recall_task(found)
    if not told:
        of_model = classes_in(_recall(found, "config.json").get("id2label"))
        told = {"classes": of_model} if len(of_model) > 1 else {}
        which = f"The classes are taken from its config.json: {shown(of_model)}. " if told else ""
        logger.warning(f"{found} has no {TASK_NAME}. {which}Task, prompt and quantisation are taken from the flags.")
    before = classes_told(told)
    for flag in ("--classes", "--task_name"):
        values = given.get(flag, [])
        now = values if flag == "--classes" else classes_told({"task_name": " ".join(values).lower()})
        if differ_in_order(before, now):
            raise ValueError(
                f"{flag} {' '.join(values)}: {found} was trained with these classes in the order {' '.join(before)}."
            )
    if "--sentence_columns" in given and "task_name" in told:
        told |= {"classes": before} if before else {"regression": True}  # other columns, but the same labels
    replaced = {
        "--task_name": OF_TASK,
        "--sentence_columns": ("task_name",),
        "--classes": ("task_name", "regression"),
        "--regression": ("task_name", "classes") if is_on("--regression", given) else (),
        "--bf16": ("fp16",),
        "--fp16": ("bf16",),
        "--load_in_8bit": ("load_in_4bit",),
        "--load_in_4bit": ("load_in_8bit",),
    }
    gone = [flag for name, flags in replaced.items() if name in given for flag in flags]
    known = {each.name for kind in classes for each in fields(kind)}
    return {flag: value for flag, value in told.items() if flag in known and flag not in gone}


def predict(trainer: Trainer, rows: Dataset, split: str, task: Task) -> dict[str, float]:
    """Write the predictions on a split into the output directory, and return its metrics."""
    found = trainer.predict(rows, metric_key_prefix=split)
    if trainer.is_world_process_zero():
        path = predictions_file(trainer.args.output_dir, split)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_predictions(path, task, found, rows)
    return dict(found.metrics or {})


def predictions_file(directory: str | None, split: str) -> Path:
    """Return the path of a run's predictions on a split."""
    return Path(directory or "", PREDICTIONS_NAME.format(split=split))


def write_predictions(path: Path, task: Task, found: PredictionOutput, rows: Dataset) -> None:
    """Write one line per row: `row` from 1, `prediction`, `label` if known, `logits`, and a digest of the `input`.

    Logits that are NaN or infinite are written as null, and so is the prediction of such a row.
    """
    logits = logits_of(found.predictions)
    labels = None if found.label_ids is None else np.asarray(found.label_ids)
    said = predictions_of(logits, task)
    lines = []
    for row, (values, digest) in enumerate(zip(logits.reshape(len(logits), -1), digests(rows), strict=True)):
        prediction = named(said[row], task) if np.isfinite(values).all() else None
        line: dict[str, Any] = {"row": row + 1, "prediction": prediction}
        if labels is not None:
            line["label"] = named(labels[row], task)
        line["logits"] = [float(value) if math.isfinite(value) else None for value in values]
        line["input"] = digest
        lines.append(json.dumps(line) + "\n")
    write_whole(path, "".join(lines))


def named(value: Any, task: Task) -> str | float:
    return task.labels[int(value)] if task.labels else float(value)


def digests(rows: Dataset) -> list[str]:
    """Return a digest of the tokens of each row, of eight characters."""
    return [hashlib.sha256(str(ids).encode()).hexdigest()[:8] for ids in rows["input_ids"][:]]


def beside_earlier(path: Path, logits: np.ndarray, task: Task, rows: Dataset) -> str | None:
    """Compare predictions with an earlier file of `write_predictions`, in words; None if it has other rows."""
    if not path.exists():
        return None
    earlier = list(read_lines(path))
    if [line.get("input") for line in earlier] != digests(rows) or any(None in line["logits"] for line in earlier):
        return None
    before = np.array([line["logits"] for line in earlier])
    same = int((predictions_of(before, task) == predictions_of(logits, task)).sum())
    apart = float(np.abs(before - logits.reshape(before.shape)).max())
    return f"{same:,} of {len(logits):,} predictions as in {path}; logits differ by at most {apart:.1e}"
