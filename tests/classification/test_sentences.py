"""Rows of sentences: which columns, which labels, and what is refused."""

from __future__ import annotations

import functools
import gzip
import math
import random
import re

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import AutoTokenizer

from abr_trainer.classification.sentences import SentenceArguments, load_sentences, tokenize_sentences
from abr_trainer.data.demo import DEMO_MODEL
from abr_trainer.data.tasks import TASKS
from abr_trainer.models.arguments import LoadArguments
from abr_trainer.models.loading import load_tokenizer
from tests.conftest import SHARED
from tests.sentence_rows import lay_out_as_on_the_hub, write_rows

PAIR = {"sentence1": "Rain fell.", "sentence2": "It rained.", "label": 1}

gzipped = functools.partial(gzip.compress, mtime=0)
"""The same each time: what tests are called depends on it."""


def load(tmp_path, rows, splits=("train",), **options):
    """Load rows, given as a list, or as a dictionary of lists by split."""
    named = rows if isinstance(rows, dict) else {"train": rows}
    files = {f"{split}_file": write_rows(tmp_path / f"{split}.jsonl", rows) for split, rows in named.items()}
    return load_sentences(SentenceArguments(**{**files, **options}), splits)


def test_mrpc_is_the_default_and_files_are_a_task_of_ones_own(tmp_path):
    assert SentenceArguments().task_name == "mrpc"
    found = load(tmp_path, [PAIR, {**PAIR, "label": 0}])
    assert found.task.columns == ("sentence1", "sentence2")
    assert found.task.labels == ("0", "1")
    assert found.splits["train"]["text"][0] == "Sentence 1: Rain fell. Sentence 2: It rained."


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_tables_are_read(tmp_path, suffix):
    path = tmp_path / f"train.{suffix}"
    getattr(Dataset.from_list([PAIR, {**PAIR, "sentence1": "NA", "label": 0}]), f"to_{suffix}")(path)
    found = load_sentences(SentenceArguments(task_name="mrpc", train_file=str(path)), ["train"])
    assert found.splits["train"]["label"][:] == [1, 0]
    assert found.splits["train"]["text"][1] == "Sentence 1: NA Sentence 2: It rained."


@pytest.mark.parametrize(
    ("labels", "names", "indices"),
    [
        (["yes", "no", "yes"], ("no", "yes"), [1, 0, 1]),
        ([2, 0, 1], ("0", "1", "2"), [2, 0, 1]),
        ([True, False, True], ("0", "1"), [1, 0, 1]),
        ([0.5, 2.5, 1.0], (), [0.5, 2.5, 1.0]),
    ],
    ids=["names", "numbers", "truths", "numbers to be said"],
)
def test_labels_are_found_in_the_training_rows(tmp_path, labels, names, indices):
    found = load(tmp_path, [{"text": "Rain.", "label": label} for label in labels])
    assert found.task.labels == names
    assert found.splits["train"]["label"][:] == indices


# ---- Names win over positions ----


def write_labels(path, labels, names=None):
    """Write rows with these labels, as the suffix says; a `ClassLabel` with these names, if they are given."""
    rows = {"text": [f"Rain {index}." for index in range(len(labels))], "label": labels}
    if path.suffix == ".jsonl":
        return write_rows(path, [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)])
    if path.suffix == ".csv":
        lines = [",".join(rows), *(f"{text},{label}" for text, label in zip(*rows.values(), strict=True))]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)}) if names else None
    Dataset.from_dict(rows, features=features).to_parquet(path)
    return str(path)


def load_labels(folder, splits, **options):
    """Load splits, each given by a suffix, its labels and the names of its `ClassLabel`, if it has one."""
    files = {
        f"{split}_file": write_labels(folder / f"{split}.{suffix}", *labels)
        for split, (suffix, *labels) in splits.items()
    }
    return load_sentences(SentenceArguments(**files, **options), splits)


TO_TEN = list(range(11))


