"""From chats, instructions and texts to rows of tokens, and to the tokens that are learnt."""

from __future__ import annotations

import gzip
import json
import re

import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer, LlamaConfig

from abr_trainer.data.arguments import ChatArguments, DataArguments
from abr_trainer.data.blocks import load_blocks
from abr_trainer.data.chat import Chat, Shape, Written, find_shape, read_row
from abr_trainer.data.chat_tokens import Encoder, choose_max_length, load_chats, tokenise_chats
from abr_trainer.data.demo import DEMO_MODEL
from abr_trainer.data.templates import ALPACA, TEMPLATES, check_template, find_template, marks_assistant
from abr_trainer.records.errors import BadRow

UNMARKED = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
UNMARKED += "{% if add_generation_prompt %}[assistant]{% endif %}"
ASKED = "Where is the lamp?"
ANSWER = "It is by the river."
END = "<|endoftext|>"


def user(content=ASKED, **more):
    return {"role": "user", "content": content, **more}


def assistant(content=ANSWER, **more):
    return {"role": "assistant", "content": content, **more}


@pytest.fixture(scope="module")
def tokenizer():
    found = AutoTokenizer.from_pretrained(DEMO_MODEL)
    found.chat_template = ALPACA
    return found


def write(path, rows):
    """Write rows in the format that the name of a file says."""
    if path.suffix == ".csv":
        Dataset.from_list(rows).to_csv(path)
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def tokenised(path, tokenizer, length=64, keeps_whole=False, assistant_only=False, completion_only=True, **flags):
    named = "dataset_name" if path.is_dir() else "train_file"
    arguments = ChatArguments(**{named: str(path), **flags})
    found = load_chats(arguments, ["train"])["train"]
    encoder = Encoder(tokenizer, None, assistant_only, completion_only)
    return tokenise_chats(found, arguments, encoder, length, keeps_whole)


def refused(path, tokenizer, **flags):
    """Return the line that refuses a file."""
    with pytest.raises(ValueError, match=re.escape(path.name)) as caught:
        tokenised(path, tokenizer, **flags)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(path), "FILE")


def learnt(tokenizer, row):
    return tokenizer.decode([label for label in row["labels"] if label != -100])


def read(tokenizer, row):
    return tokenizer.decode(row["input_ids"])


def written(tokenizer, *messages):
    return tokenizer.apply_chat_template(list(messages), tokenize=False)


SHAPES = {
    "messages": {"messages": [user(), assistant()]},
    "ShareGPT": {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWER}]},
    "messages by another name": {"turns": [user(), assistant()]},
    "a prompt of messages": {"prompt": [user()], "completion": [assistant()]},
    "an answer as text": {"prompt": [user()], "completion": ANSWER},
    "an instruction": {"instruction": ASKED, "input": "", "output": ANSWER},
    "a question": {"question": ASKED, "answer": ANSWER},
    "a response": {"id": 7, "prompt": ASKED, "response": ANSWER},
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".jsonl.gz"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_the_same_chat(tmp_path, tokenizer, shape, suffix):
    path = write(tmp_path / f"rows{suffix}", [SHAPES[shape]] * 3)
    found = tokenised(path, tokenizer)
    assert len(found.rows) == 3
    assert [read(tokenizer, row) for row in found.rows] == [written(tokenizer, user(), assistant())] * 3
    has_prompt = shape not in ("messages", "ShareGPT", "messages by another name")
    expected = f"{ANSWER}{END}" if has_prompt else written(tokenizer, user(), assistant())
    assert {learnt(tokenizer, row) for row in found.rows} == {expected}


@pytest.mark.parametrize("template", [ALPACA, UNMARKED])
def test_only_what_the_assistant_writes_is_learnt_marked_or_not(tmp_path, tokenizer, template):
    rows = [{"messages": [user(), assistant(), user("Bye."), assistant("See you.")]}]
    unmarked = AutoTokenizer.from_pretrained(DEMO_MODEL)
    unmarked.chat_template = template
    (row,) = tokenised(write(tmp_path / "rows.jsonl", rows), unmarked, length=200, assistant_only=True).rows
    assert learnt(unmarked, row) == f"{ANSWER}{END}See you.{END}"
    assert read(unmarked, row) == written(unmarked, *rows[0]["messages"])


