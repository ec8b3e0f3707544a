"""Load sentences and labels from the Hub or from files, check each row, and tokenize them for a classifier."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.arguments import SPLIT_ALIASES
from ..data.demo import demo_rows
from ..data.identity import name_sources, with_rows
from ..data.readers import format_of
from ..data.sources import is_saved_to_disk, load_or_refuse, load_table
from ..data.tasks import BY_NAME, DEMO, GLUE, PAIR, PROMPTS, TASKS, Task, ask, find_prompt, own_task
from ..records.errors import find_named, refuse_below, refuse_missing_files
from .labels import (
    Classes,
    LabelColumn,
    Order,
    find_classes,
    indices_of,
    is_number,
    numbers_of,
    read_labels,
    refuse_two_orders,
    shortened,
    warn_of_sorted,
)

logger = logging.get_logger(__name__)

USUAL_COLUMNS = (PAIR, ("premise", "hypothesis"), ("question1", "question2"), ("sentence",), ("text",))
"""Columns to use as sentences by default: the first of these that the data have."""

SPLITS = ("train", "validation", "test")

LENGTH = "_length"


@dataclass
class SentenceArguments:
    """What to classify."""

    task_name: str | None = field(
        default=None,
        metadata={
            "help": f"A GLUE task ({', '.join(TASKS)}), or demo. It is read from the Hub, or from files with the same "
            "columns; demo is generated. Default: mrpc, or a task of your own if data are given."
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Rows for a task of your own: a data set on the Hub, or a directory. With --task_name, the rows "
            "must have the columns of that task."
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the data set, e.g. mrpc of nyu-mll/glue."}
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Training rows: .json, .jsonl, .ndjson, .csv, .tsv or .parquet, instead of those on the Hub. All "
            "but .parquet may be compressed: .gz, .bz2, .xz, .zst, .lz4, .zip."
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "Evaluation rows, in the same formats."})
    test_file: str | None = field(
        default=None, metadata={"help": "Rows for --do_predict, in the same formats; labels may be missing."}
    )
    sentence_columns: list[str] | None = field(
        default=None, metadata={"help": "One or two columns with the sentences. Default: those of the task."}
    )
    label_column: str = field(default="label", metadata={"help": "The column with the label."})
    classes: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the labels, in order, for a task of your own. Default: the labels of the training rows, "
            "sorted."
        },
    )
    regression: bool | None = field(
        default=None,
        metadata={
            "help": "true: labels are regression targets; false: labels are classes. Default: true if labels of the "
            "training rows have fractions, false for text and for integers 0 to n-1, n up to 4. Otherwise required.",
            "nargs": "?",  # HfArgumentParser sets it only for a flag whose default is not None
            "const": True,
        },
    )
    prompt: str = field(
        default="none",
        metadata={"help": f"Prompt before the sentences: {', '.join(PROMPTS)}, or a text of your own."},
    )
    max_seq_length: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens per row; longer rows are cut. Default: 512, or the model's context length if less."
        },
    )
    merge_validation: bool = field(
        default=False, metadata={"help": "Train on training and validation rows; use --do_predict for the test set."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first N training rows."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Use only the first N rows of the evaluation and test sets."}
    )
    max_predict_samples: int | None = field(
        default=None,
        metadata={"help": "Use only the first N rows of the test set. Default: --max_eval_samples."},
    )
    metrics_from: str = field(
        default="scikit-learn",
        metadata={
            "help": "Library for the scores. evaluate fetches code from the Hub and runs it. The scores are the same.",
            "choices": ["scikit-learn", "evaluate"],
        },
    )

    def __post_init__(self) -> None:
        says_nothing = self.sentence_columns is None and self.classes is None and self.regression is None
        if self.dataset_config_name is not None and self.dataset_name is None:
            raise ValueError("--dataset_config_name needs --dataset_name.")
        if self.task_name is None and says_nothing and not self.files and self.dataset_name is None:
            self.task_name = "mrpc"
        if self.task_name is not None:
            self.task_name = self.task_name.lower()
            task = find_named("--task_name", self.task_name, BY_NAME)
            own = {"sentence_columns": self.sentence_columns, "classes": self.classes}
            for flag, value in own.items():
                if value is not None:
                    raise ValueError(
                        f"--{flag} is only for a task of your own, but --task_name is {self.task_name}. Leave one out."
                    )
            if self.regression is not None and self.regression == bool(task.labels):
                kind = "a classification" if task.labels else "a regression"
                raise ValueError(f"--regression {self.regression}: --task_name {self.task_name} is {kind}.")
        if self.sentence_columns is not None and not 1 <= len(self.sentence_columns) <= 2:
            raise ValueError(f"--sentence_columns takes one or two columns, got {' '.join(self.sentence_columns)}.")
        columns = self.sentence_columns or (BY_NAME[self.task_name].columns if self.task_name else ())
        if self.label_column in columns or len(set(columns)) < len(columns):
            raise ValueError(
                f"Sentences and label must be in different columns, but sentences are in {' and '.join(columns)}, the "
                f"label in {self.label_column}. See --sentence_columns and --label_column."
            )
        if self.classes is not None and (self.regression or len(set(self.classes)) < 2):
            raise ValueError("--classes takes two or more different names, and cannot be used with --regression.")
        refuse_missing_files(self, "train_file", "validation_file", "test_file")
        refuse_below(
            self, {"max_seq_length": 8, "max_train_samples": 1, "max_eval_samples": 1, "max_predict_samples": 1}
        )
        self.prompt_text = find_prompt(self.prompt)

    def settle(self, task: Task) -> None:
        """Set the flags that were found from the data of the user's own task, so that they are recorded."""
        if self.task_name is None:
            self.sentence_columns, self.regression = list(task.columns), not task.labels
            self.classes = list(task.labels) or None

    @property
    def files(self) -> dict[str, str]:
        named = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        return {split: path for split, path in named.items() if path is not None}

    def limit_of(self, split: str) -> str:
        """Return the flag, without dashes, that limits the rows of a split."""
        if split == "train":
            return "max_train_samples"
        has_own = split.startswith("test") and self.max_predict_samples is not None
        return "max_predict_samples" if has_own else "max_eval_samples"