@pytest.mark.parametrize(
    ("train", "validation", "names", "indices"),
    [
        (("parquet", [0, 1], ["neg", "pos"]), ("parquet", [0, 1], ["pos", "neg"]), "neg pos", [1, 0]),
        (("csv", ["pos", "neg"]), ("parquet", [0, 1], ["pos", "neg"]), "neg pos", [1, 0]),
        (("parquet", [0, 1], ["pos", "neg"]), ("jsonl", ["neg", "pos"]), "pos neg", [1, 0]),
        (("jsonl", list(map(str, TO_TEN))), ("csv", TO_TEN), "0 1 2 3 4 5 6 7 8 9 10", TO_TEN),
        (("csv", TO_TEN), ("jsonl", list(map(str, TO_TEN))), "0 1 2 3 4 5 6 7 8 9 10", TO_TEN),
        (("jsonl", ["3", "1", "2"]), ("csv", [1, 2, 3]), "1 2 3", [0, 1, 2]),
        (("jsonl", ["01", "02"]), ("csv", ["02", "01"]), "01 02", [1, 0]),
        (("jsonl", [str(2**53), str(2**53 + 1)]), ("csv", [2**53 + 1]), f"{2**53} {2**53 + 1}", [1]),
        (("csv", ["0.0", "1.0"]), ("jsonl", [1, 0]), "0 1", [1, 0]),
        (("csv", ["True", "False"]), ("jsonl", [True, False]), "False True", [1, 0]),
        (("jsonl", [True, False]), ("csv", ["TRUE", "FALSE"]), "0 1", [1, 0]),
        (("jsonl", ["pos", "neg ", " pos"]), ("csv", [" neg", "pos"]), "neg pos", [0, 1]),
        (("jsonl", ["na\u00efve", "wise"]), ("csv", ["nai\u0308ve", "wise"]), "na\u00efve wise", [0, 1]),
        (("csv", ["pos", "neg"]), ("jsonl", ["Pos", "NEG"]), "neg pos", [1, 0]),
        (("parquet", [0, 1], ["neg", "pos"]), ("csv", [1, 0]), "neg pos", [1, 0]),
        (("csv", [1, 0]), ("parquet", [0, 1], ["neg", "pos"]), "0 1", [0, 1]),
    ],
)
def test_a_class_is_the_same_in_every_split(tmp_path, train, validation, names, indices):
    found = load_labels(tmp_path, {"train": train, "validation": validation})
    assert found.task.labels == tuple(names.split())
    assert found.splits["validation"]["label"][:] == indices


def test_names_of_a_known_task_win_too(tmp_path):
    rows = {"sentence": ["Rain.", "Sun."], "label": [0, 1]}
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["positive", "negative"])})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    arguments = SentenceArguments(task_name="sst2", train_file=str(tmp_path / "train.parquet"))
    assert load_sentences(arguments, ["train"]).splits["train"]["label"][:] == [1, 0]


def test_numbers_are_names_where_classes_are_called_so(tmp_path):
    found = load_labels(tmp_path, {"train": ("csv", [1, 2])}, classes=["1", "2", "3"])
    assert found.splits["train"]["label"][:] == [0, 1]
    with pytest.raises(ValueError, match=r"row 1, column label of .* is 0; it must be one of 1, 2, 3\."):
        load_labels(tmp_path, {"train": ("csv", [0, 2])}, classes=["1", "2", "3"])


