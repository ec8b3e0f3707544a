"""Every row of a micro-batch knows which row of the training set it is, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import skip_first_batches
from torch.utils.data import Dataset, Sampler
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from abr_trainer import ABRTrainer
from abr_trainer.data.demo import DEMO_MODEL
from abr_trainer.schedulers import RowRule
from abr_trainer.training.identity import ROW_INDEX, UNKNOWN, taken_out
from tests.conftest import Stream, token_rows

pytestmark = pytest.mark.slow

datasets = pytest.importorskip("datasets")


def rows_of_lengths(*lengths: int) -> list[dict[str, list[int]]]:
    """Rows whose tokens no other row has at the same place."""
    return [{"input_ids": list(range(i, i + length)), "labels": [i] * length} for i, length in enumerate(lengths)]


def batches_of(trainer: Any) -> list[Any]:
    """The random state of a training that has just begun, and then all batches of an epoch."""
    torch.manual_seed(3)
    return list(trainer.get_train_dataloader())


def numbers_in(batches: list[Any]) -> list[list[int]]:
    return [taken_out(batch)[1].tolist() for batch in batches]


def equal(one: Any, other: Any) -> bool:
    same = torch.equal if isinstance(one, torch.Tensor) else lambda a, b: a == b
    return type(one) is type(other) and bool(same(one, other))


class Own(Dataset):
    """A data set of one's own, which has its rows one by one."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class InBatches(Own):
    def __getitems__(self, indices):
        return [self.rows[index] for index in indices]


def of_datasets(rows: list[Any]) -> Any:
    return datasets.Dataset.from_list([{name: value.tolist() for name, value in row.items()} for row in rows])