@pytest.mark.parametrize("name", TEMPLATES)
def test_marks_and_prefixes_tell_the_same_tokens(tokenizer, name):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.chat_template = TEMPLATES[name]
    assert marks_assistant(tokenizer.chat_template)
    chat = Chat([{"role": "system", "content": "Be kind."}, user(), assistant(), user("And now?"), assistant("Gone.")])
    encoder = Encoder(tokenizer, assistant_only=True)
    ids, marked = encoder._marked(chat, str)
    others, apart = encoder._told_apart(chat, str)
    assert ids == others
    beside = tokenizer.decode([token for token, one, other in zip(ids, marked, apart, strict=True) if one != other])
    assert not beside.strip(), "white space after a turn may belong to either"
    assert 0 < marked.sum() < len(ids)


def test_a_template_that_writes_earlier_turns_otherwise_is_refused_with_the_row(tmp_path, tokenizer):
    moody = "{{ messages|length }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    other = AutoTokenizer.from_pretrained(DEMO_MODEL)
    other.chat_template = moody
    path = write(tmp_path / "rows.jsonl", [SHAPES["messages"]])
    message = refused(path, other, assistant_only=True)
    assert message.startswith("line 1 of --train_file FILE: the chat template does not mark the assistant's tokens")
    assert "--assistant_only_loss false" in message
    assert len(tokenised(path, other).rows) == 1


PROMPT = {"prompt": [user()], "completion": [assistant()]}
ANSWERS = "{% if add_generation_prompt %}[assistant]<think>{% endif %}"


def with_template(template):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("row", [PROMPT, SHAPES["an instruction"]], ids=["messages", "an instruction"])
def test_a_template_that_writes_a_prompt_otherwise_before_its_answer_is_refused(tmp_path, row):
    only_last = "{% for m in messages %}[{{ m.role }}]{% if loop.last and m.role == 'user' %}Be kind.{% endif %}"
    tokenizer = with_template(f"{only_last}{{{{ m.content }}}}{{% endfor %}}")
    path = write(tmp_path / "rows.jsonl", [row])
    message = refused(path, tokenizer)
    assert message.startswith("line 1 of --train_file FILE: the chat template writes the prompt differently if")
    assert message.endswith("or --completion_only_loss false.")
    assert ASKED in learnt(tokenizer, tokenised(path, tokenizer, completion_only=False).rows[0])


def test_a_token_over_the_end_of_the_prompt_is_learnt(tmp_path):
    tokenizer = with_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    row = {"prompt": [user("See the l")], "completion": [assistant("amp.")]}
    (row,) = tokenised(write(tmp_path / "rows.jsonl", [row]), tokenizer).rows
    assert tokenizer(["See the l"])["input_ids"][0][-1] not in row["input_ids"], "it is another token"
    assert learnt(tokenizer, row).endswith("lamp.")
    assert "See" not in learnt(tokenizer, row)


def test_what_makes_the_assistant_answer_may_be_more_than_stands_before_an_answer(tmp_path):
    tokenizer = with_template(UNMARKED.partition("{% if")[0] + ANSWERS)
    (row,) = tokenised(write(tmp_path / "rows.jsonl", [PROMPT]), tokenizer).rows
    assert learnt(tokenizer, row) == f"{ANSWER}{END}"


def test_a_prompt_may_be_followed_by_another_message_than_an_answer(tmp_path):
    tokenizer = with_template(UNMARKED)
    row = {"prompt": [user(), assistant("Wait.")], "completion": [user("And now?"), assistant()]}
    (row,) = tokenised(write(tmp_path / "rows.jsonl", [row]), tokenizer, length=200).rows
    assert learnt(tokenizer, row).endswith(f"user]And now?{END}[assistant]{ANSWER}{END}")
    assert "Wait." not in learnt(tokenizer, row)