def test_what_is_read_by_position_is_said(tmp_path, caplog):
    load_labels(tmp_path, {"train": ("parquet", [0, 1], ["neg", "pos"]), "validation": ("csv", [1, 0])})
    assert "validation.csv are read as positions among the classes: 0 as 'neg', 1 as 'pos'." in caplog.text


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (
            {"train": ("csv", ["entails", "neutral"]), "validation": ("csv", [0, 1])},
            "validation.csv are integers, but names in column label of --train_file FOLDER/train.csv: entails, ",
        ),
        (
            {"train": ("csv", [0, 1]), "validation": ("csv", ["neg", "pos"])},
            "validation.csv are names, but integers in column label of --train_file FOLDER/train.csv: 0, 1. Give",
        ),
        (
            {"train": ("parquet", [0, 1], ["1", "0"]), "validation": ("csv", [0, 1])},
            "Is 0 the name of a class or its position? Labels in column label of --validation_file FOLDER/validation",
        ),
        (
            {"train": ("csv", [0, 1])}
            | {split: ("parquet", [0, 1], names.split()) for split, names in (("validation", "a b"), ("test", "b a"))},
            "are a, b in column label of --validation_file FOLDER/validation.parquet, but b, a in column label of --t",
        ),
        (
            {"train": ("csv", ["a", "b"]), "validation": ("csv", ["a", "c", "c"])},
            "row 2, column label of --validation_file FOLDER/validation.csv is 'c'; it must be one of a, b.",
        ),
        (
            {"train": ("jsonl", ["Pos", "pos", "pos", "neg"])},
            "Are 'Pos' (1 rows) and 'pos' (2 rows) in column label of --train_file FOLDER/train.jsonl the same class?",
        ),
        ({"train": ("jsonl", ["1", "01", "2"])}, "Are '01' (1 rows) and '1' (1 rows)"),
        ({"train": ("csv", ["0", "1", "nan"])}, "neither all text nor all numbers: row 1 has 0, row 3 'nan'."),
        ({"train": ("parquet", [0, 0], ["a"])}, "FOLDER/train.parquet are a. A classifier needs two classes."),
    ],
)
def test_labels_that_may_mean_two_things_are_refused(tmp_path, splits, message):
    with pytest.raises(ValueError, match=re.escape(message.replace("FOLDER", str(tmp_path)))) as caught:
        load_labels(tmp_path, splits)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("suffix", "labels"),
    [
        ("csv", [0, "", 1, ""]),
        ("csv", ["neg", " ", "pos", ""]),
        ("csv", [0.5, "", 1.5, ""]),
        ("jsonl", ["neg", None, "pos", ""]),
        ("parquet", [0.0, math.nan, 1.0, None]),
    ],
)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_label_that_is_missing_is_no_class(tmp_path, suffix, labels, split):
    splits = {"train": (suffix, [label for label in labels if label in (0, 0.5, 1, 1.5, "neg", "pos")])}
    line = (
        rf"Labels are missing: row 2, column label of --{split}_file .*\.{suffix} has none \(2 of 4 rows have none\)"
    )
    with pytest.raises(ValueError, match=line):
        load_labels(tmp_path, splits | {split: (suffix, labels)})


def test_a_test_split_may_have_all_its_labels_or_none(tmp_path):
    train = {"train": ("csv", [0, 1])}
    assert load_labels(tmp_path, {**train, "test": ("csv", ["", ""])}).splits["test"].column_names == ["text"]
    with pytest.raises(ValueError, match=r"Labels are missing: row 2, column label of --test_file .* has none\. Add"):
        load_labels(tmp_path, {**train, "test": ("csv", [1, ""])})


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("labels", [[1, 2, 3], [0, 1, 2, 3, 4], [0, 4], [-1, 1]])
def test_whole_numbers_that_may_be_scores_are_asked_about(tmp_path, suffix, labels):
    with pytest.raises(ValueError, match=r"Are the labels classes or scores\? .* Add --regression false for classes"):
        load_labels(tmp_path, {"train": (suffix, labels)})
    classes = load_labels(tmp_path, {"train": (suffix, labels)}, regression=False)
    assert classes.task.labels == tuple(map(str, labels))
    assert classes.splits["train"]["label"][:] == list(range(len(labels)))
    scores = load_labels(tmp_path, {"train": (suffix, labels)}, regression=True)
    assert scores.splits["train"]["label"][:] == labels


def test_fractions_are_scores_but_are_asked_about_as_texts(tmp_path):
    assert load_labels(tmp_path, {"train": ("csv", [0.5, 1])}).splits["train"]["label"][:] == [0.5, 1.0]
    with pytest.raises(ValueError, match="they are numbers stored as text: 0.5, 1. Add --regression false"):
        load_labels(tmp_path, {"train": ("jsonl", ["0.5", "1"])})