KINDS = {
    "list": list,
    "own": Own,
    "in batches": InBatches,
    "datasets": of_datasets,
    "datasets as torch": lambda rows: of_datasets(rows).with_format("torch"),
    "datasets with more columns": lambda rows: of_datasets(rows).add_column("more", [1] * len(rows)),
    "stream": Stream,
    "stream of datasets": lambda rows: of_datasets(rows).to_iterable_dataset(),
}
LOADERS = {
    "shuffled": {"train_sampling_strategy": "random"},
    "by length": {"train_sampling_strategy": "group_by_length"},
    "workers": {"train_sampling_strategy": "random", "dataloader_num_workers": 2},
    "persistent": {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    "without the last": {"dataloader_drop_last": True},
    "all columns": {"remove_unused_columns": False},
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_row_has_its_index_and_the_batches_are_those_of_stock_trainer(build, kind, loader):
    rows = token_rows(11)
    stock = build(Trainer, TrainingArguments, data=KINDS[kind](rows), max_steps=6, **LOADERS[loader])
    ours = build(data=KINDS[kind](rows), max_steps=6, rank_rows=not kind.startswith("stream"), **LOADERS[loader])
    ours.row_rule = object()
    expected, state = batches_of(stock), torch.random.get_rng_state()
    found = batches_of(ours)
    assert torch.equal(state, torch.random.get_rng_state())
    if kind == "stream" and loader == "workers":  # which each read it for themselves
        assert not any(ROW_INDEX in batch for batch in found)
    else:
        for batch in found:
            inputs, indices = taken_out(batch)
            assert torch.equal(torch.stack([rows[i]["input_ids"] for i in indices]), inputs["input_ids"])
    assert len(found) == len(expected) >= 5
    for one, other in zip(found, expected, strict=True):
        assert list(one) == list(other)
        assert all(equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["list", "datasets", "stream", "stream of datasets"])
def test_after_a_resume_the_indices_go_on(build, kind):
    trainer = build(data=KINDS[kind](token_rows(8)), max_steps=4)
    trainer.row_rule = object()
    assert numbers_in(list(skip_first_batches(trainer.get_train_dataloader(), 2))) == [[4, 5], [6, 7]]


class KeepsAll(RowRule):
    def decide(self, row):
        return True


class Recording(ABRTrainer):
    """Takes the indices out of each micro-batch, as the engine does, and writes them down by step."""

    def training_step(self, model, inputs, *args, **kwargs):
        inputs, indices = taken_out(inputs)
        rows = [self.known.index(row.tolist()) for row in inputs["input_ids"]]
        self.taken.append((self.state.global_step, None if indices is None else indices.tolist(), rows))
        return super().training_step(model, inputs, *args, **kwargs)


def recorded(build: Any, rows: list[Any], kind: str, resume: Any = None, **options: Any) -> list[Any]:
    options.setdefault("trainer_options", {})["row_rule"] = KeepsAll()
    trainer = build(Recording, data=KINDS[kind](rows), **options)
    trainer.taken, trainer.known = [], [row["input_ids"].tolist() for row in rows]
    trainer.train(resume_from_checkpoint=resume)
    return trainer.taken


@pytest.mark.parametrize("kind", ["list", "datasets", "stream"])
def test_a_resumed_run_goes_on_with_the_indices_of_the_unbroken_one(build, kind, tmp_path):
    rows = token_rows(10)
    options = {"max_steps": 8, "gradient_accumulation_steps": 2, "train_sampling_strategy": "random"}
    options |= {"save_strategy": "steps", "save_steps": 4}  # in the second epoch
    whole = recorded(build, rows, kind, **options)
    assert all(indices == found for _, indices, found in whole)
    resumed = recorded(build, rows, kind, resume=str(tmp_path / "run" / "checkpoint-4"), **options)
    assert resumed == [each for each in whole if each[0] >= 4]


def test_rows_of_the_primer_have_no_index_and_those_after_it_have_theirs(build):
    rows = token_rows(8)
    primer = {"trainer_options": {"primer_dataset": rows[4:]}, "primer_batches": 2}
    taken = recorded(build, rows, "list", max_steps=6, **primer)
    assert [indices for _, indices, _ in taken] == [None, None, [0, 1], [2, 3], [4, 5], [6, 7]]


def test_without_a_rule_or_a_ranking_the_loader_is_that_of_stock_trainer(build):
    rows = token_rows(4)
    trainer = build(data=rows)
    assert trainer.get_train_dataloader().dataset is rows
    assert ROW_INDEX not in batches_of(trainer)[0]


def test_neither_an_evaluation_nor_the_primer_has_indices(build):
    rows = token_rows(4)
    trainer = build(
        data=rows, rank_rows=True, primer_batches=2, trainer_options={"primer_dataset": token_rows(4, seed=1)}
    )
    assert ROW_INDEX not in next(iter(trainer.get_eval_dataloader(rows)))
    primer = trainer._get_dataloader(dataset=token_rows(4), description="Primer", batch_size=2, is_training=True)
    assert ROW_INDEX not in next(iter(primer))
    assert ROW_INDEX in next(iter(trainer.get_train_dataloader()))


def collating(build: Any, rows: list[Any], collator: Any, size: int = 3, **options: Any) -> list[Any]:
    data = datasets.Dataset.from_list(rows)
    options = {"per_device_train_batch_size": size, "train_sampling_strategy": "random", **options}
    return batches_of(build(data=data, rank_rows=True, trainer_options={"data_collator": collator}, **options))


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO_MODEL, pad_token="<|endoftext|>")


def test_a_padded_batch_has_its_indices(build):
    rows = rows_of_lengths(5, 2, 9, 4, 7, 1)
    collator = DataCollatorForSeq2Seq(tokenizer(), padding=True)
    for batch in collating(build, rows, collator):  # a BatchEncoding
        inputs, indices = taken_out(batch)
        lengths = inputs["attention_mask"].sum(1).tolist()
        assert lengths == [len(rows[i]["input_ids"]) for i in indices]


def test_a_collator_that_replaces_tokens_has_its_indices(build):
    rows = [{"input_ids": [i + 4] * 30} for i in range(6)]
    masking = tokenizer()
    masking.add_special_tokens({"mask_token": "<mask>"})
    collator = DataCollatorForLanguageModeling(
        masking, mlm_probability=0.2, mask_replace_prob=1.0, random_replace_prob=0
    )
    for batch in collating(build, rows, collator):
        inputs, indices = taken_out(batch)
        assert (inputs["input_ids"].median(1).values - 4).tolist() == indices.tolist()


def test_rows_that_are_joined_have_an_index_each_but_for_empty_ones(build):
    rows = rows_of_lengths(5, 0, 9, 4, 7, 1)
    seen = []
    for batch in collating(build, rows, DataCollatorWithFlattening()):
        inputs, indices = taken_out(batch)
        starts = inputs["input_ids"][inputs["position_ids"] == 0].tolist()
        assert starts == indices.tolist()
        seen += starts
    assert sorted(seen) == [0, 2, 3, 4, 5]


def by_length(features: list[Any]) -> dict[str, torch.Tensor]:
    """A collator that sorts its rows, the longest first, as those for `pack_padded_sequence` do."""
    features = sorted(features, key=lambda feature: -len(feature["input_ids"]))
    longest = len(features[0]["input_ids"])
    ids = [feature["input_ids"] + [0] * (longest - len(feature["input_ids"])) for feature in features]
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)}