def test_a_chat_that_the_assistant_begins_is_refused_where_nothing_is_marked(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", [{"conversations": [{"from": "gpt", "value": ANSWER}]}])
    message = refused(path, with_template(UNMARKED), assistant_only=True)
    assert message.startswith("line 1 of --train_file FILE: message 1 is the assistant's, and the chat template does")
    assert "Put a system or user message before it" in message
    assert learnt(tokenizer, tokenised(path, tokenizer, assistant_only=True).rows[0]) == f"{ANSWER}{END}"


def test_whatever_a_template_raises_is_one_line_with_the_row(tmp_path):
    tokenizer = with_template("{{ 1 // 0 }}")
    check_template(tokenizer, "--chat_template")
    message = refused(write(tmp_path / "rows.jsonl", [GOOD]), tokenizer)
    assert message.startswith("line 1 of --train_file FILE is not accepted by the chat template: integer division")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"id": "7", "chat": [user(), assistant()]}, None),
        ({"turns": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWER}]}, None),
        ({"prompt": [user()], "completion": [assistant()]}, f"{ANSWER}{END}"),
        ({"prompt": [user()], "completion": ANSWER}, f"{ANSWER}{END}"),
    ],
)
def test_messages_may_be_json_as_text_in_any_column(tmp_path, tokenizer, row, expected, suffix):
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}
    (found,) = tokenised(write(tmp_path / f"rows{suffix}", [texts]), tokenizer).rows
    assert read(tokenizer, found) == written(tokenizer, user(), assistant())
    assert learnt(tokenizer, found) == expected or expected is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chat": str([user(), assistant()])}, "has chat that cannot be read as JSON: Expecting property name"),
        ({"prompt": json.dumps([user()])[:-1], "completion": "a"}, "has prompt that cannot be read as JSON"),
        ({"prompt": "a", "completion": json.dumps([assistant()])}, "has text as prompt, but"),
        ({"question": json.dumps([user()]), "answer": "a"}, 'has \'[{"role": "user"'),
        ({"prompt": "a", "completion": "b", "system": "Be kind."}, "has system, but its prompt is text"),
        ({"prompt": "a", "completion": "b", "tools": [{"name": "c"}]}, "has tools, but its prompt is text"),
    ],
)
def test_messages_are_not_learnt_as_json_nor_is_anything_beside_a_text_left_out(tmp_path, tokenizer, row, message):
    assert refused(write(tmp_path / "rows.jsonl", [row]), tokenizer).startswith(
        f"line 1 of --train_file FILE {message}"
    )


def test_a_text_of_json_that_is_no_chat_is_a_text(tmp_path, tokenizer):
    text = '[{"name": "fox", "value": 3}]'
    assert (
        read(tokenizer, tokenised(write(tmp_path / "rows.jsonl", [{"text": text}]), tokenizer).rows[0]) == text + END
    )


def test_an_object_without_keys_is_an_empty_row_and_an_empty_line_is_none(tmp_path, tokenizer, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([json.dumps(GOOD), "", "{}", json.dumps(GOOD)]))
    assert tokenised(path, tokenizer).rows["row"][:] == [0, 3]
    assert re.search(r"1 of 3 rows of --train_file .* are empty and are left out\. The first is line 3\.", caplog.text)


@pytest.mark.parametrize(
    ("name", "value", "found"), [("weight", 0, "the number 0"), ("loss", False, "False"), ("train", False, "False")]
)
def test_an_answer_that_is_not_to_be_learnt_is_refused_outside_of_a_prompt(tmp_path, tokenizer, name, value, found):
    messages = [user(), assistant("No.", **{name: value}), user(), assistant(**{name: 1})]
    message = refused(write(tmp_path / "a.jsonl", [{"messages": messages}]), tokenizer)
    assert message.startswith(f"line 1 of --train_file FILE has {found} as {name} of message 2, but abr")
    path = write(tmp_path / "b.jsonl", [{"prompt": messages[:3], "completion": messages[3:]}])
    assert learnt(tokenizer, tokenised(path, tokenizer, length=200).rows[0]) == f"{ANSWER}{END}"