@dataclass(frozen=True)
class Sentences:
    """The checked rows of all requested splits.

    Attributes:
        splits: Columns `text`, the input of the model, and `label`, if known. Keys are "train", "validation", "test",
            and "validation_mm", "test_mm" if the task has a second such split.
    """

    task: Task
    splits: dict[str, Dataset]


def load_sentences(arguments: SentenceArguments, splits: Collection[str], with_sources: bool = False) -> Sentences:
    """Load and check the rows of these splits.

    Args:
        with_sources: Record in `SOURCE_COLUMN` which row of which source each training row is.

    Raises:
        ValueError: A split, a column or a label is missing or invalid; the message names flag, row and value.
    """
    merges = arguments.merge_validation and "train" in splits
    wanted = [split for split in SPLITS if split in splits or (merges and split == "validation")]
    if arguments.files or arguments.dataset_name or arguments.task_name is None:
        says_labels = arguments.task_name or arguments.classes or arguments.regression
        needed = wanted if says_labels else ["train", *wanted]
        loaded = _load_data_set(arguments, needed) | _load_files(arguments, needed)
    else:
        loaded = _load_named(arguments, wanted)
    for split in wanted:
        if split not in loaded:
            where = f"--dataset_name {arguments.dataset_name} has" if arguments.dataset_name else "There are"
            raise ValueError(f"{where} no {split} rows. Give --{split}_file.")
    labels = {
        split: read_labels(each.rows, arguments.label_column, each.origin, each.are_cells)
        for split, each in loaded.items()
        if arguments.label_column in each.rows.column_names
    }
    task, classes = _task_of(arguments, loaded, labels)
    if arguments.label_column in task.columns:
        raise ValueError(
            f"--label_column {arguments.label_column} is also a column of sentences, which would contain the answer."
        )
    if classes is not None:
        refuse_two_orders(list(labels.values()), classes)
    checked = {}
    sources: list[str] = []
    for split, found in loaded.items():
        if split not in {*wanted, *(f"{each}_mm" for each in wanted)}:
            continue  # it was loaded only to find the labels
        flag = arguments.limit_of(split)
        column, limit = labels.get(split), getattr(arguments, flag)
        if limit is not None and limit < len(found.rows):
            if column is not None:
                warn_of_sorted(column, limit, f"--{flag}", are_classes=classes is not None)
                column = column.first(limit)
            found = replace(found, rows=found.rows.select(range(limit)))
        checked[split] = _checked(found, column, task, classes, arguments, may_hide=split.startswith("test"))
        if with_sources and (split == "train" or (merges and split == "validation")):
            checked[split] = with_rows(checked[split], len(sources))
            sources.append(arguments.files.get(split, found.origin))
    if merges:
        checked["train"] = concatenate_datasets([checked["train"], checked.pop("validation")])
        checked.pop("validation_mm", None)
    if sources:
        name_sources(checked["train"], sources)
    if arguments.prompt == "perfect" and len(task.columns) == 1:
        logger.warning("--prompt perfect asks about two sentences, but this task has one.")
    return Sentences(task, checked)