def test_scores_are_the_names_of_a_class_label(tmp_path):
    found = load_labels(tmp_path, {"train": ("parquet", [0, 1, 0], ["5", "3"])}, regression=True)
    assert found.splits["train"]["label"][:] == [5.0, 3.0, 5.0]


@pytest.mark.parametrize("options", [{}, {"task_name": "sst2", "label_column": "label"}])
@pytest.mark.parametrize(
    ("label", "shown"), [([0], "[0]"), ({"a": 1}, "{'a': 1}"), (["x" * 99], "['" + "x" * 58 + "...")]
)
def test_a_label_is_a_text_or_a_number(tmp_path, label, shown, options):
    rows = [{"sentence": "Rain.", "label": label}] * 2
    line = bad(tmp_path / "train.jsonl", f"must be text or a number: row 1, column label of FILE is {shown}. See --l")
    with pytest.raises(ValueError, match=re.escape(line)):
        load(tmp_path, rows, **options)


# ---- Columns and rows ----


def test_a_column_that_nobody_asks_for_does_not_matter(tmp_path):
    """An empty cell among numbers, in the second ten thousand rows; texts among numbers; a structure."""
    path = tmp_path / "train.csv"
    rows = (f"Rain {index}.,{index % 2},{'' if index == 10_040 else index}" for index in range(10_050))
    path.write_text("\n".join(["text,label,length", *rows]) + "\n")
    found = load_sentences(SentenceArguments(train_file=str(path)), ["train"])
    assert found.splits["train"]["label"][:] == [0, 1] * 5_025
    rows = [{"text": "Rain.", "label": i % 2, "other": other} for i, other in enumerate((1, "a", [2], None, {"b": 1}))]
    assert load(tmp_path, rows).splits["train"]["label"][:] == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("late", [{"other": "a"}, {"other": {"b": 1}}, {"another": 2}])
def test_a_column_that_changes_late_in_a_long_file_does_not_matter(tmp_path, late):
    """After more than the 10 MB that `datasets` reads at once."""
    rows = [{"text": "Rain. " * 10_000, "label": index % 2, "other": index} for index in range(200)]
    found = load(tmp_path, [*rows, {"text": "Sun.", "label": 1, **late}])
    assert found.splits["train"]["label"][-2:] == [1, 1]


def test_a_label_that_is_missing_late_in_a_long_table_is_named(tmp_path):
    labels = ["" if index == 10_040 else index % 2 for index in range(10_050)]
    with pytest.raises(ValueError, match=r"Labels are missing: row 10041, column label of --train_file"):
        load_labels(tmp_path, {"train": ("csv", labels)})


def test_numbers_are_no_sentences(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("text,label,number\n7,0,1\nRain.,1,2\n")
    found = load_sentences(SentenceArguments(train_file=str(path)), ["train"])
    assert found.splits["train"]["text"][0] == "Sentence: 7", "one number is a sentence as good as any"
    message = (
        r"Column number of .* must be text, but row 1 has '1' \(2 of 2 rows have no text\)\. See --sentence_columns"
    )
    with pytest.raises(ValueError, match=message):
        load_sentences(SentenceArguments(train_file=str(path), sentence_columns=["number"]), ["train"])


def test_sentences_without_words_are_counted(tmp_path, caplog):
    rows = [{"text": text, "label": index % 2} for index, text in enumerate(["Rain.", "", "  "])]
    assert len(load(tmp_path, rows).splits["train"]) == 3
    assert "train.jsonl is empty in 2 of 3 rows. The first is row 2." in caplog.text


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("\n", "is empty."),
        ("text,label\nRain.,0\nRain, and sun,1\n", "cannot be read: "),
        ("text,label\nRain.,0\nRain.\n", "cannot be read: line 3 has 1 cell, but the header has 2."),
    ],
)
def test_a_table_that_is_damaged_gives_one_line(tmp_path, table, message):
    (tmp_path / "train.csv").write_text(table)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_sentences(SentenceArguments(train_file=str(tmp_path / "train.csv")), ["train"])
    assert str(tmp_path / "train.csv") in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- The first rows ----