def test_prompts_and_texts_need_no_template(tmp_path):
    plain = AutoTokenizer.from_pretrained(DEMO_MODEL)
    (row,) = tokenised(write(tmp_path / "a.csv", [{"prompt": "The fox", "completion": " ran."}]), plain).rows
    assert (read(plain, row), learnt(plain, row)) == (f"The fox ran.{END}", f" ran.{END}")
    (row,) = tokenised(write(tmp_path / "b.jsonl", [{"text": "The fox ran."}]), plain).rows
    assert read(plain, row) == learnt(plain, row) == f"The fox ran.{END}"
    message = refused(write(tmp_path / "c.jsonl", [SHAPES["messages"]]), plain)
    assert message.startswith("--train_file FILE holds chats, but the tokenizer of ")
    assert "has no chat template" in message
    assert "Give --chat_template: a file, the name of a model to take it from, or one of chatml, alpaca." in message


def test_a_plain_text_is_cut_into_blocks_as_for_abr_train(tmp_path, tokenizer):
    path = tmp_path / "tale.txt"
    path.write_text("".join(f"The girl saw the boat {i}.\n\n" for i in range(60)))
    ours = tokenised(path, tokenizer, length=32)
    theirs = load_blocks(DataArguments(train_file=str(path)), tokenizer, 32, ["train"])["train"]
    assert ours.rows["input_ids"][:] == theirs["input_ids"][:]
    assert "--max_length is 4096" in refused(path, tokenizer, length=4096)


def test_only_so_many_blocks_of_a_plain_text_are_used(tmp_path, tokenizer, caplog):
    path = tmp_path / "tale.txt"
    path.write_text("".join(f"The girl saw the boat {i}.\n\n" for i in range(60)))
    whole = tokenised(path, tokenizer, length=32)
    some = tokenised(path, tokenizer, length=32, max_train_samples=3)
    assert some.rows["input_ids"][:] == whole.rows["input_ids"][:3]
    assert (some.tokens, some.targets) == (3 * 32, 3 * 31)
    assert len(tokenised(path, tokenizer, length=32, max_train_samples=999).rows) == len(whole.rows)
    assert f"--max_train_samples is 999, but there are only {len(whole.rows)} blocks" in caplog.text


def test_what_stands_beside_a_chat_is_taken(tokenizer):
    shape = Shape("chat", ("messages",))
    found = read_row({"system": "Be kind.", "messages": [user(), assistant()]}, shape, str)
    assert [message["role"] for message in found.messages] == ["system", "user", "assistant"]
    found = read_row({"system": "Be kind.", "messages": [{**user(), "role": "system"}, assistant()]}, shape, str)
    assert [message["role"] for message in found.messages] == ["system", "assistant"], "it has one already"
    found = read_row(
        {"instruction": "Add.", "input": "1 and 2", "output": "3"}, Shape("asked", ("instruction", "output")), str
    )
    assert found.messages[0]["content"] == "Add.\n\n1 and 2"


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Leeds"}}}
OTHER_CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": 3}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
KNOWS_TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_calls_of_tools_are_passed_through_as_they_are(tmp_path, tokenizer, suffix):
    tools = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tools.chat_template = KNOWS_TOOLS
    rows = [
        {"messages": [user(), assistant(None, tool_calls=[call]), {"role": "tool", "content": "Rain."}, assistant()]}
        for call in (CALL, OTHER_CALL)
    ]
    found = tokenised(write(tmp_path / f"rows{suffix}", rows), tools, length=400, assistant_only=True)
    texts = [read(tools, row) for row in found.rows]
    for text, row in zip(texts, rows, strict=True):
        assert text == written(
            tools, *[{**message, "content": message["content"] or ""} for message in row["messages"]]
        )
    assert "zone" not in texts[0], "a table gives all objects the same keys"
    assert "Rain." not in learnt(tools, found.rows[0])
    assert "Leeds" in learnt(tools, found.rows[0])


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tools_that_a_template_leaves_out_are_refused(tmp_path, tools):
    rows = [{"messages": [user(), assistant()], "tools": tools}]
    path = write(tmp_path / "rows.jsonl", rows)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.chat_template = KNOWS_TOOLS
    assert '"name": "weather"' in read(tokenizer, tokenised(path, tokenizer, length=400).rows[0])
    tokenizer.chat_template = UNMARKED
    message = refused(path, tokenizer)
    assert "line 1 of --train_file FILE has tools, but the chat template leaves them out: weather" in message
    tokenizer.chat_template = ALPACA
    assert "is not accepted by the chat template: alpaca has no place for tools" in refused(path, tokenizer)


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"tool_calls": [CALL]}, "tool_calls"),
        ({"tool_calls": json.dumps([CALL])}, "tool_calls"),
        ({"function_call": CALL["function"]}, "function_call"),
    ],
)
def test_calls_that_a_template_leaves_out_are_refused(tmp_path, more, what):
    path = write(tmp_path / "rows.jsonl", [{"messages": [user(), assistant("", **more)]}])
    message = refused(path, with_template(UNMARKED))
    assert f"line 1 of --train_file FILE has {what}, but the chat template leaves them out: weather" in message
    if what == "tool_calls":
        (row,) = tokenised(path, with_template(KNOWS_TOOLS), length=400).rows
        assert '"city": "Leeds"' in learnt(with_template(KNOWS_TOOLS), row)