def test_a_collator_of_ones_own_that_sorts_its_rows_has_them_in_its_order(build):
    rows = rows_of_lengths(5, 2, 9, 4, 7, 1)
    for batch in collating(build, rows, by_length):
        inputs, indices = taken_out(batch)
        assert inputs["input_ids"][:, 0].tolist() == indices.tolist()


@pytest.mark.parametrize(
    "collator",
    [
        lambda features: by_length(features[1:]),
        lambda features: by_length([{**each, "input_ids": [7, *each["input_ids"], 8]} for each in features]),
        lambda features: by_length(features)["input_ids"],
        lambda features: features,
        lambda features: tuple(by_length(features).values()),
    ],
    ids=["drops a row", "adds tokens", "tensor", "list", "tuple"],
)
def test_where_a_collator_leaves_no_way_to_tell_there_is_no_index(build, collator):
    for batch in collating(build, rows_of_lengths(5, 2, 9, 4, 7, 1), collator):
        assert taken_out(batch)[1] is None


def test_a_collator_without_tokens_has_its_indices_if_it_makes_a_row_of_each(build):
    rows = [{"pixel_values": [float(i)] * 3, "labels": i} for i in range(6)]

    def stack(features):
        return {name: torch.tensor([feature[name] for feature in features]) for name in ("pixel_values", "labels")}

    batches = collating(build, rows, stack, remove_unused_columns=False)
    assert [batch["labels"].tolist() for batch in batches] == numbers_in(batches)
    flat = collating(
        build, rows, lambda features: {"x": stack(features)["pixel_values"].flatten()}, remove_unused_columns=False
    )
    assert all(ROW_INDEX not in batch for batch in flat)


class Backwards(Sampler):
    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        return iter(torch.arange(-1, -len(self.rows) - 1, -1))  # negative, and tensors


def test_a_sampler_of_ones_own_may_count_from_the_end(build):
    class Reversed(ABRTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return Backwards(train_dataset)

    batches = batches_of(build(Reversed, data=token_rows(4), rank_rows=True))
    assert numbers_in(batches) == [[3, 2], [1, 0]]


def test_an_overridden_loader_stays_as_it_is(build):
    class Mine(ABRTrainer):
        def get_train_dataloader(self):
            return [default_data_collator(self.train_dataset[:2])]

    assert list(batches_of(build(Mine, data=token_rows(4), rank_rows=True))[0]) == ["input_ids", "labels"]


def test_a_shuffled_stream_of_datasets_has_no_positions(build):
    rows = of_datasets(token_rows(8))
    two_shards = rows.to_iterable_dataset(num_shards=2)
    for stream in (rows.to_iterable_dataset().shuffle(seed=0, buffer_size=4), two_shards):
        trainer = build(data=stream, max_steps=4)
        trainer.row_rule = object()
        assert all(ROW_INDEX not in batch for batch in batches_of(trainer))


def test_documents_that_trl_packs_have_the_index_of_their_pack_each(build):
    sft = pytest.importorskip("trl.trainer.sft_trainer")
    rows = [
        {"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, 3, 4, 5], "seq_lengths": [3, 2]},
        {"input_ids": [6, 7], "labels": [6, 7], "seq_lengths": [2]},
    ]
    options = {"remove_unused_columns": False, "train_sampling_strategy": "sequential"}
    collator = sft.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    assert numbers_in(collating(build, rows, collator, size=2, **options)) == [[0, 0, 1]]
    padded = sft.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True, pad_to_multiple_of=4)
    [batch] = collating(build, rows, padded, size=2, **options)
    assert len(batch["cu_seq_lens_q"]) == 5  # the padding, one token here, is a document to the kernels
    assert taken_out(batch)[1].tolist() == [0, 0, 1, UNKNOWN]
