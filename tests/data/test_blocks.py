"""From files and data sets to blocks."""

from __future__ import annotations

import bz2
import functools
import gzip
import importlib.util
import io
import json
import lzma
import re
import zipfile

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, LlamaConfig

from abr_trainer.data.arguments import DataArguments, TextArguments
from abr_trainer.data.blocks import choose_block_size, load_blocks
from abr_trainer.data.corpora import Corpus, find_corpus
from abr_trainer.data.demo import DEMO_MODEL
from abr_trainer.data.sources import load_texts
from abr_trainer.records.errors import BadRow
from run_clm_abr import main
from tests.conftest import RUN, SHARED

pytestmark = pytest.mark.slow

gzipped = functools.partial(gzip.compress, mtime=0)
"""The same each time: what tests are called depends on it."""


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
    assert f"--max_train_samples is 10000, but there are only {len(all_of_them['train'])} blocks" in caplog.text


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
        ({"validation_split_percentage": 100}, "--validation_split_percentage must be between 0 and 100, got 100."),
    ],
)
def test_bad_arguments_are_told_at_once(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DataArguments(**arguments)


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("", {}, "is empty."),
        ("\n\n", {}, "is empty."),
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
    with pytest.raises(ValueError, match="has too few rows to use some for evaluation. Give --validation_file."):
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
        ({"dataset_mix": "wikitext"}, "'wikitext' must be a name, given once, with a probability between 0 and "),
        ({"dataset_mix": "a=0.5,b=x"}, "'b=x' must be a name, given once"),
        ({"dataset_mix": "a=0.5,a=0.5"}, "'a=0.5' must be a name, given once"),
        ({"dataset_mix": "a=0.5,b=0.4"}, "the probabilities sum to 0.9, not to 1."),
        ({"dataset_mix": "a=0.5,b=0.5", "dataset_name": "demo"}, "--dataset_name both choose the training data."),
    ],
)  # fmt: skip
def test_a_mix_that_is_none_is_told(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DataArguments(**options)


def load_train(path, tokenizer, block_size=8, **options):
    named = "dataset_name" if path.is_dir() else "train_file"
    return load_blocks(DataArguments(**{named: str(path)}, **options), tokenizer, block_size, ["train"])["train"]


def message_of(path, tokenizer, **options):
    """Return the one line with which a file is refused."""
    with pytest.raises(ValueError, match=re.escape(path.name)) as caught:
        list(load_train(path, tokenizer, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(path), "FILE")


PROSE = [{"text": f"The king opened the {i}th letter."} for i in range(30)]
HUMAN = {"from": "human", "value": "Who are you?"}
USER = {"role": "user", "content": "Who are you?"}


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"id": "identity_7", "conversations": [HUMAN]}, "conversations holds messages with from and value."),
        ({"source": "wiki", "messages": [USER]}, "messages holds messages with role and content."),
        ({"system": "You are kind to all.", "messages": [{**USER, "name": "Ann"}]}, "messages with role and content."),
        ({"topic": "the sea", "chosen": [USER], "rejected": [USER]}, "chosen holds messages with role and content."),
        ({"prompt": "Say who you are.", "completion": "I am Ann."}, "prompt and completion are the parts of one"),
        ({"instruction": "Say who you are.", "input": "", "output": "I am Ann."}, "instruction and output are the"),
    ],
)
def test_chats_are_no_text_and_what_reads_them_is_told(tmp_path, tokenizer, row, shape):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [dict.fromkeys(row), *[row] * 20])
    message = message_of(path, tokenizer)
    assert message.startswith(f"--train_file FILE is not plain text: its columns are {', '.join(row)}, and ")
    assert shape in message
    assert "abr sft trains on them." in message
    Dataset.from_list([row] * 20).save_to_disk(tmp_path / "saved")
    assert shape in message_of(tmp_path / "saved", tokenizer)
    with pytest.raises(ValueError, match=re.escape(shape)):
        load_texts(TextArguments(text_file=str(path)))


def test_a_chat_that_is_named_is_no_text_either(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"text": "Who are you?", "messages": [USER]}] * 20)
    message = message_of(path, tokenizer, text_column="messages")
    assert "holds lists of dict, not text. messages holds messages with role and content. abr sft trains" in message
    assert len(load_train(path, tokenizer)) > 5, "a column that is called text is the text"