GOOD = SHAPES["messages"]


def calling(calls):
    return {"messages": [user(), assistant("", tool_calls=calls)]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "has no messages."),
        ({"messages": None}, "has no messages."),
        ({"messages": "Hello"}, "has 'Hello' as messages. It must be a list of messages."),
        ({"messages": ["Hello"]}, "has 'Hello' as message 1. It must be an object with role and content."),
        ({"messages": [user(), {"speaker": "Ann"}]}, "has an object as message 2. It must be an object with role and"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "has 'robot' as role in message 1. Known roles: system,"),
        ({"messages": [user(), {"content": "a"}]}, "has no role in message 2."),
        ({"messages": [user(), assistant(None)]}, "has no content in message 2."),
        ({"messages": [user(), assistant(7)]}, "has the number 7 as content of message 2. It must be text."),
        ({"messages": [user([{"type": "text"}]), assistant()]}, "has a list as content of message 1. It must be text"),
        ({"messages": [user(), assistant(" ")]}, "has an empty content in message 2, an assistant's message."),
        ({"messages": [user(), user()]}, "has no assistant message, so there are no targets: its roles are user."),
        ({"messages": [user(), assistant()], "tools": "{"}, "has tools that cannot be read as JSON"),
        ({"messages": [user(), assistant()], "tools": [{"function": "a"}]}, "has 'a' in tools. It must be an object"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "has a list as role in message 1. Known roles: system,"),
        (calling(7), "has the number 7 as tool_calls of message 2. It must be a list of objects."),
        (calling({"name": "a"}), "has an object as tool_calls of message 2. It must be a list of objects."),
        (calling(["a"]), "has 'a' in tool_calls of message 2. It must be an object with a name."),
        (calling([{"function": "a"}]), "has 'a' in tool_calls of message 2. It must be an object with a name."),
        (calling("[{"), "has tool_calls of message 2 that cannot be read as JSON"),
        (calling([]), "has an empty content in message 2, an assistant's message."),
        (
            {"messages": [user(), {**assistant(), "role": "function"}, assistant()]},
            "is not accepted by the chat template",
        ),
    ],
)
def test_a_row_that_is_no_chat_is_named(tmp_path, tokenizer, row, message):
    path = write(tmp_path / "rows.jsonl", [GOOD, GOOD, row])
    assert refused(path, tokenizer, length=200).startswith(f"line 3 of --train_file FILE {message}")


@pytest.mark.parametrize(
    ("good", "row", "message"),
    [
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}, "has no completion."),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}, "has no completion."),
        ({"prompt": "a", "completion": "b"}, {"prompt": None, "completion": "b"}, "has no prompt."),
        ({"prompt": "a", "completion": "b"}, {"completion": "b"}, "has no prompt."),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": [assistant()]}, "has text as prompt"),
        (SHAPES["an instruction"], {"instruction": "a", "output": ""}, "has no output."),
        (
            SHAPES["an instruction"],
            {"instruction": 3, "output": "b"},
            "has the number 3 as instruction. It must be text",
        ),
        (SHAPES["ShareGPT"], {"conversations": [{"from": "cat", "value": "a"}]}, "has 'cat' as from in message 1."),
    ],
)
def test_a_row_without_its_parts_is_named(tmp_path, tokenizer, good, row, message):
    path = write(tmp_path / "rows.jsonl", [good, row])
    assert refused(path, tokenizer).startswith(f"line 2 of --train_file FILE {message}")


