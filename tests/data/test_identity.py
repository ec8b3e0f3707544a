"""Each block of a training set, and each sentence, says which rows of which file it was made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets
from transformers import AutoTokenizer

from abr_trainer.classification.sentences import SentenceArguments, load_sentences, tokenize_sentences
from abr_trainer.data.arguments import DataArguments
from abr_trainer.data.blocks import load_blocks
from abr_trainer.data.demo import DEMO_MODEL
from abr_trainer.data.identity import (
    SOURCE_COLUMN,
    UNKNOWN,
    are_blocks,
    from_to,
    in_source,
    located,
    name_sources,
    rows_of,
    sources_of,
    with_rows,
)
from abr_trainer.training.identity import source_of, taken_out

SIZE = 8
BLOCK = {"is_block": True}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL, pad_token="<|endoftext|>")


def texts(count: int, name: str) -> list[str]:
    """Documents of three to 26 words, of which each is another."""
    return [f"The {name} number {i} " + "and on " * (i * 7 % 12) for i in range(1, count + 1)]


def write(path: Path, rows: list[str | None]) -> str:
    """Write documents to a file. None is null there, an empty cell or an empty line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".txt":
        path.write_text("".join(f"{row or ''}\n" for row in rows))
    elif path.suffix == ".jsonl":
        lines = [json.dumps({"text": row}) if row else "" for row in rows]
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"text": row} for row in rows]))
    else:
        table = Dataset.from_dict({"id": list(range(len(rows))), "text": rows})
        table.to_csv(path) if path.suffix == ".csv" else table.to_parquet(path)
    return str(path)


def train(tokenizer: Any, **arguments: Any) -> Any:
    with_eval = ["train", "validation"] if arguments.pop("with_eval", False) else ["train"]
    blocks = load_blocks(DataArguments(**arguments), tokenizer, SIZE, with_eval, with_sources=True)
    assert all(SOURCE_COLUMN not in next(iter(blocks[split])) for split in with_eval[1:])
    return blocks["train"]


def sources(blocks: Any) -> list[dict[str, Any]]:
    """The source of each block, as it is asked for by its index, or by what a stream gives for it."""
    if isinstance(blocks, IterableDataset):
        return [source_of(blocks, row[SOURCE_COLUMN]) for row in blocks]
    names, block = sources_of(blocks), {"is_block": True} if are_blocks(blocks) else {}
    found = [located(names, number) | block for number in blocks[SOURCE_COLUMN]]
    for index in (0, len(blocks) - 1):
        assert source_of(blocks, index) == {"index": index, **found[index]}
    return found


