"""Sentences and their labels: from the Hub or from files, checked row by row, to rows that a classifier reads."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .data import BUILDERS, load_file, load_or_refuse
from .demo import demo_rows
from .errors import find_named, refuse_below, refuse_missing_files
from .glue import BY_NAME, DEMO, GLUE, PAIR, PROMPTS, TASKS, Task, ask, find_prompt, own_task

logger = logging.get_logger(__name__)

USUAL_COLUMNS = (PAIR, ("premise", "hypothesis"), ("question1", "question2"), ("sentence",), ("text",))
"""Columns of sentences that are taken where none are named, the first that are there."""

SPLITS = ("train", "validation", "test")

LENGTH = "_length"

HIDDEN = -1
"""The label of the rows of a test split whose labels are kept secret."""


@dataclass
class SentenceArguments:
    """What to classify."""

    task_name: str | None = field(
        default=None,
        metadata={
            "help": f"A task of GLUE: {', '.join(TASKS)}; read from the Hub, or from files that have its columns. Or "
            "demo, made on the spot. Default: mrpc, unless files are given: then a task of your own."
        },
    )
    train_file: str | None = field(
        default=None, metadata={"help": "Training rows: .json, .jsonl, .csv or .parquet, instead of those on the Hub."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "Evaluation rows, in the same formats."})
    test_file: str | None = field(
        default=None, metadata={"help": "Rows for --do_predict, in the same formats; labels may be missing."}
    )
    sentence_columns: list[str] | None = field(
        default=None, metadata={"help": "The column of the sentence, or the two of both. Default: those of the task."}
    )
    label_column: str = field(default="label", metadata={"help": "The column of the label."})
    classes: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the labels, in order, for a task of your own. Default: those in the training rows, "
            "sorted."
        },
    )
    regression: bool | None = field(
        default=None,
        metadata={
            "help": "Labels are numbers to be said. Default: where those of --train_file have fractions.",
            "nargs": "?",  # as for a flag whose default is no None
            "const": True,
        },
    )
    prompt: str = field(
        default="none",
        metadata={"help": f"What stands before the sentences: {', '.join(PROMPTS)}, or a text of your own."},
    )
    max_seq_length: int | None = field(
        default=None,
        metadata={"help": "Most tokens of a row; what is longer is cut. Default: the model's context, at most 512."},
    )
    merge_validation: bool = field(
        default=False, metadata={"help": "Train on training and validation rows, with --do_predict for the test."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first so many training rows."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Use only the first so many rows of the evaluation and test sets."}
    )
    metrics_from: str = field(
        default="scikit-learn",
        metadata={
            "help": "evaluate: compute the scores with code that the library of this name fetches from the Hub, and "
            "runs. The numbers are the same.",
            "choices": ["scikit-learn", "evaluate"],
        },
    )

    def __post_init__(self) -> None:
        says_nothing = self.sentence_columns is None and self.classes is None and self.regression is None
        if self.task_name is None and says_nothing and not self.files:
            self.task_name = "mrpc"
        if self.task_name is not None:
            self.task_name = self.task_name.lower()
            task = find_named("--task_name", self.task_name, BY_NAME)
            own = {"sentence_columns": self.sentence_columns, "classes": self.classes}
            for flag, value in own.items():
                if value is not None:
                    raise ValueError(f"--{flag} is for a task of your own; --task_name {self.task_name} says it.")
            if self.regression is not None and self.regression == bool(task.labels):
                kind = "labels" if task.labels else "a number"
                raise ValueError(f"--regression {self.regression}: --task_name {self.task_name} has {kind}.")
        if self.sentence_columns is not None and not 1 <= len(self.sentence_columns) <= 2:
            raise ValueError(f"--sentence_columns takes one or two, got {' '.join(self.sentence_columns)}.")
        if self.classes is not None and (self.regression or len(set(self.classes)) < 2):
            raise ValueError("--classes takes two or more different names, and is not for --regression.")
        refuse_missing_files(self, "train_file", "validation_file", "test_file")
        refuse_below(self, {"max_seq_length": 8, "max_train_samples": 1, "max_eval_samples": 1})
        self.prompt_text = find_prompt(self.prompt)

    def settle(self, task: Task) -> None:
        """Fill in what was found out of a task of one's own, so that it is written down."""
        if self.task_name is None:
            self.sentence_columns, self.regression = list(task.columns), not task.labels
            self.classes = list(task.labels) or None

    @property
    def files(self) -> dict[str, str]:
        named = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        return {split: path for split, path in named.items() if path is not None}