def test_rows_of_a_directory_and_of_a_table_are_named_by_file_and_number(tmp_path, tokenizer):
    folder = tmp_path / "chats"
    folder.mkdir()
    write(folder / "train-1.jsonl", [GOOD] * 4)
    write(folder / "train-2.jsonl", [GOOD, {"messages": []}])
    assert "line 2 of train-2.jsonl of the train split of --dataset_name FILE" in refused(folder, tokenizer)
    table = write(tmp_path / "rows.csv", [{"question": "a", "answer": "b"}, {"question": "a", "answer": None}])
    assert refused(table, tokenizer).startswith("row 2 of --train_file FILE has no answer.")
    cells = write(tmp_path / "cells.csv", [{"messages": json.dumps(GOOD["messages"])}, {"messages": "[{"}])
    assert "row 2 of --train_file FILE has messages that cannot be read as JSON" in refused(cells, tokenizer)


def test_validation_rows_that_are_held_out_keep_their_numbers(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", [GOOD] * 19 + [{"messages": []}])
    arguments = ChatArguments(train_file=str(path), validation_split_percentage=10)
    found = load_chats(arguments, ["train", "validation"])
    encoder = Encoder(tokenizer)
    assert len(tokenise_chats(found["validation"], arguments, encoder, 64).rows) == 2
    with pytest.raises(BadRow, match="line 20 of --train_file"):
        tokenise_chats(found["train"], arguments, encoder, 64)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": 3, "score": 0.5}, "its columns are label, score. It needs messages (lists of objects with role"),
        ({"chosen": [user()], "rejected": [user()]}, "holds preferences: its columns are chosen, rejected."),
        ({"messages": None, "label": 1}, "its columns are messages, label."),
    ],
)
def test_rows_of_another_shape_are_refused_with_what_is_needed(tmp_path, tokenizer, row, message):
    assert message in refused(write(tmp_path / "rows.jsonl", [row] * 3), tokenizer)


def test_a_column_that_is_named_is_taken(tmp_path, tokenizer):
    rows = [{"messages": [user("No."), assistant("No.")], "better": [user(), assistant()], "body": "The fox ran."}]
    path = write(tmp_path / "rows.jsonl", rows)
    assert read(tokenizer, tokenised(path, tokenizer, text_column="better").rows[0]) == written(
        tokenizer, user(), assistant()
    )
    assert read(tokenizer, tokenised(path, tokenizer, text_column="body").rows[0]) == f"The fox ran.{END}"
    assert "--text_column other is not in --train_file FILE" in refused(path, tokenizer, text_column="other")


def test_rows_keep_their_order_and_what_is_left_out_is_said(tmp_path, tokenizer, caplog):
    rows = [{"prompt": "a " * count, "completion": f" b{count}"} for count in (1, 90, 2, 3)]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(rows[0]) + "\n\n" + "".join(json.dumps(row) + "\n" for row in rows[1:]))
    found = tokenised(path, tokenizer, length=20)
    assert found.rows["row"][:] == [0, 3, 4], "by line, from 0"
    assert [learnt(tokenizer, row) for row in found.rows] == [f" b1{END}", f" b2{END}", f" b3{END}"]
    assert "1 of 4 rows of --train_file" in caplog.text
    assert "have no target within --max_length 20 and are left out. The first is line 3." in caplog.text
    assert "no row with a target within --max_length 2." in refused(path, tokenizer, length=2)