def test_objects_beside_a_string_are_not_guessed_about(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    rows = [{"setting": "An inn at night.", "turns": [{"speaker": "Ann", "says": "Good evening."}]}] * 30
    write_rows(path, rows)
    assert "turns holds lists of objects with speaker, says." in message_of(path, tokenizer)
    named = load_train(path, tokenizer, text_column="setting")
    assert tokens_of(named)[:4] == ids(tokenizer, rows[0]["setting"])[:4]


@pytest.mark.parametrize(
    "column",
    [
        {"id": [f"identity_{i}" for i in range(30)]},
        {"link": [f"https://example.org/{i}" for i in range(30)]},
        {"digest": [f"{i:032x}" for i in range(30)]},
        {"feeling": ["very good", "very bad"] * 15},
        {"source": ["The Evening Post of Leeds"] * 30},
        {"keys": [["sea", "land"]] * 30},
    ],
)
def test_names_labels_and_links_are_taken_for_text_only_if_that_is_said(tmp_path, tokenizer, column):
    path = tmp_path / "rows.jsonl"
    [name] = column
    write_rows(path, [{"n": i, name: value} for i, value in enumerate(column[name])])
    message = message_of(path, tokenizer)
    assert f"Which column of --train_file FILE is the text? Choose with --text_column from {name}." in message
    assert len(load_train(path, tokenizer, text_column=name)) > 5


@pytest.mark.parametrize(
    "rows",
    [
        [{"id": f"a_{i}", "body": f"The {i}th letter was lost."} for i in range(30)],
        [{"url": f"https://a.org/{i}", "meta": {"n": i}, "article": f"The {i}th letter was lost."} for i in range(30)],
        [{"id": f"a_{i}", "正文": f"这是第{i}封丢失的信。没有人读过它。"} for i in range(30)],
        [{"id": i, "turns": [f"Where is letter {i}?", "It was lost."]} for i in range(30)],
        [{"name": f"emma{i}"} for i in range(30)],
        [{"id": None, "body": None}, *({"id": f"a_{i}", "body": f"The {i}th letter was lost."} for i in range(30))],
    ],
)
def test_the_only_column_that_can_be_text_is_taken_whatever_its_name(tmp_path, tokenizer, rows):
    path = tmp_path / "rows.jsonl"
    write_rows(path, rows)
    value = list(rows[-30].values())[-1]
    text = "\n".join(value) if isinstance(value, list) else value
    assert tokens_of(load_train(path, tokenizer))[:4] == ids(tokenizer, text)[:4]


def zipped(data, *names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, data)
    return buffer.getvalue()


COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zip": lambda data: zipped(data, "rows.jsonl", "__MACOSX/._rows.jsonl"),
}