@dataclass(frozen=True)
class Sentences:
    """Rows of all splits that were asked for, checked.

    Attributes:
        splits: With columns `text`, what the model reads, and `label`, where labels are known; by "train",
            "validation", "test", and "validation_mm", "test_mm" where a task has a second one.
    """

    task: Task
    splits: dict[str, Dataset]


def load_sentences(arguments: SentenceArguments, splits: Collection[str]) -> Sentences:
    """Load and check the rows of these splits.

    Raises:
        ValueError: A split, a column or a label is missing or cannot be right; the message names flag, row and value.
    """
    merges = arguments.merge_validation and "train" in splits
    wanted = [split for split in SPLITS if split in splits or (merges and split == "validation")]
    if arguments.files or arguments.task_name is None:
        says_labels = arguments.task_name or arguments.classes or arguments.regression
        loaded = _load_files(arguments, wanted if says_labels else ["train", *wanted])
    else:
        loaded = _load_named(arguments, wanted)
    for split in wanted:
        if split not in loaded:
            raise ValueError(f"There are no {split} rows: give --{split}_file.")
    task = _task_of(arguments, loaded)
    checked = {}
    for split, (rows, origin) in loaded.items():
        if split == "train" and split not in wanted:
            continue  # it was there to tell the labels
        limit = arguments.max_train_samples if split == "train" else arguments.max_eval_samples
        first = rows if limit is None else rows.select(range(min(limit, len(rows))))
        checked[split] = _checked(first, origin, task, arguments, may_hide=split.startswith("test"))
    if merges:
        checked["train"] = concatenate_datasets([checked["train"], checked.pop("validation")])
        checked.pop("validation_mm", None)
    if arguments.prompt == "perfect" and len(task.columns) == 1:
        logger.warning("--prompt perfect asks about two sentences, and there is one.")
    return Sentences(task, checked)


Loaded = dict[str, tuple[Dataset, str]]
"""Rows, and the flag that names them, by split."""


def _load_files(arguments: SentenceArguments, splits: Collection[str]) -> Loaded:
    loaded: Loaded = {}
    for split, path in arguments.files.items():
        if split not in splits:
            continue
        if Path(path).suffix.lower() not in BUILDERS:
            raise ValueError(f"--{split}_file {path} has no columns: it must be one of {', '.join(BUILDERS)}.")
        rows = load_file(f"{split}_file", path, streaming=False)
        loaded[split] = rows.rows, rows.origin
    return loaded


def _load_named(arguments: SentenceArguments, splits: Collection[str]) -> Loaded:
    name = arguments.task_name or ""
    origin = f"--task_name {name}"
    if name == DEMO:
        return {split: (Dataset.from_list(demo_rows(split)), origin) for split in splits}
    found = load_or_refuse(origin, GLUE, name)
    task = TASKS[name]
    names = {"train": ("train",), "validation": task.validation, "test": task.test}
    loaded: Loaded = {}
    for split in splits:
        for suffix, alias in zip(("", "_mm"), names[split], strict=False):
            loaded[split + suffix] = found[alias], f"{origin}, {alias} split"
    return loaded


def _task_of(arguments: SentenceArguments, loaded: Loaded) -> Task:
    """Return the task, one's own made from flags and from what the training rows hold."""
    if arguments.task_name is not None:
        return BY_NAME[arguments.task_name]
    rows, origin = loaded.get("train") or next(iter(loaded.values()))
    columns = arguments.sentence_columns or next(
        (each for each in USUAL_COLUMNS if set(each) <= set(rows.column_names)), None
    )
    if columns is None:
        raise ValueError(
            f"Which columns of {origin} are the sentences? Choose with --sentence_columns from "
            f"{', '.join(rows.column_names)}."
        )
    if arguments.classes is not None:
        return own_task(columns, arguments.classes)
    if arguments.regression:
        return own_task(columns, ())
    if "train" not in loaded:
        raise ValueError("Which labels are there? Give --classes, --regression true, or --train_file.")
    _refuse_without(arguments.label_column, rows, origin, "--label_column")
    feature = rows.features[arguments.label_column]
    if isinstance(feature, ClassLabel):
        return own_task(columns, feature.names)
    values = rows.unique(arguments.label_column)
    if arguments.regression is None and any(isinstance(value, float) and value % 1 for value in values):
        return own_task(columns, ())
    return own_task(columns, _names_of(values, origin, arguments.label_column))