def test_long_rows_are_cut_at_the_end_unless_they_are_split_later(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", [{"text": "The fox ran. " * 30}, {"text": "The fox."}])
    cut, whole = tokenised(path, tokenizer, length=16), tokenised(path, tokenizer, length=16, keeps_whole=True)
    assert [len(row) for row in cut.rows["input_ids"]] == [16, len(whole.rows["input_ids"][1])]
    assert cut.rows["input_ids"][0] == whole.rows["input_ids"][0][:16]
    assert (cut.cut, whole.cut) == (1, 0)
    assert cut.tokens == sum(map(len, cut.rows["input_ids"]))
    assert cut.targets == cut.tokens - 2, "nothing predicts the first token of a row"


def test_data_sets_may_call_their_splits_otherwise(tmp_path, tokenizer):
    splits = DatasetDict(train_sft=Dataset.from_list([GOOD]), test_sft=Dataset.from_list([GOOD] * 2))
    splits.save_to_disk(tmp_path / "saved")
    names = {"dataset_train_split": "train_sft", "dataset_test_split": "test_sft"}
    found = load_chats(ChatArguments(dataset_name=str(tmp_path / "saved"), **names), ["train", "validation"])
    assert [len(each.loaded.rows) for each in found.values()] == [1, 2]
    with pytest.raises(ValueError, match=r"has no train split. Give --train_file, or --dataset_train_split"):
        load_chats(ChatArguments(dataset_name=str(tmp_path / "saved")), ["train"])
    with pytest.raises(ValueError, match=r"has no split sft. It has train_sft, test_sft."):
        load_chats(ChatArguments(dataset_name=str(tmp_path / "saved"), dataset_train_split="sft"), ["train"])


def test_only_so_many_rows_are_used(tmp_path, tokenizer, caplog):
    path = write(tmp_path / "rows.jsonl", [GOOD] * 5)
    assert len(tokenised(path, tokenizer, max_train_samples=2).rows) == 2
    assert len(tokenised(path, tokenizer, max_train_samples=9).rows) == 5
    assert "--max_train_samples is 9, but there are only 5 rows" in caplog.text


def test_a_row_is_no_longer_than_the_context():
    config = LlamaConfig(max_position_embeddings=256)
    assert choose_max_length(ChatArguments(), config) == 256
    with pytest.raises(ValueError, match="--max_length 300 exceeds the model's context of 256 tokens"):
        choose_max_length(ChatArguments(max_length=300), config)


def test_shapes_are_found_in_rows_that_lack_keys():
    assert find_shape([{}, {"id": 1}, GOOD], "x") == Shape("chat", ("messages",))
    assert isinstance(
        read_row({"prompt": "", "completion": "a"}, Shape("pair", ("prompt", "completion")), str), Written
    )


def test_a_template_comes_from_a_file_a_tokenizer_or_by_name(tmp_path, tokenizer, caplog):
    path = tmp_path / "mine.jinja"
    path.write_text(UNMARKED)
    assert find_template(str(path)) == UNMARKED
    tokenizer.save_pretrained(tmp_path / "other")
    assert find_template(str(tmp_path / "other")) == ALPACA
    assert find_template("alpaca") == ALPACA
    other = AutoTokenizer.from_pretrained(DEMO_MODEL)
    other.chat_template = TEMPLATES["chatml"]
    check_template(other, "--chat_template chatml")
    assert "--chat_template chatml writes <|im_start|>, <|im_end|>, but the tokenizer has no such" in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("mine.jinja", None, "--chat_template FILE does not exist."),
        ("mine.jinja", "", "--chat_template FILE is empty."),
        ("mine.jinja", "{% for m in messages %}", "--chat_template FILE is not valid, line 1: Unexpected end of"),
        ("alpacca", None, "Unknown --chat_template 'alpacca'. Did you mean 'alpaca'?"),
        ("no/where", None, "--chat_template no/where is neither a file, nor one of chatml, alpaca, nor a tokenizer"),
        (str(DEMO_MODEL), None, "the tokenizer of this model has no chat template."),
    ],
)
def test_a_template_that_is_none_gets_one_line(tmp_path, name, text, message):
    path = tmp_path / name if name.endswith(".jinja") else name
    if text is not None:
        path.write_text(text)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)

    def take_up():
        tokenizer.chat_template = find_template(str(path))
        check_template(tokenizer, f"--chat_template {path}")

    with pytest.raises(ValueError, match="--chat_template") as caught:
        take_up()
    assert message.replace("FILE", str(path)) in str(caught.value)
    assert "\n" not in str(caught.value)