@pytest.mark.parametrize(
    ("table", "compression"),
    [
        *((".jsonl", each) for each in COMPRESS),
        (".ndjson", ""),
        (".JSONL", ".gz"),
        (".json", ".gz"),
        (".csv", ".gz"),
        (".tsv", ""),
        (".tsv", ".bz2"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_table_is_read_by_its_suffix_compressed_or_not(tmp_path, tokenizer, table, compression, streaming):
    plain = tmp_path / "plain.jsonl"
    write_rows(plain, PROSE)
    path = tmp_path / f"rows{table}{compression}"
    data = plain.read_text()
    if table == ".json":
        data = json.dumps(PROSE, indent=1)
    elif table in (".csv", ".tsv"):
        separator = "," if table == ".csv" else "\t"
        data = f"n{separator}text\n" + "".join(f"1{separator}{row['text']}\n" for row in PROSE)
    path.write_bytes(COMPRESS[compression](data.encode()))
    blocks = load_train(path, tokenizer, streaming=streaming)
    assert [list(row["input_ids"]) for row in blocks] == load_train(plain, tokenizer)["input_ids"][:]
    texts, _ = load_texts(TextArguments(text_file=str(path)))
    assert texts == [row["text"] for row in PROSE]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("rows.zip", zipped(b"A letter.", "a.txt", "b.txt"), "holds 2 files, but must hold one"),
        ("rows.csv", b"text;label\nhello there;1\n", "its header has only one column, 'text;label'. Separate cells"),
        ("rows.tsv", b"id,text\n1,Lost and found.\n", "Separate cells with tabs, not ','; if they are separated"),
        ("rows.jsonl", gzipped(b"{}"), "is not text but gzip: name it .gz."),
        ("rows.docx", zipped(b"A letter.", "word.xml"), "is not text but a ZIP archive"),
        ("rows.pdf", b"%PDF-1.7\n1 0 obj", "is not text but PDF"),
        ("rows.bin", b"A letter.\0\0\1", "is not text but binary data"),
        ("rows.txt", "A letter.".encode("utf-16"), "is not text but UTF-16: save it as UTF-8."),
        ("rows.jsonl.gz", b'{"text": "A letter."}', "Not a gzipped file"),
        ("rows.jsonl.gz", gzipped(b'{"text": "A letter."}' * 99)[:40], "Compressed file ended before"),
        ("rows.parquet.gz", gzipped(b"PAR1"), "is a compressed Parquet file, which cannot be read. Decompress it."),
    ],
)  # fmt: skip
def test_what_is_no_text_is_refused(tmp_path, tokenizer, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    assert message in message_of(path, tokenizer)


@pytest.mark.skipif(importlib.util.find_spec("zstandard") is not None, reason="zstandard is installed")
def test_the_package_that_a_compression_needs_is_named(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd")
    assert "is compressed with zstd, which needs a package: pip install zstandard" in message_of(path, tokenizer)


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".jsonl", ".csv"])
def test_a_mark_of_the_byte_order_is_no_text(tmp_path, tokenizer, suffix):
    path = tmp_path / f"rows{suffix}"
    data = {".jsonl": b'{"text": "A letter was lost."}\n', ".csv": b"text\nA letter was lost.\n"}
    data = b"\xef\xbb\xbf" + data.get(suffix, b"A letter was lost.\n") * 20
    path.write_bytes(gzipped(data) if suffix.endswith(".gz") else data)
    assert tokens_of(load_train(path, tokenizer))[:3] == ids(tokenizer, "A letter was lost.")[:3]


@pytest.mark.parametrize("name", ["train.txt", "train.txt.gz", "train.jsonl", "train.csv", "train.tsv"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_directory_gives_the_blocks_of_the_file_in_it(tmp_path, tokenizer, name, streaming):
    text = "".join(f" The girl saw the boat {i} .\n\n" for i in range(40))
    if not name.startswith("train.txt"):
        rows = ["None", "NA", *(f"The girl saw the boat {i} ." for i in range(40))]
        text = "text\n" + "".join(f"{row}\n" for row in rows)
        if name == "train.jsonl":
            text = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / name
    path.write_bytes(gzipped(text.encode()) if name.endswith(".gz") else text.encode())
    in_folder = load_train(folder, tokenizer, streaming=streaming)
    assert [list(row["input_ids"]) for row in in_folder] == load_train(path, tokenizer)["input_ids"][:]
    named, _ = load_texts(TextArguments(dataset_name=str(folder), split="train"))
    assert named == load_texts(TextArguments(text_file=str(path)))[0]


def test_a_directory_is_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"is a directory, but must be a file\."):
        DataArguments(train_file=str(tmp_path))


BAD_ROWS = [
    ({"text": 5}, {}, "has the number 5. It must be text or a list of turns."),
    ({"text": {"a": 1}}, {}, "has an object. It must be text or a list of turns."),
    ({"text": ["Good evening.", None]}, {}, "has null as turn 2. It must be text."),
    ({"text": ["Good evening.", 7]}, {}, "has the number 7 as turn 2. It must be text."),
    ({"input_ids": [1, -2]}, {}, "has the token id -2 as token 2; the model has ids from 0 to 1023."),
    ({"input_ids": [1024, 1]}, {}, "has the token id 1024 as token 1; the model has ids from 0 to 1023."),
    ({"input_ids": [3, None]}, {}, "has null as token 2"),
    ({"input_ids": [3, 2.5]}, {}, "has the number 2.5 as token 2. It must be a token id."),
    ({"input_ids": "a b"}, {}, "has 'a b'. It must be a list of token ids."),
    ("[1, 2]", {}, "has a list. It must be a JSON object."),
    ('{"text": "A le', {}, "cannot be read as JSON: "),
]


@pytest.mark.parametrize(("row", "options", "message"), BAD_ROWS)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_row_is_told_by_its_line(tmp_path, tokenizer, row, options, message, streaming):
    good = {"input_ids": [1, 2, 3, 4]} if "input_ids" in row else PROSE[0]
    lines = [*[json.dumps(good)] * 13, row if isinstance(row, str) else json.dumps(row), *[json.dumps(good)] * 13]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(["", *lines]))
    assert message_of(path, tokenizer, streaming=streaming).startswith(f"line 15 of --train_file FILE {message}")


@pytest.mark.parametrize("suffix", [".parquet", ".json"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_row_of_a_table_is_told_by_its_number(tmp_path, tokenizer, suffix, streaming):
    good = [{"input_ids": [1, 2, 3, 4]}] * 9
    path = tmp_path / f"rows{suffix}"
    for row, found in (([3, -1], "the token id -1"), ([3, None], "null")):
        write_rows(path, [*good, {"input_ids": row}, *good])
        message = message_of(path, tokenizer, streaming=streaming)
        assert message.startswith(f"row 10 of --train_file FILE has {found} as token 2")


def test_ids_that_only_the_model_knows_are_taken(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"input_ids": [1024] * 8}] * 3)
    arguments = DataArguments(train_file=str(path))
    assert len(load_blocks(arguments, tokenizer, 8, ["train"], vocabulary=1025)["train"]) == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_keeps_its_number_where_others_are_held_out(tmp_path, tokenizer, streaming):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [*PROSE * 5, {"text": 3}, *PROSE * 5])
    arguments = DataArguments(
        train_file=str(path), streaming=streaming, validation_split_percentage=30, max_eval_samples=2
    )
    with pytest.raises(BadRow, match=r"^line 151 of --train_file "):
        list(load_blocks(arguments, tokenizer, 8, ["train", "validation"])["train"])