def _names_of(values: Sequence[Any], origin: str, column: str) -> list[str]:
    """Return the names of labels: themselves, sorted, or 0 to n-1 where they are whole numbers."""
    if all(isinstance(value, str) for value in values):
        names = sorted(values)
    elif all(map(_is_whole, values)):
        numbers = sorted({int(value) for value in values})
        if numbers != list(range(len(numbers))):
            raise ValueError(
                f"Labels out of range: whole numbers in column {column} of {origin} must be 0 to n-1 without gaps, "
                f"found {', '.join(map(str, numbers[:10]))}. Are they numbers to be said? Then add --regression true."
            )
        names = [str(number) for number in numbers]
    else:
        shown = ", ".join(repr(value) for value in values[:5])
        if all(isinstance(value, float) for value in values):
            raise ValueError(f"Labels in column {column} of {origin} are numbers with fractions, no classes: {shown}.")
        raise ValueError(f"Labels in column {column} of {origin} are neither all texts nor all numbers: {shown}.")
    if len(names) < 2:
        raise ValueError(f"All labels in column {column} of {origin} are {names[0]}: there is nothing to learn.")
    return names


def _refuse_without(column: str, rows: Dataset, origin: str, flag: str) -> None:
    if column not in rows.column_names:
        raise ValueError(f"{origin} has no column {column}; it has {', '.join(rows.column_names)}. See {flag}.")


def _checked(rows: Dataset, origin: str, task: Task, arguments: SentenceArguments, may_hide: bool) -> Dataset:
    """Return the rows with `text` and, if they have labels, `label`, an index or a number."""
    if len(rows) == 0:
        raise ValueError(f"{origin} is empty.")
    flag = "--task_name" if arguments.task_name else "--sentence_columns"
    for column in task.columns:
        _refuse_without(column, rows, origin, flag)
        for index, value in enumerate(rows[column][:]):
            if not isinstance(value, str):
                raise ValueError(f"Column {column} of {origin} must hold text; row {index + 1} holds {value!r}.")
    texts = [
        ask(arguments.prompt_text, sentences)
        for sentences in zip(*(rows[each][:] for each in task.columns), strict=True)
    ]
    column = arguments.label_column
    if may_hide and column not in rows.column_names:
        return Dataset.from_dict({"text": texts})
    _refuse_without(column, rows, origin, "--label_column")
    values = rows[column][:]
    if may_hide and all(value in (HIDDEN, None) for value in values):
        return Dataset.from_dict({"text": texts})
    label = _number_of if not task.labels else _index_of
    labels = [label(value, task, f"row {i + 1}, column {column} of {origin}") for i, value in enumerate(values)]
    return Dataset.from_dict({"text": texts, "label": labels})


def _index_of(value: Any, task: Task, where: str) -> int:
    """Return the index of a label that is given by it, or by name."""
    names = task.labels
    if isinstance(value, str) and value in names:
        return names.index(value)
    if _is_whole(value) and 0 <= value < len(names):
        return int(value)
    known = f"0 to {len(names) - 1}" + ("" if names[0] == "0" else f" or {', '.join(names)}")
    hidden = " (hidden labels cannot be trained or evaluated on)" if value == HIDDEN else ""
    raise ValueError(f"Label out of range: {where} is {value!r}{hidden}; it must be {known}.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value == int(value)


def _number_of(value: Any, task: Task, where: str) -> float:
    low, high = task.span or (-math.inf, math.inf)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and low <= number <= high):
        between = f" between {low:g} and {high:g}" if task.span else ""
        raise ValueError(f"Label out of range: {where} is {value!r}; it must be a number{between}.")
    return number


def tokenize_sentences(sentences: Sentences, tokenizer: PreTrainedTokenizerBase, length: int) -> dict[str, Dataset]:
    """Turn rows into `input_ids`, `attention_mask` and `labels`. How many rows had to be cut is said.

    Raises:
        ValueError: Rows of unequal length could not be filled up.
    """
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"The tokenizer of {tokenizer.name_or_path} has no pad token, and no end-of-text token to take for it: "
            "give another --tokenizer_name."
        )

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        whole = tokenizer(batch["text"], verbose=False)
        lengths = [len(ids) for ids in whole["input_ids"]]
        fits = max(lengths) <= length
        return {**(whole if fits else tokenizer(batch["text"], truncation=True, max_length=length)), LENGTH: lengths}

    found = {}
    for split, rows in sentences.splits.items():
        encoded = rows.map(encode, batched=True, remove_columns=["text"], desc=f"Tokenizing {split}")
        lengths = encoded[LENGTH]
        if cut := sum(each > length for each in lengths):
            logger.warning(
                f"{cut} of {len(lengths)} {split} rows are longer than --max_seq_length {length}, and were cut; the "
                f"longest has {max(lengths)} tokens."
            )
        encoded = encoded.remove_columns([LENGTH])
        found[split] = encoded.rename_column("label", "labels") if "label" in encoded.column_names else encoded
    return found