@dataclass(frozen=True)
class Loaded:
    """The rows of one split, as loaded.

    Attributes:
        origin: The flag that they come from, for messages.
        are_cells: All values are text, as in a .csv.
    """

    rows: Dataset
    origin: str
    are_cells: bool = False


def _load_files(arguments: SentenceArguments, splits: Collection[str]) -> dict[str, Loaded]:
    loaded: dict[str, Loaded] = {}
    for split, path in arguments.files.items():
        if split in splits:
            flag = f"{split}_file"
            loaded[split] = Loaded(load_table(flag, path), f"--{flag} {path}", format_of(path).reader == "csv")
    return loaded


def _load_data_set(arguments: SentenceArguments, splits: Collection[str]) -> dict[str, Loaded]:
    if arguments.dataset_name is None:
        return {}
    name, origin = arguments.dataset_name, f"--dataset_name {arguments.dataset_name}"
    if is_saved_to_disk(Path(name)):
        found = load_from_disk(name)
    else:
        found = load_or_refuse(origin, name, arguments.dataset_config_name)
    if isinstance(found, Dataset):
        found = DatasetDict(train=found)
    aliases = {alias: split for split in SPLITS for alias in SPLIT_ALIASES[split][::-1]}
    return {
        split: Loaded(found[alias], f"{origin}, {alias} split")
        for alias, split in aliases.items()
        if alias in found and split in splits
    }


def _load_named(arguments: SentenceArguments, splits: Collection[str]) -> dict[str, Loaded]:
    name = arguments.task_name or ""
    origin = f"--task_name {name}"
    if name == DEMO:
        return {split: Loaded(Dataset.from_list(demo_rows(split)), origin) for split in splits}
    found = load_or_refuse(origin, GLUE, name)
    task = TASKS[name]
    names = {"train": ("train",), "validation": task.validation, "test": task.test}
    loaded: dict[str, Loaded] = {}
    for split in splits:
        for suffix, alias in zip(("", "_mm"), names[split], strict=False):
            loaded[split + suffix] = Loaded(found[alias], f"{origin}, {alias} split")
    return loaded


def _task_of(
    arguments: SentenceArguments, loaded: Mapping[str, Loaded], labels: Mapping[str, LabelColumn]
) -> tuple[Task, Classes | None]:
    """Return the task and its classes, if any. The user's own task is built from flags and training rows."""
    if arguments.task_name is not None:
        task = BY_NAME[arguments.task_name]
        source = f"--task_name {arguments.task_name}"
        return task, Classes(task.labels, Order.TASK, source) if task.labels else None
    found = loaded.get("train") or next(iter(loaded.values()))
    names = found.rows.column_names
    columns = arguments.sentence_columns or next(
        (each for each in USUAL_COLUMNS if set(each) <= {*names} - {arguments.label_column}), None
    )
    if columns is None:
        raise ValueError(
            f"Which columns of {found.origin} are the sentences? Choose with --sentence_columns from "
            f"{', '.join(names)}."
        )
    if arguments.classes is not None:
        return own_task(columns, arguments.classes), Classes(tuple(arguments.classes), Order.FLAG, "--classes")
    if arguments.regression:
        return own_task(columns, ()), None
    if "train" not in loaded:
        raise ValueError("The labels are not known. Give --classes, --regression true, or --train_file.")
    _refuse_empty(found)
    if "train" not in labels:
        raise _lacks(arguments.label_column, found, "--label_column")
    others = [column for split, column in labels.items() if split != "train"]
    classes = find_classes(labels["train"], others, arguments.regression)
    return own_task(columns, () if classes is None else classes.names), classes