def test_the_first_rows_of_a_sorted_file_are_counted_by_class(tmp_path, caplog):
    labels = ["a"] * 60 + ["b"] * 40
    load_labels(tmp_path, {"train": ("csv", labels)}, max_train_samples=60)
    assert "--max_train_samples 60: the first rows of column label of" in caplog.text
    assert "are a (60 rows), without 1 of 2 classes; all rows are a (60 rows), b (40 rows)." in caplog.text
    caplog.clear()
    load_labels(tmp_path, {"train": ("csv", labels)}, max_train_samples=99)
    assert not caplog.records, "that may be chance"
    splits = {"train": ("csv", labels), "validation": ("csv", labels[::-1])}
    load_labels(tmp_path, splits, max_eval_samples=50)
    assert "--max_eval_samples 50" in caplog.text
    assert "validation.csv are b (40 rows), a (10 rows); all rows" in caplog.text


def test_the_first_rows_of_a_file_that_is_shuffled_are_taken_in_silence(tmp_path, caplog):
    labels = ["a", "b", "a"] * 100
    load_labels(tmp_path, {"train": ("csv", labels)}, max_train_samples=100)
    numbers = [random.Random(index).random() for index in range(300)]
    load_labels(tmp_path, {"train": ("csv", numbers)}, max_train_samples=100)
    assert "max_train_samples" not in caplog.text
    load_labels(tmp_path, {"train": ("csv", sorted(numbers))}, max_train_samples=100)
    assert re.search(r"are 0\.1\d+ on average; all rows are 0\.[45]\d*\.", caplog.text)


def test_labels_of_a_task_may_be_given_by_name_and_classes_keep_their_order(tmp_path):
    found = load(tmp_path, [{**PAIR, "label": "equivalent"}], task_name="mrpc")
    assert found.splits["train"]["label"][:] == [1]
    rows = [{"text": "Rain.", "label": label} for label in ("no", "yes")]
    found = load(tmp_path, rows, classes=["yes", "no"])
    assert found.splits["train"]["label"][:] == [1, 0]


def test_every_task_reads_its_columns(tmp_path):
    for name, task in TASKS.items():
        labels = range(len(task.labels)) if task.labels else (0.0, 5.0)
        rows = [{**dict.fromkeys(task.columns, "Rain."), "label": label} for label in labels]
        found = load(tmp_path, rows, task_name=name)
        assert found.splits["train"]["label"][:] == list(labels)
        both = "Sentence 1: Rain. Sentence 2: Rain."
        assert found.splits["train"]["text"][0] == (both if len(task.columns) == 2 else "Sentence: Rain.")


def test_hidden_labels_of_a_test_split_are_left_out(tmp_path):
    rows = {"train": [PAIR], "test": [{**PAIR, "label": -1}] * 2}
    found = load(tmp_path, rows, ("train", "test"), task_name="mrpc")
    assert found.splits["test"].column_names == ["text"]


def test_validation_rows_can_be_trained_on(tmp_path):
    rows = {"train": [PAIR] * 3, "validation": [{**PAIR, "label": 0}] * 2}
    found = load(tmp_path, rows, task_name="mrpc", merge_validation=True)
    assert found.splits["train"]["label"][:] == [1, 1, 1, 0, 0]
    assert "validation" not in found.splits


@pytest.fixture
def on_the_hub(tmp_path, monkeypatch):
    """MNLI, laid out in a directory as the repository on the Hub is."""
    splits = ["train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched"]
    labels = [-1 if split.startswith("test") else 2 for split in splits]
    rows = {
        split: [{"premise": f"Rain {number}.", "hypothesis": "It rained.", "label": label}] * (number + 1)
        for number, (split, label) in enumerate(zip(splits, labels, strict=True))
    }
    lay_out_as_on_the_hub(tmp_path, "mnli", rows, monkeypatch)


