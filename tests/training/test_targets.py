"""Rows without targets are found where labels can be read, and nowhere is anybody's code run for it."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset, Features, LargeList, Sequence, Value
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, default_data_collator

from abr_trainer.data.demo import DEMO_MODEL
from abr_trainer.data.identity import name_sources, with_rows
from abr_trainer.training import empty_rows
from abr_trainer.training.empty_rows import find_rows_without_targets, find_useless_rows
from abr_trainer.training.targets import count_targets, tally
from tests.conftest import Stream, token_rows

LABELS = [[-100, 5, 6], [-100, -100, -100], [7, -100, -100], [7], [], [-100, -100, 8, 9]]
"""Where the first label of a row is none, rows 2 to 5 have no target; else rows 2 and 5."""


def as_dataset(labels=LABELS, **changes):
    return Dataset.from_dict({"input_ids": labels, "labels": labels}, **changes)


def kinds():
    integers = {"input_ids": Sequence(Value("int64")), "labels": LargeList(Value("int32"))}
    return {
        "a data set": as_dataset(),
        "its torch format": as_dataset().with_format("torch"),
        "another integer": as_dataset(features=Features(integers)),
        "a list of tensors": [{"labels": torch.tensor(row, dtype=torch.long)} for row in LABELS],
        "a list of lists": [{"labels": row or [-100]} for row in LABELS],
    }


@pytest.mark.parametrize("kind", kinds())
def test_rows_without_targets_are_found(kind):
    data = kinds()[kind]
    found = find_rows_without_targets(data, default_data_collator, first=1)
    assert (found.looked_at, found.indices, found.is_all) == (6, (1, 2, 3, 4), True)
    assert find_rows_without_targets(data, default_data_collator, first=0).indices == (1, 4)


def test_rows_that_were_shuffled_or_selected_are_named_as_they_stand():
    found = find_rows_without_targets(as_dataset().select([5, 4, 0, 1]), default_data_collator, first=1)
    assert found.indices == (1, 3)


def test_classes_that_are_ignored_are_found():
    data = Dataset.from_dict({"labels": [1, -100, 0]})
    assert find_rows_without_targets(data, default_data_collator, first=0).indices == (1,)
    rows = [{"labels": label} for label in (1, -100, 0)]
    assert find_rows_without_targets(rows, default_data_collator, first=0).indices == (1,)


def forbidden(rows):
    raise AssertionError("somebody's code was run")


class OwnDataset(torch.utils.data.Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        forbidden(index)


def test_nothing_is_said_where_labels_cannot_be_read_or_are_not_used():
    makes_labels = DataCollatorForLanguageModeling(AutoTokenizer.from_pretrained(DEMO_MODEL), mlm=False)
    assert find_rows_without_targets(as_dataset(), makes_labels, first=1) is None
    unknown = [
        OwnDataset(),
        Stream([{"labels": [-100]}]),
        as_dataset().with_transform(forbidden),
        as_dataset().to_iterable_dataset(),
        as_dataset().remove_columns("labels"),
        Dataset.from_dict({"labels": [[-100.0], [1.0]]}),  # numbers to predict, of which -100 is one
        Dataset.from_dict({"labels": [[[-100]], [[1]]]}),
        [{"labels": torch.tensor([-100.0])}],
        [torch.zeros(3)],
        [{"input_ids": [1]}],
        [],
        None,
    ]
    assert [find_rows_without_targets(data, default_data_collator, first=1) for data in unknown] == [None] * 12


def test_a_large_data_set_is_looked_at_in_part(monkeypatch):
    monkeypatch.setattr(empty_rows, "ROWS_AT_A_TIME", 2)
    monkeypatch.setattr(empty_rows, "MOST_ROWS", 3)
    found = find_rows_without_targets(as_dataset(), default_data_collator, first=1)
    assert (found.looked_at, found.indices, found.is_all) == (4, (1, 2, 3), False)
    assert found.describe("training").startswith("3 of the first 4 rows of the training set (75.0 %) have no target")
    monkeypatch.setattr(empty_rows, "MOST_ROWS", 100)
    monkeypatch.setattr(empty_rows, "MOST_LABELS", 6)
    assert find_rows_without_targets(as_dataset(), default_data_collator, first=1).looked_at == 2


TOKENS = [[5, 6], [], [5], [5, 6], [5, 6], [], [6, 5]]
CLASSES = [0, 0, 0, 0, 1, 1, 0]


def kinds_of_rows():
    data = Dataset.from_dict({"input_ids": TOKENS, "labels": CLASSES})
    rows = [{"input_ids": ids, "labels": label} for ids, label in zip(TOKENS, CLASSES, strict=True)]
    return {
        "a data set": data,
        "shuffled on disk": data.select([6, 5, 4, 3, 2, 1, 0]).select([6, 5, 4, 3, 2, 1, 0]),
        "its torch format": data.with_format("torch"),
        "lists": rows,
        "tensors": [{name: torch.tensor(value) for name, value in row.items()} for row in rows],
        "numbers to predict": data.cast_column("labels", Value("float32")),
        "more of the same text": data.add_column("attention_mask", [[1] * len(ids) for ids in TOKENS]),
    }


@pytest.mark.parametrize("kind", kinds_of_rows())
def test_empty_rows_and_repeated_ones_are_found(kind):
    found = find_useless_rows(kinds_of_rows()[kind], ["labels"], None)
    assert (found.looked_at, found.empty, found.repeats, found.is_all) == (7, (1, 5), ((3, 0),), True)
    assert found.describe("training") == [
        "2 of the 7 rows of the training set (28.6 %) have no token: index 1, index 5.",
        "1 of the 7 rows of the training set (14.3 %) repeats an earlier row, tokens and labels: "
        "index 3 repeats index 0.",
    ]


def test_rows_of_a_file_are_named_by_it():
    data = name_sources(with_rows(Dataset.from_dict({"input_ids": TOKENS, "labels": CLASSES})), ["notes.jsonl"])
    empty, repeated = find_useless_rows(data, ["labels"], ["input_ids", "labels"]).describe("training", data)
    assert empty.endswith("have no token: index 1 (notes.jsonl, row 2), index 5 (notes.jsonl, row 6).")
    assert repeated.endswith("index 3 (notes.jsonl, row 4) repeats index 0 (notes.jsonl, row 1).")


def test_rows_are_not_the_same_for_their_tokens_alone():
    data = Dataset.from_dict({"input_ids": TOKENS, "labels": list(range(7)), "pixel_values": [[0.5]] * 7})
    assert find_useless_rows(data, ["labels"], None) is None, "each may have another picture"
    assert find_useless_rows(data, ["labels"], ["input_ids", "labels"]).repeats == ()
    assert find_useless_rows(data, [], ["input_ids"]).repeats == ((3, 0), (4, 0))
    joined = Dataset.from_dict({"input_ids": [[1], [1, 2]], "labels": [[2, 3], [3]]})
    assert find_useless_rows(joined, ["labels"], None).repeats == (), "the same numbers, one after the other"


def test_repeated_rows_are_looked_for_only_where_tokens_can_be_read():
    data = Dataset.from_dict({"input_ids": TOKENS})
    unknown = [
        OwnDataset(),
        Stream([{"input_ids": [1]}] * 2),
        data.with_transform(forbidden),
        data.to_iterable_dataset(),
        Dataset.from_dict({"labels": [1, 1]}),
        Dataset.from_dict({"input_ids": [["a"], ["a"]]}),
        [torch.zeros(3)] * 2,
        [],
        None,
    ]
    assert [find_useless_rows(rows, ["labels"], None) for rows in unknown] == [None] * 9


def test_in_a_large_data_set_repeated_rows_are_looked_for_in_part(monkeypatch):
    monkeypatch.setattr(empty_rows, "ROWS_AT_A_TIME", 2)
    monkeypatch.setattr(empty_rows, "MOST_ROWS", 4)
    data = Dataset.from_dict({"input_ids": [[1]] * 20})
    found = find_useless_rows(data, ["labels"], None)
    assert (found.looked_at, found.is_all) == (4, False)
    assert find_useless_rows(list(data), ["labels"], None) == found
    assert found.describe("training") == [
        "3 of the first 4 rows of the training set (75.0 %) repeat an earlier row, tokens and labels: "
        "index 1 repeats index 0, index 2 repeats index 0, index 3 repeats index 0."
    ]


def test_empty_and_repeated_rows_are_named_at_the_start_and_trained_on(build, caplog):
    rows = [{name: value.tolist() for name, value in row.items()} for row in token_rows(9)]
    data = Dataset.from_list([*rows, rows[2], rows[2], {"input_ids": [], "labels": []}])
    collator = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(DEMO_MODEL, pad_token="<|endoftext|>"))
    trainer = build(data=data.add_column("id", list(range(12))), trainer_options={"data_collator": collator})
    trainer.train()
    trainer.train()
    of = "rows of the training set"
    repeats = f"2 of the 12 {of} (16.7 %) repeat an earlier row, tokens and labels: index 9 repeats index 2,"
    assert caplog.text.count(repeats) == 1
    assert caplog.text.count(f"1 of the 12 {of} (8.3 %) has no token: index 11.") == 1
    assert trainer.ledger.batches == 6


def test_of_good_rows_nothing_is_said(train, caplog):
    train()
    assert "rows of the training set" not in caplog.text


def test_targets_of_micro_batches_are_counted():
    rows = torch.tensor([[7, -100, 5], [7, -100, -100]])
    assert int(count_targets({"labels": rows}, first=1)) == 1
    assert int(count_targets({"labels": rows}, first=0)) == 3
    assert int(count_targets({"labels": rows, "shift_labels": rows}, first=1)) == 3
    assert count_targets({"start_positions": rows}, first=1) == 1
    assert int(count_targets({"labels": torch.tensor([-100.0, 2.0])}, first=0)) == 2
    counted = tally([{"labels": rows}, {"labels": rows[1:]}], 1, ["labels"])
    assert [int(each) for each in counted] == [1, 2, 3]
    assert [int(each) for each in tally([{"labels": torch.tensor([0, -100])}], 0, ["labels"])] == [1, 1, 2]
    assert [int(each) for each in tally([{"labels": rows[1:, :1]}], 1, ["labels"])] == [0, 1, 1]
    assert [int(each) for each in tally([{"labels": rows * 0 - 100, "other": 1}], 1, ["labels", "other"])] == [1, 0, 0]


def test_a_label_without_dimensions_is_a_target():
    label = {"labels": torch.tensor(1)}
    assert [int(each) for each in tally([label, label], 1, ["labels"])] == [2, 0, 0]
    assert int(count_targets(label, 1)) == 1