def test_a_row_of_a_directory_is_told_by_its_file(tmp_path, tokenizer):
    write_rows(tmp_path / "train-1.jsonl", PROSE)
    write_rows(tmp_path / "train-2.jsonl", [*PROSE, {"text": 3}])
    with pytest.raises(BadRow, match=r"^line 31 of train-2.jsonl of the train split of --dataset_name .* has the nu"):
        load_train(tmp_path, tokenizer)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("n,body\n1,Lost.\n", "train-2.csv: there is no column text."),
        (
            "n,text\n" + "1,Lost.\n" * 200 + "1,Lost, and found\n",
            "train-2.csv: line 202 has 3 cells, but the header has 2.",
        ),
    ],
)
def test_a_table_of_a_directory_is_told_by_its_file(tmp_path, tokenizer, second, message):
    (tmp_path / "train-1.csv").write_text("n,text\n" + "1,Lost.\n" * 9)
    (tmp_path / "train-2.csv").write_text(second)
    assert f"--dataset_name FILE cannot be read: {message}" in message_of(tmp_path, tokenizer)


def test_workers_that_share_files_do_not_tell_a_wrong_line(tmp_path, tokenizer):
    write_rows(tmp_path / "train-1.jsonl", PROSE * 50)
    write_rows(tmp_path / "train-2.jsonl", [*PROSE * 50, {"text": 3}])
    stream = load_train(tmp_path, tokenizer, streaming=True)
    with pytest.raises(BadRow, match=r"^row 1501 of those that worker 1 reads of the train split of --dataset_name "):
        list(DataLoader(stream, num_workers=2, collate_fn=list))


def test_processes_that_tokenize_tell_a_bad_row_in_one_line(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [*PROSE, {"text": 3}, *PROSE])
    message = message_of(path, tokenizer, preprocessing_num_workers=2)
    assert message == "line 31 of --train_file FILE has the number 3. It must be text or a list of turns."


def test_a_worker_that_reads_a_stream_tells_a_bad_row_in_one_line(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [*PROSE * 50, {"text": 3}])
    stream = load_train(path, tokenizer, streaming=True)
    with pytest.raises(BadRow) as caught:
        list(DataLoader(stream, num_workers=1, collate_fn=list))
    assert str(caught.value).startswith(f"line 1501 of --train_file {path} has the number 3")
    assert "\n" not in str(caught.value)


def test_a_run_that_comes_to_a_bad_row_of_a_stream_ends_with_one_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [*[{"input_ids": [5] * 8}] * 1000, {"input_ids": [5] * 7 + [5000]}])
    flags = [flag for flag in RUN if flag not in ("--do_eval", "--dataset_name", "demo", "--max_train_samples", "24")]
    flags += ["--train_file", str(path), "--streaming", "--max_steps", "9"]
    flags += ["--block_size", "8", "--per_device_train_batch_size", "250"]
    with pytest.raises(SystemExit) as ended:
        main([*flags, "--output_dir", str(tmp_path / "run")])
    where = f"line 1001 of --train_file {path}"
    assert ended.value.code == f"error: {where} has the token id 5000 as token 8; the model has ids from 0 to 1023."