def test_a_task_on_the_hub_has_all_its_splits(on_the_hub):
    found = load_sentences(SentenceArguments(task_name="MNLI"), ["train", "validation", "test"])
    sizes = {split: len(rows) for split, rows in found.splits.items()}
    assert sizes == {"train": 1, "validation": 2, "validation_mm": 3, "test": 4, "test_mm": 5}
    assert found.splits["validation_mm"]["text"][0].startswith("Sentence 1: Rain 2.")
    assert "label" not in found.splits["test_mm"].column_names


def test_the_demo_needs_no_file_and_no_network():
    found = load_sentences(SentenceArguments(task_name="demo"), ["train", "validation", "test"])
    assert {split: len(rows) for split, rows in found.splits.items()} == {"train": 640, "validation": 160, "test": 160}
    texts = [text for rows in found.splits.values() for text in rows["text"]]
    assert len(set(texts)) == len(texts)
    words = {label: [] for label in (0, 1)}
    for text, label in zip(found.splits["test"]["text"], found.splits["test"]["label"], strict=True):
        words[label].append(len(text.split()))
    assert 40 < len(words[1]) < 120
    assert sum(words[1]) / len(words[1]) > 1.15 * sum(words[0]) / len(words[0]), "what is involved takes more words"
    assert load_sentences(SentenceArguments(task_name="demo"), ["test"]).splits["test"]["text"][:] == texts[-160:]


def test_long_rows_are_cut_and_counted(tmp_path, caplog):
    tokenizer = load_tokenizer(LoadArguments())
    rows = [{"text": "Rain. " * count, "label": count % 2} for count in (1, 50, 80)]
    found = tokenize_sentences(load(tmp_path, rows), tokenizer, 16)["train"]
    assert max(map(len, found["input_ids"])) == 16
    assert set(found.column_names) == {"input_ids", "attention_mask", "labels"}
    assert "2 of 3 train rows are longer than --max_seq_length 16" in caplog.text


