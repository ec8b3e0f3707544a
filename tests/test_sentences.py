"""Rows of sentences: which columns, which labels, and what is refused."""

from __future__ import annotations

import re

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from abr_trainer.demo import DEMO_MODEL
from abr_trainer.glue import TASKS
from abr_trainer.modeling import LoadArguments, load_tokenizer
from abr_trainer.sentences import SentenceArguments, load_sentences, tokenize_sentences
from tests.conftest import SHARED
from tests.sentence_rows import lay_out_as_on_the_hub, write_rows

PAIR = {"sentence1": "Rain fell.", "sentence2": "It rained.", "label": 1}


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
    with pytest.raises(ValueError, match="has no pad token, and no end-of-text token"):
        tokenize_sentences(load(tmp_path, [PAIR], task_name="mrpc"), tokenizer, 16)


def bad(path, line):
    return line.replace("FILE", f"--train_file {path}")


@pytest.mark.parametrize(
    ("row", "options", "line"),
    [
        ({"label": 2}, {"task_name": "mrpc"}, "Label out of range: row 2, column label of FILE is 2; it must be 0 to"),
        ({"label": -1}, {"task_name": "mrpc"}, "row 2, column label of FILE is -1 (hidden labels cannot be trained"),
        ({"label": None}, {"task_name": "mrpc"}, "row 2, column label of FILE is None; it must be 0 to 1 or not_"),
        ({"label": 5.5}, {"task_name": "stsb"}, "row 2, column label of FILE is 5.5; it must be a number between 0"),
        ({"label": None}, {"task_name": "stsb"}, "row 2, column label of FILE is None; it must be a number between"),
        ({"label": 5}, {}, "whole numbers in column label of FILE must be 0 to n-1 without gaps, found 1, 5."),
        ({"label": 1}, {}, "All labels in column label of FILE are 0: there is nothing to learn."),
        ({"sentence1": None}, {"task_name": "mrpc"}, "Column sentence1 of FILE must hold text; row 2 holds None."),
        ({"sentence2": ["a"]}, {"task_name": "mrpc"}, "Column sentence2 of FILE must hold text; row 2 holds ['a']."),
        ({"sentence2": 7}, {"task_name": "mrpc"}, "Column sentence2 of FILE must hold text; row 2 holds 7."),
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
        ([{"text": 7, "label": 0}], {"classes": ["0", "1"]}, "Column text of FILE must hold text; row 1 holds 7."),
        ([PAIR], {"task_name": "mrcp"}, "Unknown --task_name 'mrcp'. Did you mean 'mrpc'?"),
        ([PAIR], {"task_name": "mrpc", "classes": ["a", "b"]}, "--classes is for a task of your own;"),
        ([PAIR], {"task_name": "stsb", "regression": False}, "--task_name stsb has a number."),
        (
            [{"text": "Rain.", "label": 0.5}],
            {"regression": False},
            "are numbers with fractions, no classes: 0.5.",
        ),
        ([PAIR], {"sentence_columns": ["a", "b", "c"]}, "--sentence_columns takes one or two, got a b c."),
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
    with pytest.raises(ValueError, match=r"There are no test rows: give --test_file."):
        load(tmp_path, [PAIR], ["train", "test"], task_name="mrpc")
    (tmp_path / "train.txt").write_text("Rain fell.")
    with pytest.raises(ValueError, match=r"train.txt has no columns: it must be one of .json, .jsonl"):
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