def check(tokenizer: Any, blocks: Any, files: dict[str, list[str]]) -> None:
    """Look whether each block begins in the first row that it names, ends in the last, and holds what they do."""

    def ids(name: str, row: str | None) -> list[int]:
        if name.endswith(".txt"):
            return tokenizer(f"{row or ''}\n", add_special_tokens=False)["input_ids"]
        is_there = row is not None or name.endswith(".csv")
        return [*tokenizer(row or "", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] * is_there

    found = sources(blocks)
    assert found
    for block, source in zip(blocks, found, strict=True):
        name = source["source"]
        parts = [ids(name, row) for row in files[name][source["first_row"] - 1 : source.get("last_row")]]
        joined, block_ids = [token for part in parts for token in part], list(block["input_ids"])
        if "last_row" not in source:  # it goes on after a gap, or in another file
            joined = joined[: len(parts[0]) + SIZE]
            assert any(joined[start:][:1] == block_ids[:1] for start in range(len(parts[0])))
            continue
        starts = [i for i in range(len(joined) - SIZE + 1) if joined[i : i + SIZE] == block_ids]
        assert any(i < len(parts[0]) and i + SIZE > len(joined) - len(parts[-1]) for i in starts)


@pytest.mark.parametrize("streaming", [False, True], ids=["on disk", "streamed"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".parquet"])
def test_a_block_names_the_rows_that_it_was_cut_from_also_after_rows_that_are_left_out(
    tmp_path, tokenizer, suffix, streaming
):
    rows: list[str | None] = texts(30, "girl")
    rows[4] = rows[5] = rows[20] = None
    path = write(tmp_path / f"notes{suffix}", rows)
    blocks = train(tokenizer, train_file=path, streaming=streaming)
    check(tokenizer, blocks, {f"notes{suffix}": rows})


def test_the_numbers_are_right_by_hand(tmp_path, tokenizer):
    rows = ["a dog", None, "a dog", "a dog", "a dog"]
    path = write(tmp_path / "notes.jsonl", rows)
    assert len(tokenizer("a dog")["input_ids"]) + 1 == 3  # a block has two rows and two thirds
    assert sources(train(tokenizer, train_file=path)) == [
        {**BLOCK, "source": "notes.jsonl", "first_row": 1, "last_row": 4}
    ]


def test_a_long_document_is_named_by_each_of_its_blocks(tmp_path, tokenizer):
    path = write(tmp_path / "long.jsonl", [None, "and on " * 100])
    found = sources(train(tokenizer, train_file=path))
    assert found == [{**BLOCK, "source": "long.jsonl", "first_row": 2, "last_row": 2}] * len(found)
    assert len(found) > 20


@pytest.mark.parametrize("streaming", [False, True], ids=["on disk", "streamed"])
def test_rows_of_several_files_are_counted_in_each(tmp_path, tokenizer, streaming):
    files = {f"part-{i}.jsonl": texts(20 + i, name) for i, name in enumerate(("girl", "boat", "lamp"))}
    for name, rows in files.items():
        write(tmp_path / "data" / "train" / name, rows)
    blocks = train(tokenizer, dataset_name=str(tmp_path / "data"), streaming=streaming)
    check(tokenizer, blocks, files)
    assert {source["source"] for source in sources(blocks)} == set(files)


def test_rows_of_several_files_are_counted_in_each_also_by_workers_that_share_them(tmp_path, tokenizer, build):
    files = {f"part-{i}.csv": texts(20, name) for i, name in enumerate(("girl", "boat", "lamp", "fox"))}
    for name, rows in files.items():
        write(tmp_path / "data" / "train" / name, rows)
    blocks = train(tokenizer, dataset_name=str(tmp_path / "data"), streaming=True)
    assert blocks.num_shards == 4
    trainer = build(data=blocks, max_steps=1, dataloader_num_workers=2, per_device_train_batch_size=1)
    trainer.row_rule = object()
    seen = []
    for batch in trainer.get_train_dataloader():
        inputs, [number] = taken_out(batch)
        source = source_of(blocks, number)
        rows = files[source["source"]][source["first_row"] - 1 : source.get("last_row")]
        words = tokenizer.decode(inputs["input_ids"][0]).replace("<|endoftext|>", " ").split()
        assert set(words[1:-1]) <= set(" ".join(rows).split()), "of the first and the last it may have a part"
        seen.append(source["source"])
    assert set(seen) == set(files)


def test_files_of_one_name_are_told_apart_by_their_path(tmp_path, tokenizer):
    one, other = (write(tmp_path / name / "notes.jsonl", texts(20, name)) for name in ("girl", "boat"))
    blocks = train(tokenizer, dataset_mix=f"{one}=0.5,{other}=0.5")
    assert {source["source"] for source in sources(blocks)} == {one, other}


@pytest.mark.parametrize("streaming", [False, True], ids=["on disk", "streamed"])
@pytest.mark.parametrize("mix_until", ["first_exhausted", "all_exhausted"])
def test_a_block_of_a_mix_names_its_data_set(tmp_path, tokenizer, streaming, mix_until):
    files = {"girls.jsonl": texts(20, "girl"), "boats.txt": texts(35, "boat")}
    paths = [write(tmp_path / name, rows) for name, rows in files.items()]
    mix = f"{paths[0]}=0.3,{paths[1]}=0.7"
    blocks = train(tokenizer, dataset_mix=mix, mix_until=mix_until, streaming=streaming, max_train_samples=30)
    check(tokenizer, blocks, files)
    assert {source["source"] for source in sources(blocks)} == set(files)


@pytest.mark.parametrize("streaming", [False, True], ids=["on disk", "streamed"])
def test_rows_are_those_of_the_file_also_where_some_are_held_out(tmp_path, tokenizer, streaming):
    rows = texts(150, "girl")
    path = write(tmp_path / "notes.jsonl", rows)
    blocks = train(tokenizer, train_file=path, streaming=streaming, with_eval=True, max_eval_samples=2)
    check(tokenizer, blocks, {"notes.jsonl": rows})
    first = sources(blocks)[0]["first_row"]
    assert first == (6 if streaming else 9)  # 5 %: of each hundred, or of all 150


def test_what_is_no_file_is_named_by_what_it_is(tmp_path, tokenizer):
    assert sources(train(tokenizer, dataset_name="demo"))[0]["source"] == "the train split of demo"
    rows = Dataset.from_dict({"text": texts(20, "girl")})
    rows.save_to_disk(tmp_path / "saved")
    found = sources(train(tokenizer, dataset_name=str(tmp_path / "saved")))
    assert found[0] == {**BLOCK, "source": f"the train split of {tmp_path / 'saved'}", "first_row": 1, "last_row": 1}


def test_of_a_stream_whose_parts_cannot_be_counted_only_the_source_is_known(tmp_path, tokenizer):
    for i in range(2):
        write(tmp_path / "data" / f"train-{i}.parquet", texts(20, "girl"))
    blocks = train(tokenizer, dataset_name=str(tmp_path / "data"), streaming=True)
    assert sources(blocks)[0] == {**BLOCK, "source": f"the train split of {tmp_path / 'data'}"}


def test_blocks_know_their_source_whatever_is_done_with_them(tmp_path, tokenizer):
    path = write(tmp_path / "notes.jsonl", texts(20, "girl"))
    blocks = train(tokenizer, train_file=path)
    shuffled = blocks.shuffle(seed=1)
    order = blocks.add_column("place", range(len(blocks))).shuffle(seed=1)["place"]
    assert [source["first_row"] for source in sources(shuffled)] == [sources(blocks)[i]["first_row"] for i in order]
    split = blocks.train_test_split(test_size=3, seed=0)["test"].map(lambda row: {"length": len(row["input_ids"])})
    assert all(source["source"] == "notes.jsonl" for source in sources(split))
    blocks.save_to_disk(tmp_path / "blocks")
    assert sources(Dataset.load_from_disk(tmp_path / "blocks")) == sources(blocks)
    again = train(tokenizer, train_file=write(tmp_path / "others.jsonl", texts(20, "boat")))
    assert sources(concatenate_datasets([blocks, again])) == [{}] * (len(blocks) + len(again)), "and nothing false"


def test_without_being_asked_for_no_column_is_there(tmp_path, tokenizer):
    path = write(tmp_path / "notes.jsonl", texts(20, "girl"))
    for streaming in (False, True):
        arguments = DataArguments(train_file=path, streaming=streaming)
        plain = load_blocks(arguments, tokenizer, SIZE, ["train"])["train"]
        assert set(next(iter(plain))) == {"input_ids", "labels"}
        with_sources = train(tokenizer, train_file=path, streaming=streaming)
        assert [list(row["input_ids"]) for row in plain] == [list(row["input_ids"]) for row in with_sources]


@pytest.mark.parametrize("removes", [True, False])
@pytest.mark.parametrize("streaming", [False, True], ids=["on disk", "streamed"])
def test_no_model_gets_the_source(tmp_path, tokenizer, build, streaming, removes):
    path = write(tmp_path / "notes.jsonl", texts(20, "girl"))
    blocks = train(tokenizer, train_file=path, streaming=streaming)
    trainer = build(data=blocks, max_steps=2, remove_unused_columns=removes)
    trainer.row_rule = object()
    expected = [row["input_ids"] for row in blocks]
    found = []
    for batch in trainer.get_train_dataloader():
        inputs, numbers = taken_out(batch)
        assert set(inputs) == {"input_ids", "labels"}
        found += [source_of(blocks, number)["first_row"] for number in numbers]
    assert found == [source["first_row"] for source in sources(blocks)]
    assert len(found) == len(expected)


# ---- Sentences ----


def sentence_rows(count: int) -> list[dict[str, Any]]:
    return [{"sentence": f"This is {i}.", "label": "good" if i % 2 else "bad"} for i in range(count)]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_sentence_names_its_row_also_where_validation_rows_are_trained_on(tmp_path, tokenizer, suffix):
    paths = {}
    for name, count in (("train", 9), ("validation", 5)):
        paths[f"{name}_file"] = str(tmp_path / f"{name}{suffix}")
        rows = Dataset.from_list(sentence_rows(count))
        if suffix == ".csv":
            rows.to_csv(paths[f"{name}_file"])
        else:
            rows.to_json(paths[f"{name}_file"])
    options = {"sentence_columns": ["sentence"], "max_train_samples": 6, **paths}
    arguments = SentenceArguments(**options, merge_validation=True)
    rows = tokenize_sentences(load_sentences(arguments, ["train"], with_sources=True), tokenizer, 32)["train"]
    found = sources(rows)
    expected = [(f"train{suffix}", i) for i in range(1, 7)] + [(f"validation{suffix}", i) for i in range(1, 6)]
    assert [(each["source"], each["first_row"]) for each in found] == expected
    assert all(each["first_row"] == each["last_row"] for each in found)
    plain = load_sentences(SentenceArguments(**options), ["train", "validation"]).splits
    assert [split.column_names for split in plain.values()] == [["text", "label"]] * 2


def test_a_demo_task_is_named_by_its_flag(tokenizer):
    sentences = load_sentences(SentenceArguments(task_name="demo"), ["train", "validation"], with_sources=True)
    assert sources(sentences.splits["train"])[2] == {"source": "demo", "first_row": 3, "last_row": 3}
    assert SOURCE_COLUMN not in sentences.splits["validation"].column_names


# ---- Data sets of one's own, and the numbers themselves ----


def test_rows_of_ones_own_have_an_index_and_no_source():
    rows = Dataset.from_dict({"input_ids": [[1], [2]]})
    assert source_of(rows, 1) == source_of([1, 2], 1) == {"index": 1}
    assert source_of(rows, torch.tensor(1)) == {"index": 1}
    assert source_of(rows, UNKNOWN) == {}
    marked = name_sources(with_rows(rows), ["chat.jsonl"])
    assert json.dumps(source_of(marked, np.int64(1))) == (
        '{"index": 1, "source": "chat.jsonl", "first_row": 2, "last_row": 2}'
    )


def test_numbers_fit_into_a_float_and_those_that_do_not_say_nothing():
    names = [f"{i}" for i in range(3000)]
    [greatest] = in_source(rows_of(0, [2**29 - 1]), 2047)
    assert int(float(greatest)) == greatest < 2**53
    assert located(names, greatest) == {"source": "2047", "first_row": 2**29 - 1, "last_row": 2**29 - 1}
    assert in_source(rows_of(0, [1]), 2048).tolist() == rows_of(0, [2**29]).tolist() == [UNKNOWN]
    [wide] = from_to(rows_of(1, np.arange(1, 2**14)), np.array([4]), np.array([4 + 2**13]))
    assert located(names, wide) == {"source": "1", "first_row": 5}
    assert located(names, UNKNOWN) == located([], greatest) == {}