def test_a_tokenizer_that_cannot_pad_is_refused(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    with pytest.raises(ValueError, match="has neither a pad token nor an end-of-text token"):
        tokenize_sentences(load(tmp_path, [PAIR], task_name="mrpc"), tokenizer, 16)


def bad(path, line):
    return line.replace("FILE", f"--train_file {path}")


@pytest.mark.parametrize(
    ("row", "options", "line"),
    [
        ({"label": 2}, {"task_name": "mrpc"}, "Label out of range: row 2, column label of FILE is 2; it must be 0 to"),
        ({"label": -1}, {"task_name": "mrpc"}, "row 2, column label of FILE is -1 (hidden labels cannot be used"),
        (
            {"label": None},
            {"task_name": "mrpc"},
            "Labels are missing: row 2, column label of FILE has none. Add them",
        ),
        ({"label": 5.5}, {"task_name": "stsb"}, "row 2, column label of FILE is 5.5; it must be a number between 0"),
        (
            {"label": None},
            {"task_name": "stsb"},
            "Labels are missing: row 2, column label of FILE has none. Add them",
        ),
        ({"label": 5}, {}, "Are the labels classes or scores? In column label of FILE they are integers: 1, 5."),
        ({"label": 1}, {}, "All labels in column label of FILE are 0. A classifier needs two classes."),
        ({"sentence1": None}, {"task_name": "mrpc"}, "Column sentence1 of FILE must be text, but row 2 has None."),
        ({"sentence2": ["a"]}, {"task_name": "mrpc"}, "Column sentence2 of FILE must be text, but row 2 has ['a']."),
        ({"sentence2": 7}, {"task_name": "mrpc"}, "Column sentence2 of FILE must be text, but row 2 has 7."),
    ],
)
def test_bad_rows_are_named(tmp_path, row, options, line):
    first = {**PAIR, "label": 0} if line.startswith("All") else PAIR
    row = {**row, "label": 0} if line.startswith("All") else row
    with pytest.raises(ValueError, match=re.escape(bad(tmp_path / "train.jsonl", line))) as caught:
        load(tmp_path, [first, {**PAIR, **row}], **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "options", "line"),
    [
        ([{"a": 1, "label": 0}], {"task_name": "mrpc"}, "has no column sentence1; it has a, label. See --task_name."),
        ([{"a": 1, "label": 0}], {}, "are the sentences? Choose with --sentence_columns from a, label."),
        ([{"text": "Rain."}], {}, "has no column label; it has text. See --label_column."),
        ([{"text": 7, "label": 0}], {"classes": ["0", "1"]}, "Column text of FILE must be text, but row 1 has 7."),
        ([PAIR], {"task_name": "mrcp"}, "Unknown --task_name 'mrcp'. Did you mean 'mrpc'?"),
        ([PAIR], {"task_name": "mrpc", "classes": ["a", "b"]}, "--classes is only for a task of your own,"),
        ([PAIR], {"task_name": "stsb", "regression": False}, "--task_name stsb is a regression."),
        (
            [{"text": "Rain.", "label": 0.5}],
            {"regression": False},
            "are numbers with fractions, not classes: 0.5.",
        ),
        ([PAIR], {"sentence_columns": ["a", "b", "c"]}, "--sentence_columns takes one or two columns, got a b c."),
        ([PAIR], {"sentence_columns": ["label"]}, "but sentences are in label, the label in label."),
        ([PAIR], {"sentence_columns": ["text", "text"]}, "but sentences are in text and text, the label in label."),
        ([PAIR], {"classes": ["a"]}, "--classes takes two or more different names"),
        ([PAIR], {"train_file": "missing.jsonl"}, "--train_file missing.jsonl does not exist."),
        ([PAIR], {"max_seq_length": 2}, "--max_seq_length must be at least 8, got 2."),
        ([], {"task_name": "mrpc"}, "FILE is empty."),
    ],
)
def test_bad_arguments_are_named(tmp_path, rows, options, line):
    with pytest.raises(ValueError, match=re.escape(bad(tmp_path / "train.jsonl", line))):
        load(tmp_path, rows, **options)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"There are no test rows. Give --test_file."):
        load(tmp_path, [PAIR], ["train", "test"], task_name="mrpc")
    (tmp_path / "train.txt").write_text("Rain fell.")
    with pytest.raises(ValueError, match=r"train.txt is not a table. It must be a file of the type .json, .jsonl"):
        load_sentences(SentenceArguments(train_file=str(tmp_path / "train.txt")), ["train"])
    with pytest.raises(ValueError, match="--task_name rte cannot be loaded: "):
        load_sentences(SentenceArguments(task_name="rte"), ["train"])


@pytest.mark.skipif(not (SHARED / "data/mrpc").is_dir(), reason="real corpora are not beside this checkout")
def test_mrpc_has_the_rows_that_were_published():
    files = {"train": "train", "validation": "dev", "test": "test"}
    paths = {f"{split}_file": str(SHARED / f"data/mrpc/{name}.jsonl") for split, name in files.items()}
    found = load_sentences(SentenceArguments(task_name="mrpc", **paths), files)
    counts = {split: (len(rows), sum(rows["label"])) for split, rows in found.splits.items()}
    assert counts == {"train": (3668, 2474), "validation": (408, 279), "test": (1725, 1147)}