def _refuse_empty(found: Loaded) -> None:
    if len(found.rows) == 0:
        raise ValueError(f"{found.origin} is empty.")


def _lacks(column: str, found: Loaded, flag: str) -> ValueError:
    """Return the error for a missing column."""
    return ValueError(
        f"{found.origin} has no column {column}; it has {', '.join(found.rows.column_names)}. See {flag}."
    )


def _checked(
    found: Loaded,
    labels: LabelColumn | None,
    task: Task,
    classes: Classes | None,
    arguments: SentenceArguments,
    may_hide: bool,
) -> Dataset:
    """Return the rows with `text` and, if they have labels, `label`: an index or a number."""
    _refuse_empty(found)
    flag = "--task_name" if arguments.task_name else "--sentence_columns"
    columns = [_sentences_in(found, column, flag) for column in task.columns]
    texts = [ask(arguments.prompt_text, sentences) for sentences in zip(*columns, strict=True)]
    if may_hide and (labels is None or labels.is_hidden(task.labels)):
        return Dataset.from_dict({"text": texts})
    if labels is None:
        raise _lacks(arguments.label_column, found, "--label_column")
    label = indices_of(labels, classes) if classes is not None else numbers_of(labels, task.span)
    return Dataset.from_dict({"text": texts, "label": label})


def _sentences_in(found: Loaded, column: str, flag: str) -> list[str]:
    """Return the sentences in a column. Warn about empty ones.

    Args:
        flag: The flag that chooses the column, for messages.

    Raises:
        ValueError: There is no such column, or a value is not text.
    """
    if column not in found.rows.column_names:
        raise _lacks(column, found, flag)
    values: list[str] = found.rows[column][:]
    # In a .csv all values are text. There, a column with only numbers is not a column of sentences.
    are_numbers = found.are_cells and all(map(is_number, values))
    bad = [index for index, value in enumerate(values) if are_numbers or not isinstance(value, str)]
    if bad:
        value = values[bad[0]]
        more = f" ({len(bad):,} of {len(values):,} rows have no text)" if len(bad) > 1 else ""
        raise ValueError(
            f"Column {column} of {found.origin} must be text, but row {bad[0] + 1} has {shortened(value)}{more}. "
            f"See {flag}."
        )
    empty = [index for index, value in enumerate(values) if not value.strip()]
    if empty:
        logger.warning(
            f"Column {column} of {found.origin} is empty in {len(empty):,} of {len(values):,} rows. The first is row "
            f"{empty[0] + 1}."
        )
    return values


def tokenize_sentences(sentences: Sentences, tokenizer: PreTrainedTokenizerBase, length: int) -> dict[str, Dataset]:
    """Turn rows into `input_ids`, `attention_mask` and `labels`. Warn about rows that are cut.

    Raises:
        ValueError: The tokenizer has no token for padding.
    """
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"The tokenizer of {tokenizer.name_or_path} has neither a pad token nor an end-of-text token. "
            "Give another --tokenizer_name."
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
                f"{cut} of {len(lengths)} {split} rows are longer than --max_seq_length {length} and were cut; the "
                f"longest has {max(lengths)} tokens."
            )
        encoded = encoded.remove_columns([LENGTH])
        found[split] = encoded.rename_column("label", "labels") if "label" in encoded.column_names else encoded
    return found