@pytest.mark.parametrize(
    ("column", "empty", "good"),
    [
        ("text", None, "A letter was lost."),
        ("dialog", None, ["Where is it?", "Lost."]),
        ("dialog", [], ["Where is it?", "Lost."]),
        ("input_ids", None, [1, 2, 3]),
        ("input_ids", [], [1, 2, 3]),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_without_anything_are_left_out_and_counted(tmp_path, tokenizer, caplog, column, empty, good, suffix):
    path, whole = tmp_path / f"rows{suffix}", tmp_path / f"whole{suffix}"
    rows = [{"id": i, column: good} for i in range(20)]
    write_rows(whole, rows)
    write_rows(path, [*rows[:7], {"id": 7, column: empty}, *rows[7:], {"id": 8, column: empty}])
    blocks = load_train(path, tokenizer)
    assert blocks["input_ids"][:] == load_train(whole, tokenizer)["input_ids"][:]
    line = "line" if suffix == ".jsonl" else "row"
    said = f"2 of 22 rows of --train_file {path} have no {column} and are left out. The first is {line} 8."
    assert [record.message for record in caplog.records] == [said]
    stream = load_train(path, tokenizer, streaming=True)
    assert [list(row["input_ids"]) for row in stream] == blocks["input_ids"][:]
    assert f"{line} 8 of --train_file {path} has no {column} and is left out" in caplog.records[-1].message
    if column != "input_ids":
        texts, _ = load_texts(TextArguments(text_file=str(path)))
        assert texts == load_texts(TextArguments(text_file=str(whole)))[0]
        assert caplog.records[-1].message == said.replace("--train_file", "--text_file")


def test_a_field_that_is_missing_is_null_and_an_empty_line_is_nothing(tmp_path, tokenizer, caplog):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [*PROSE[:3], {"id": 7}, *PROSE[3:]])
    path.write_text(f"\n{path.read_text()}\n  \n")
    load_train(path, tokenizer)
    assert "1 of 31 rows" in caplog.text
    assert "The first is line 5." in caplog.text


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".jsonl", ".csv", ".json"])
@pytest.mark.parametrize("streaming", [False, True])
def test_bytes_that_are_not_utf8_are_told_by_their_line(tmp_path, tokenizer, suffix, streaming):
    begin, row, bad, end = {
        ".jsonl": (b"", b'{"text": "A letter."}\n', b'{"text": "caf\xe9"}\n', b""),
        ".csv": (b"text\n", b"A letter.\n", b"caf\xe9\n", b""),
        ".json": (b"[\n", b'{"text": "A letter."},\n', b'{"text": "caf\xe9"}\n', b"]"),
    }.get(suffix, (b"", b"A letter.\n", b"caf\xe9\n", b""))
    data = begin + row * 120 + bad + end
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(gzipped(data) if suffix.endswith(".gz") else data)
    number = 121 + (suffix in (".csv", ".json"))
    message = message_of(path, tokenizer, streaming=streaming)
    assert message.endswith(f"line {number} of {path.name} has 0xe9, which is not UTF-8. Save it as UTF-8.")


def test_a_table_without_rows_is_empty(tmp_path, tokenizer):
    Dataset.from_dict({"text": []}).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.csv").write_text("id,text\n")
    for path in (tmp_path / "rows.parquet", tmp_path / "rows.csv"):
        for streaming in (False, True):
            assert message_of(path, tokenizer, streaming=streaming) == "--train_file FILE is empty."


def test_a_column_of_numbers_is_no_text(tmp_path, tokenizer):
    (tmp_path / "rows.jsonl").write_text('{"text": 1}\n' * 9)
    (tmp_path / "rows.csv").write_text("text,id\n" + "1.5,a\n" * 9)
    assert "has no text column: its columns are text (int)." in message_of(tmp_path / "rows.jsonl", tokenizer)
    for path, kind in ((tmp_path / "rows.jsonl", "int"), (tmp_path / "rows.csv", "float")):
        assert f"holds {kind}, not text." in message_of(path, tokenizer, text_column="text")