@pytest.mark.parametrize("name", ["train.csv.gz", "train.tsv", "train.tsv.gz", "train.ndjson", "train.jsonl.gz"])
def test_tables_are_read_by_their_suffix_compressed_or_not(tmp_path, name):
    row = '{"sentence": "Rain, fell.", "label": %d}'
    separator = "\t" if "tsv" in name else ","
    if "json" not in name:
        row = f'"Rain, fell."{separator}%d'
    lines = [*([f"sentence{separator}label"] if "json" not in name else []), row % 0, row % 1]
    data = "".join(f"{line}\n" for line in lines).encode()
    (tmp_path / name).write_bytes(gzipped(data) if name.endswith(".gz") else data)
    found = load_sentences(SentenceArguments(train_file=str(tmp_path / name)), ["train"]).splits["train"]
    assert found["text"][:] == ["Sentence: Rain, fell."] * 2
    assert found["label"][:] == [0, 1]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("train.csv", b"sentence,label\nRain,1\ncaf\xe9,0\n", "line 3 of train.csv has 0xe9, which is not UTF-8."),
        ("train.jsonl", b'{"sentence": "caf\xe9", "label": 0}\n', "line 1 of train.jsonl has 0xe9"),
        ("train.csv", b"sentence,label\nRain, fell,1\nSnow, fell,0\n", "row 1 has more cells than the header."),
        ("train.csv", b"sentence,label\n", "is empty."),
        ("train.csv", gzipped(b"sentence,label\n"), "is not text but gzip: name it .gz."),
        ("train.txt.gz", gzipped(b"Rain."), "is not a table. It must be a file of the type .json, .jsonl"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_in_one_line(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_sentences(SentenceArguments(train_file=str(path)), ["train"])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- A data set by its name ----


def data_set(tmp_path, **splits):
    """Write a directory with a table for each split, which `datasets` reads as it reads a repository on the Hub."""
    for split, rows in splits.items():
        write_rows(tmp_path / f"{split}.jsonl", rows)
    return str(tmp_path)


MOODS = [{"text": f"It is {mood}.", "label": mood} for mood in ("good", "bad", "good", "bad")]


def test_a_data_set_is_a_task_of_ones_own(tmp_path):
    name = data_set(tmp_path, train=MOODS, dev=MOODS[:2], test=MOODS[:3])
    found = load_sentences(
        SentenceArguments(dataset_name=name, max_predict_samples=1), ["train", "validation", "test"]
    )
    assert found.task.labels == ("bad", "good")
    assert {split: rows["label"][:] for split, rows in found.splits.items()} == {
        "train": [1, 0, 1, 0],
        "validation": [1, 0],
        "test": [1],
    }


def test_a_data_set_that_was_saved_to_disk_is_read(tmp_path):
    DatasetDict(train=Dataset.from_list(MOODS), validation=Dataset.from_list(MOODS[:1])).save_to_disk(tmp_path)
    found = load_sentences(SentenceArguments(dataset_name=str(tmp_path)), ["validation"])
    assert list(found.splits) == ["validation"], "the training rows were read for their labels"
    assert found.splits["validation"]["label"][:] == [1]


def test_a_file_wins_over_a_split_and_a_task_says_the_columns(tmp_path):
    name = data_set(tmp_path, train=[PAIR], validation=[PAIR])
    other = write_rows(tmp_path.parent / f"{tmp_path.name}.jsonl", [{**PAIR, "sentence1": "Hail fell."}])
    arguments = SentenceArguments(dataset_name=name, task_name="mrpc", validation_file=other)
    found = load_sentences(arguments, ["train", "validation"])
    assert found.task is TASKS["mrpc"]
    assert found.splits["train"]["text"][0].startswith("Sentence 1: Rain fell.")
    assert found.splits["validation"]["text"][0].startswith("Sentence 1: Hail fell.")


def test_a_split_or_configuration_that_is_missing_is_named(tmp_path):
    name = data_set(tmp_path, train=MOODS)
    with pytest.raises(ValueError, match=f"--dataset_name {name} has no test rows. Give --test_file."):
        load_sentences(SentenceArguments(dataset_name=name), ["test"])
    with pytest.raises(ValueError, match=f"--dataset_name {name} cannot be loaded: .*'other'"):
        load_sentences(SentenceArguments(dataset_name=name, dataset_config_name="other"), ["train"])
    with pytest.raises(ValueError, match="--dataset_config_name needs --dataset_name."):
        SentenceArguments(dataset_config_name="other")
