"""From files and data sets to blocks."""

from __future__ import annotations

import json
import re

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import AutoTokenizer, LlamaConfig

from abr_trainer.corpora import Corpus, find_corpus
from abr_trainer.data import DataArguments, choose_block_size, load_blocks
from abr_trainer.demo import DEMO_MODEL
from tests.conftest import SHARED


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def tokens_of(blocks):
    return [token for row in blocks["input_ids"] for token in row]


def write_rows(path, rows):
    if path.suffix == ".csv":
        Dataset.from_list(rows).to_csv(path)
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("suffix", [".txt", ".raw", ".tokens"])
def test_a_plain_text_is_one_document_line_ends_included(tmp_path, tokenizer, suffix):
    text = "".join(f" The girl saw the boat {i} .\n\n" for i in range(40))
    path = tmp_path / f"text{suffix}"
    path.write_text(text)
    blocks = load_blocks(DataArguments(train_file=str(path)), tokenizer, 16, ["train"])["train"]
    expected = [token for line in text.splitlines(keepends=True) for token in ids(tokenizer, line)]
    assert tokens_of(blocks) == expected[: len(expected) // 16 * 16]
    assert blocks["labels"][:] == blocks["input_ids"][:]
    assert {len(row) for row in blocks["input_ids"]} == {16}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_row_is_a_document_and_ends_with_the_end_of_text(tmp_path, tokenizer, suffix):
    rows = [{"id": str(i), "text": f"The king opened the {i}th letter."} for i in range(30)]
    arguments = DataArguments(train_file=write_rows(tmp_path / f"rows{suffix}", rows))
    blocks = load_blocks(arguments, tokenizer, 8, ["train"])["train"]
    expected = [token for row in rows for token in [*ids(tokenizer, row["text"]), tokenizer.eos_token_id]]
    assert tokens_of(blocks) == expected[: len(expected) // 8 * 8]


def test_tokens_are_taken_as_they_are(tmp_path, tokenizer):
    rows = [{"input_ids": [7 * i % 50 for i in range(start, start + 8)], "text": "not this"} for start in range(5)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    blocks = load_blocks(DataArguments(train_file=path), tokenizer, 8, ["train"])["train"]
    assert [row["input_ids"] for row in blocks] == [row["input_ids"] for row in rows], "no end of text between them"
    as_text = load_blocks(DataArguments(train_file=path, text_column="text"), tokenizer, 4, ["train"])["train"]
    assert tokens_of(as_text)[:2] == ids(tokenizer, "not this")[:2]


def test_turns_of_a_dialogue_are_joined_by_newlines(tmp_path, tokenizer):
    rows = [{"dialog": ["Where is my lamp ? ", "By the river ."], "act": [2, 1]} for _ in range(20)]
    arguments = DataArguments(train_file=write_rows(tmp_path / "talk.jsonl", rows))
    blocks = load_blocks(arguments, tokenizer, 8, ["train"])["train"]
    one = [*ids(tokenizer, "Where is my lamp ?\nBy the river ."), tokenizer.eos_token_id]
    assert tokens_of(blocks)[: len(one) * 2] == one * 2


def test_more_than_a_thousand_rows_lose_no_token_but_the_last(tmp_path, tokenizer):
    path = tmp_path / "long.txt"
    path.write_text("a dog\n" * 2500)
    blocks = load_blocks(DataArguments(train_file=str(path)), tokenizer, 100, ["train"])["train"]
    assert len(blocks) == len(ids(tokenizer, "a dog\n")) * 2500 // 100


def test_validation_rows_are_taken_from_the_training_rows_where_there_are_none(tmp_path, tokenizer):
    rows = [{"text": f"Item {i}: the audit exceeded the estimate."} for i in range(100)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    arguments = DataArguments(train_file=path, validation_split_percentage=20)
    blocks = load_blocks(arguments, tokenizer, 4, ["train", "validation"])
    held_out = [token for row in rows[:20] for token in [*ids(tokenizer, row["text"]), tokenizer.eos_token_id]]
    assert tokens_of(blocks["validation"]) == held_out[: len(held_out) // 4 * 4]
    whole = load_blocks(DataArguments(train_file=path), tokenizer, 4, ["train"])["train"]
    assert abs(len(blocks["train"]) + len(blocks["validation"]) - len(whole)) <= 1


def test_asking_for_more_blocks_than_there_are_warns_and_uses_all(tmp_path, tokenizer, caplog):
    path = tmp_path / "text.txt"
    path.write_text("The cat found a spoon.\n" * 50)
    few = load_blocks(DataArguments(train_file=str(path), max_train_samples=3), tokenizer, 8, ["train"])["train"]
    all_of_them = load_blocks(DataArguments(train_file=str(path), max_train_samples=10_000), tokenizer, 8, ["train"])
    assert len(few) == 3
    assert len(all_of_them["train"]) > 3
    assert f"--max_train_samples 10000 asks for more than the {len(all_of_them['train'])} blocks" in caplog.text


def test_a_stream_gives_the_same_blocks(tmp_path, tokenizer):
    rows = [{"text": f"The tribunal amended clause {i}."} for i in range(60)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    whole = load_blocks(DataArguments(train_file=path), tokenizer, 8, ["train"])["train"]
    stream = load_blocks(DataArguments(train_file=path, streaming=True), tokenizer, 8, ["train"])["train"]
    assert isinstance(stream, IterableDataset)
    assert [row["input_ids"].tolist() for row in stream] == whole["input_ids"][:]
    taken = load_blocks(DataArguments(train_file=path, streaming=True, max_train_samples=2), tokenizer, 8, ["train"])
    assert len(list(taken["train"])) == 2


def test_a_local_directory_is_a_data_set(tmp_path, tokenizer):
    rows = Dataset.from_list([{"text": f"The fox hid the mitten {i}."} for i in range(40)])
    DatasetDict(train=rows, dev=rows).save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    rows.to_parquet(tmp_path / "files" / "train.parquet")
    saved = load_blocks(DataArguments(dataset_name=str(tmp_path / "saved")), tokenizer, 8, ["train", "validation"])
    files = load_blocks(DataArguments(dataset_name=str(tmp_path / "files")), tokenizer, 8, ["train"])
    assert saved["train"][:] == files["train"][:] == saved["validation"][:]


def test_the_demo_has_three_splits(tokenizer):
    blocks = load_blocks(DataArguments(), tokenizer, 128, ["train", "validation", "test"])
    assert all(len(split) > 50 for split in blocks.values())


def test_a_primer_is_cut_like_the_rest(tmp_path, tokenizer):
    path = tmp_path / "primer.txt"
    path.write_text("The queen mended the cloak.\n" * 50)
    blocks = load_blocks(DataArguments(primer_file=str(path)), tokenizer, 16, ["train", "primer"])
    assert tokenizer.decode(blocks["primer"][0]["input_ids"]).startswith("The queen")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_file": "no/such.txt"}, "--train_file no/such.txt does not exist."),
        ({"block_size": 0}, "--block_size must be at least 2, got 0."),
        ({"max_train_samples": 0}, "--max_train_samples must be at least 1, got 0."),
        ({"validation_split_percentage": 100}, "--validation_split_percentage must lie between 0 and 100, got 100."),
    ],
)
def test_bad_arguments_are_told_at_once(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DataArguments(**arguments)


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("", {}, "is empty."),
        ('{"text": "a"}\n', {}, "less than one block: --block_size is 64."),
        ('{"text": "a"}\n', {"text_column": "body"}, "--text_column body is not in"),
        ('{"text": "a"}\n', {"text_column": "body"}, "Its columns are text."),
        ('{"n": 1}\n', {"text_column": "n"}, "holds int, not text."),
        ('{"title": "a", "body": "b"}\n', {}, "Choose with --text_column from title, body."),
        ('{"text": \n', {}, "cannot be read"),
    ],
)
def test_a_bad_file_is_told_in_one_line_that_names_it(tmp_path, tokenizer, content, arguments, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_blocks(DataArguments(train_file=str(path), **arguments), tokenizer, 64, ["train"])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_row_cannot_be_split(tmp_path, tokenizer):
    arguments = DataArguments(train_file=write_rows(tmp_path / "one.jsonl", [{"text": "The owl. " * 100}]))
    with pytest.raises(ValueError, match="has too few rows to hold some out. Give --validation_file."):
        load_blocks(arguments, tokenizer, 8, ["train", "validation"])


@pytest.mark.parametrize(
    ("content", "message"), [('{"text": "a"}\n', "is shorter than one block"), ('{"text": \n', "cannot be read")]
)
def test_a_bad_stream_is_told_before_training(tmp_path, tokenizer, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_blocks(DataArguments(train_file=str(path), streaming=True), tokenizer, 64, ["train"])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_name_is_no_pattern(tmp_path, tokenizer):
    path = tmp_path / "part[1].txt"
    path.write_text("The owl.\n" * 100)
    assert len(load_blocks(DataArguments(train_file=str(path)), tokenizer, 8, ["train"])["train"]) > 1


def test_a_corpus_is_known_by_its_path_too():
    assert find_corpus("Salesforce/wikitext").rows_are_lines
    assert DataArguments(dataset_name="allenai/c4").is_streamed
    assert find_corpus("someone/else") == Corpus("someone/else")


def test_a_missing_split_is_told(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("The owl.\n" * 100)
    message = "There is no test split. Give --test_file, or --do_predict false."
    with pytest.raises(ValueError, match=re.escape(message)):
        load_blocks(DataArguments(train_file=str(path)), tokenizer, 8, ["test"])


def test_a_data_set_that_cannot_be_reached_is_told_in_one_line(tokenizer):
    with pytest.raises(ValueError, match="--dataset_name wikitext cannot be loaded: ") as caught:
        load_blocks(DataArguments(dataset_name="wikitext"), tokenizer, 8, ["train"])
    assert "\n" not in str(caught.value)


def test_blocks_fit_the_context_of_the_model():
    config = LlamaConfig(max_position_embeddings=256)
    assert choose_block_size(DataArguments(), config) == 256
    assert choose_block_size(DataArguments(), LlamaConfig(max_position_embeddings=4096)) == 1024
    with pytest.raises(ValueError, match="--block_size 257 exceeds the model's context of 256 tokens"):
        choose_block_size(DataArguments(block_size=257), config)


@pytest.mark.skipif(not SHARED.is_dir(), reason="real corpora are not beside this checkout")
@pytest.mark.parametrize(("file", "blocks"), [("dailydialog/test.jsonl", 700), ("wikitext2/wiki.valid.tokens", 2000)])
def test_real_corpora_load(tokenizer, file, blocks):
    arguments = DataArguments(validation_file=str(SHARED / "data" / file))
    assert len(load_blocks(arguments, tokenizer, 256, ["validation"])["validation"]) > blocks


@pytest.fixture
def two_sources(tmp_path):
    """Twenty blocks of the token 5 and sixty of the token 9, each 8 long."""
    return [
        write_rows(tmp_path / f"{token}.jsonl", [{"input_ids": [token] * 8}] * count)
        for token, count in ((5, 20), (9, 60))
    ]


def drawn_from(blocks):
    return [int(row["input_ids"][0]) for row in blocks]


def test_a_mix_draws_blocks_with_its_probabilities_and_ends_with_the_first_source(two_sources, tokenizer):
    arguments = DataArguments(
        dataset_mix=f"{two_sources[0]}=0.25,{two_sources[1]}=0.75", validation_file=two_sources[1]
    )
    blocks = load_blocks(arguments, tokenizer, 8, ["train", "validation"], seed=3)
    tokens = drawn_from(blocks["train"])
    assert 20 in (tokens.count(5), tokens.count(9) - 40), "one of them is used up"
    assert 0.15 < tokens.count(5) / len(tokens) < 0.35
    assert tokens[:30] not in (sorted(tokens[:30]), sorted(tokens[:30], reverse=True))
    assert drawn_from(load_blocks(arguments, tokenizer, 8, ["train"], seed=3)["train"]) == tokens
    assert drawn_from(load_blocks(arguments, tokenizer, 8, ["train"], seed=4)["train"]) != tokens
    assert drawn_from(blocks["validation"]) == [9] * 60


def test_a_mix_until_all_are_used_up_repeats_the_shorter(two_sources, tokenizer):
    mix = f"{two_sources[0]}=0.5,{two_sources[1]}=0.5"
    tokens = drawn_from(
        load_blocks(DataArguments(dataset_mix=mix, mix_until="all_exhausted"), tokenizer, 8, ["train"])["train"]
    )
    assert tokens.count(9) >= 60
    assert tokens.count(5) > 40
    few = load_blocks(DataArguments(dataset_mix=mix, max_train_samples=7), tokenizer, 8, ["train"])["train"]
    assert len(few) == 7


def test_a_mix_of_streams_is_a_stream_with_the_same_draws(two_sources, tokenizer):
    mix = f"{two_sources[0]}=0.25,{two_sources[1]}=0.75"
    streamed = DataArguments(dataset_mix=mix, streaming=True)
    assert streamed.is_streamed
    blocks = load_blocks(streamed, tokenizer, 8, ["train"], seed=3)["train"]
    assert isinstance(blocks, IterableDataset)
    tokens = drawn_from(blocks)
    assert 0.15 < tokens.count(5) / len(tokens) < 0.35
    assert drawn_from(blocks) == tokens, "the same in every epoch"
    assert DataArguments(dataset_mix="wikitext=0.5,c4=0.5").is_streamed
    assert not DataArguments(dataset_mix="wikitext=0.5,dailydialog=0.5").is_streamed


def test_rows_held_out_of_the_first_source_are_not_trained_on(tmp_path, tokenizer):
    paths = [
        write_rows(tmp_path / f"{start}.jsonl", [{"input_ids": [start + i] * 8} for i in range(20)])
        for start in (0, 50)
    ]
    arguments = DataArguments(dataset_mix=f"{paths[0]}=0.5,{paths[1]}=0.5", validation_split_percentage=20)
    blocks = load_blocks(arguments, tokenizer, 8, ["train", "validation"])
    held_out = drawn_from(blocks["validation"])
    assert held_out == [0, 1, 2, 3]
    assert not set(held_out) & set(drawn_from(blocks["train"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_mix": "wikitext"}, "'wikitext' is not a name of its own with a probability between 0 and 1"),
        ({"dataset_mix": "a=0.5,b=x"}, "'b=x' is not a name of its own"),
        ({"dataset_mix": "a=0.5,a=0.5"}, "'a=0.5' is not a name of its own"),
        ({"dataset_mix": "a=0.5,b=0.4"}, "the probabilities sum to 0.9, not to 1."),
        ({"dataset_mix": "a=0.5,b=0.5", "dataset_name": "demo"}, "and so does --dataset_name. Leave one of them out."),
    ],
)  # fmt: skip
def test_a_mix_that_is_none_is_told(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DataArguments(**options)