def test_cells_that_nobody_asked_for_do_not_matter(tmp_path, tokenizer):
    path = tmp_path / "rows.csv"
    texts = [f"Lost, {i}" for i in range(10_050)]
    numbers = ["1"] * 10_010 + [""] * 20 + ["unknown"] * 20
    path.write_text("n,text\n" + "".join(f'{n},"{text}"\n' for n, text in zip(numbers, texts, strict=True)))
    for column in (None, "text"):
        assert load_texts(TextArguments(text_file=str(path), text_column=column))[0] == texts
    blocks = list(load_train(path, tokenizer, 128, streaming=True))
    assert 128 * len(blocks) > 10_050 * len(ids(tokenizer, "Lost,"))


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("streaming", [False, True])
def test_fields_that_nobody_asked_for_do_not_matter(tmp_path, tokenizer, suffix, streaming):
    long = [{**row, "note": "x" * 400_000, "tag": 1, "more": {"a": 1}} for row in PROSE]  # beyond a reader's chunk
    late = [{**row, "note": 7, "tag": ["a"], "more": [1], "new": {"b": 2}} for row in PROSE]
    path = tmp_path / f"rows{suffix}"
    write_rows(path, [*long, *late])
    write_rows(tmp_path / "alone.jsonl", PROSE * 2)
    blocks = load_train(path, tokenizer, streaming=streaming)
    whole = load_train(tmp_path / "alone.jsonl", tokenizer)
    assert [list(row["input_ids"]) for row in blocks] == whole["input_ids"][:]


def test_a_cell_of_text_may_look_like_a_number(tmp_path, tokenizer):
    path = tmp_path / "rows.csv"
    path.write_text("id,text\n" + "1,A letter was lost.\n2,007\n" * 20)
    assert load_texts(TextArguments(text_file=str(path)))[0] == ["A letter was lost.", "007"] * 20


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("Lost, and found\n" * 9, "row 1 has more cells than the header. Quote cells that contain the separator."),
        (
            "Lost.\n" * 150 + "Lost, and found\n",
            "line 152 has 2 cells, but the header has 1. Quote cells that contain the",
        ),
        ("Lost.\n" * 150 + '"Lost.\n' + "Lost.\n" * 9, "row 151 has a quote that is not closed."),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_of_a_csv_that_would_be_cut_is_refused(tmp_path, tokenizer, rows, message, streaming):
    path = tmp_path / "rows.csv"
    path.write_text(f"text\n{rows}")
    assert message in message_of(path, tokenizer, streaming=streaming)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            "id,text\n0,Lost.\nFound.\n",
            "line 3 has 1 cell, but the header has 2. Quote cells that contain a line break",
        ),
        ("text,id,x\nLost.,1,2\nA letter,\nwas lost.,1,2\n", "line 3 has 2 cells, but the header has 3."),
        ('id,text\n1,"Lost\nand found"\n2\n', "line 4 has 1 cell, but the header has 2."),
        ("id,text\n" + "1,Lost.\n" * 12_000 + "1\n", "line 12002 has 1 cell, but the header has 2."),
        ("text,id,text\nLost.,1,Found.\n", "its header has the column 'text' twice. Remove or rename one."),
        (f"id,text\n1,{'x' * 200_000}\n2\n", "line 3 has 1 cell, but the header has 2."),
    ],
)
def test_a_table_whose_cells_would_be_lost_is_refused(tmp_path, tokenizer, table, message):
    """pandas takes the cells that a short row lacks to be empty, and renames a column that stands twice."""
    path = tmp_path / "rows.csv"
    path.write_text(table)
    assert message in message_of(path, tokenizer)


def test_empty_cells_that_have_their_separators_are_read(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('text,id,\nLost.,,\n"Lost\nand found",1,\n\n')
    assert load_texts(TextArguments(text_file=str(path), text_column="text"))[0] == ["Lost.", "Lost\nand found"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "Lost."}, true]', "row 2 is True. It must be a JSON object."),
        ('[{"text": "Lost."}, ["Found."]]', "row 2 is ['Found.']. It must be a JSON object."),
        ('[\n{"text": "Lost."},\n{"text": "Found."\n]', "line 4, character 1: Expecting ',' delimiter."),
    ],
)
def test_a_json_file_that_is_no_list_of_objects_is_refused(tmp_path, tokenizer, content, message):
    path = tmp_path / "rows.json"
    path.write_text(content)
    assert message in message_of(path, tokenizer)
