"""Find the chats, instructions or texts in the rows of a table, and check each row."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..records.errors import BadRow
from .columns import MESSAGES, Row, as_text, choose_text_column, keys_of_objects, shortly

Message = dict[str, Any]
Where = Callable[[], str]
"""Returns the name of a row for messages."""

CHAT_COLUMNS = ("messages", "conversations", "conversation", "chat", "dialogue")
"""Usual names of a column of messages. A column with another name is used if it is the only one with messages."""

PAIR = ("prompt", "completion")
ASKED = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
)
"""Columns with a question and its answer, as text. The chat template formats them as a chat."""
INPUTS = ("input", "context")
"""Columns whose text is appended to the instruction."""
SYSTEMS = ("system", "system_prompt")
"""Columns with the system prompt of a chat or a question."""

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "function",
    "ipython": "ipython",
}
"""Names of roles in data sets, and the names that chat templates use for them."""

WEIGHTS = ("weight", "loss", "train", "training")
"""Message keys that say whether the message counts in the loss, in the formats of OpenAI, ms-swift and axolotl."""

NEEDED = (
    "messages (lists of objects with role and content), conversations (from and value), prompt and completion, "
    "instruction and output, or a column of text"
)

Kind = Literal["chat", "pair", "asked", "text"]


@dataclass(frozen=True)
class Shape:
    """The kind of data in the rows, and the columns with it."""

    kind: Kind
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Chat:
    """The messages of a chat, in order.

    Attributes:
        given: Number of leading messages that are the prompt. They are not targets; the answer is.
        tools: Tools that the assistant may call, in the format of chat templates.
        options: Other arguments that the row passes to the chat template.
    """

    messages: list[Message]
    given: int = 0
    tools: list[Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """A text that needs no chat template, and the prompt before it, if any."""

    text: str
    prompt: str | None = None


def find_shape(rows: Sequence[Row], origin: str, wanted: str | None = None) -> Shape:
    """Find out what kind of data the rows hold, and in which columns.

    Args:
        rows: The first rows. Keys may be missing.
        origin: The flag or file that the rows come from, for messages.
        wanted: `--text_column`: the column with the messages or the text.

    Raises:
        ValueError: They hold no data that we can train on; the message names the columns.
    """
    columns: dict[str, list[Any]] = {}
    for row in rows:
        for name, value in row.items():
            columns.setdefault(name, []).extend([] if value is None else [value])
    if not columns:
        raise ValueError(f"{origin} is empty.")
    chats = [
        name
        for name, values in columns.items()
        if tuple(keys_of_objects(values)) in MESSAGES or 2 * sum(map(are_messages, values)) > len(values)
    ]
    if wanted is not None:
        is_chat = wanted in chats
        return Shape("chat" if is_chat else "text", (wanted if is_chat else choose_text_column(rows, origin, wanted),))
    if {"chosen", "rejected"} <= set(columns):
        raise ValueError(
            f"{origin} holds preferences: its columns are {', '.join(columns)}. abr sft does not train on chosen and "
            "rejected answers. For DPO and reward training in Python see docs/start/chat.md."
        )
    named = next((name for name in CHAT_COLUMNS if name in chats), None)
    # If a column with this name holds something else, reading its first row raises an error.
    named = named or next((name for name in CHAT_COLUMNS[:2] if columns.get(name)), None)
    if named is not None:
        return Shape("chat", (named,))
    if set(PAIR) <= set(columns):
        return Shape("pair", PAIR)
    asked = next((pair for pair in ASKED if set(pair) <= set(columns)), None)
    if asked is not None:
        return Shape("asked", asked)
    if len(chats) == 1:
        return Shape("chat", (chats[0],))
    try:
        return Shape("text", (choose_text_column(rows, origin),))
    except ValueError as error:
        raise ValueError(
            f"{origin} holds no data that abr sft can train on: its columns are {', '.join(columns)}. It needs "
            f"{NEEDED}. If the messages or the text are in another column, name it with --text_column."
        ) from error


def read_row(row: Row, shape: Shape, where: Where, may_be_padded: bool = False) -> Chat | Written | None:
    """Return the chat or text in a row; None if the text is missing or empty.

    Args:
        where: Returns the name of the row for messages.
        may_be_padded: Drop keys whose value is null: a table gives all objects the same keys.

    Raises:
        BadRow: The row does not have the given shape.
    """
    if shape.kind == "text":
        text = row.get(shape.columns[0])
        return Written(as_text(text, where)) if text else None
    if may_be_padded:
        row = {name: _without_nulls(value) for name, value in row.items()}
    first, *others = (row.get(name) for name in shape.columns)
    if shape.kind == "chat":
        messages = read_messages(first, where, shape.columns[0])
        _check_answers(messages, where)
        return Chat(_with_system(messages, row, where), 0, *_for_template(row, where))
    if shape.kind == "asked":
        asked, answer = (
            _text(value, name, where) for value, name in zip((first, *others), shape.columns, strict=True)
        )
        more = next((row[name] for name in INPUTS if row.get(name)), None)
        if more is not None:
            asked = f"{asked}\n\n{_text(more, 'input', where)}"
        question = _with_system([{"role": "user", "content": asked}], row, where)
        return Chat([*question, {"role": "assistant", "content": answer}], len(question), *_for_template(row, where))
    return _read_pair(first, others[0], row, where)


def are_messages(value: Any) -> bool:
    """Tell whether a value is a list of messages, or a string that looks like one, as in a cell of a .csv file."""
    if isinstance(value, str) and re.match(r"\s*\[\s*\{", value):
        return any(all(re.search(rf"[\"']{key}[\"']\s*:", value) for key in pair) for pair in MESSAGES)
    return isinstance(value, list) and tuple(keys_of_objects([value])) in MESSAGES


def _read_pair(prompt: Any, completion: Any, row: Row, where: Where) -> Chat | Written:
    are_texts = [isinstance(value, str) and not are_messages(value) for value in (prompt, completion)]
    if all(are_texts):
        beside = next((name for name in (*SYSTEMS, "tools") if row.get(name)), None)
        if beside is not None:
            raise BadRow(
                f"{where()} has {beside}, but its prompt is text, to which no chat template is applied. Put it into "
                "the prompt, or make prompt and completion lists of messages."
            )
        return Written(_text(completion, "completion", where), prompt)
    for name, value in (("prompt", prompt), ("completion", completion)):
        if value is None or value == [] or value == "":
            raise BadRow(f"{where()} has no {name}.")
    if are_texts[0]:
        raise BadRow(f"{where()} has text as prompt, but {shortly(completion)} as completion. Make both text.")
    asked = _with_system(read_messages(prompt, where, "prompt"), row, where)
    answer = read_messages(
        [{"role": "assistant", "content": completion}] if are_texts[1] else completion, where, "completion"
    )
    _check_answers(answer, where)
    return Chat([*asked, *answer], len(asked), *_for_template(row, where))


def read_messages(value: Any, where: Where, column: str) -> list[Message]:
    """Return messages in the format of chat templates: `role`, `content`, and any other keys they have.

    Raises:
        BadRow: One of them is not a message; the error gives its number.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):  # as a cell of a .csv holds them
        value = _parse(value, column, where)
    if value is None or value == [] or value == "":
        raise BadRow(f"{where()} has no {column}.")
    if not isinstance(value, list):
        raise BadRow(f"{where()} has {shortly(value)} as {column}. It must be a list of messages.")
    return [_read_message(each, number, where) for number, each in enumerate(value, 1)]


def _read_message(value: Any, number: int, where: Where) -> Message:
    pair = next((pair for pair in MESSAGES if isinstance(value, dict) and set(value) & set(pair)), None)
    if pair is None:
        raise BadRow(
            f"{where()} has {shortly(value)} as message {number}. It must be an object with role and content."
        )
    role, content = (value.get(name) for name in pair)
    if not isinstance(role, str) or role not in ROLES:
        said = f"{shortly(role)} as {pair[0]}" if role is not None else f"no {pair[0]}"
        raise BadRow(f"{where()} has {said} in message {number}. Known roles: {', '.join(ROLES)}.")
    others = {name: each for name, each in value.items() if name not in pair and each is not None}
    if "tool_calls" in others:
        others["tool_calls"] = _objects(others["tool_calls"], f"tool_calls of message {number}", where)
        if not others["tool_calls"]:
            del others["tool_calls"]
    if content is None and ROLES[role] == "assistant" and others:  # it calls a tool, or only thinks
        content = ""
    if content is None:
        raise BadRow(f"{where()} has no {pair[1]} in message {number}.")
    if not isinstance(content, str):
        raise BadRow(f"{where()} has {shortly(content)} as {pair[1]} of message {number}. It must be text.")
    if not content.strip() and ROLES[role] == "assistant" and not others:
        raise BadRow(f"{where()} has an empty {pair[1]} in message {number}, an assistant's message.")
    return {"role": ROLES[role], "content": content, **others}


def _check_answers(messages: Sequence[Message], where: Where) -> None:
    """Refuse chats without an assistant message, and assistant messages with a loss weight."""
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        raise BadRow(f"{where()} has no assistant message, so there are no targets: its roles are {roles}.")
    for number, message in enumerate(messages, 1):
        name = next((name for name in WEIGHTS if message["role"] == "assistant" and message.get(name, 1) != 1), None)
        if name is not None:
            raise BadRow(
                f"{where()} has {shortly(message[name])} as {name} of message {number}, but abr sft gives all "
                "answers of a chat the same weight. Use the columns prompt and completion, with the answers to "
                f"ignore in the prompt, or remove {name}."
            )


def _with_system(messages: list[Message], row: Row, where: Where) -> list[Message]:
    """Prepend the system prompt from its column, unless the messages have one."""
    system = next((row[name] for name in SYSTEMS if row.get(name)), None)
    if system is None or messages[0]["role"] in ("system", "developer"):
        return messages
    return [{"role": "system", "content": _text(system, "system prompt", where)}, *messages]


def _text(value: Any, name: str, where: Where) -> str:
    if value is None or value == "":
        raise BadRow(f"{where()} has no {name}.")
    if not isinstance(value, str) or are_messages(value):
        raise BadRow(f"{where()} has {shortly(value)} as {name}. It must be text.")
    return value


def _for_template(row: Row, where: Where) -> tuple[list[Any] | None, Mapping[str, Any]]:
    """Return the tools of a row, which may be a JSON string, and its other arguments for the chat template."""
    tools, options = row.get("tools") or None, row.get("chat_template_kwargs") or {}
    if tools is not None:
        tools = _objects(tools, "tools", where) or None
    if not isinstance(options, Mapping):
        raise BadRow(f"{where()} has {shortly(options)} as chat_template_kwargs. It must be an object.")
    return tools, options


def _objects(value: Any, name: str, where: Where) -> list[dict[str, Any]]:
    """Return tools or tool calls, which may be a JSON string."""
    if isinstance(value, str):
        value = (_parse(value, name, where) if value else None) or []
    if not isinstance(value, list):
        raise BadRow(f"{where()} has {shortly(value)} as {name}. It must be a list of objects.")
    for each in value:
        function = each.get("function") or each if isinstance(each, dict) else each
        if not isinstance(function, dict):
            raise BadRow(f"{where()} has {shortly(function)} in {name}. It must be an object with a name.")
    return value


def _parse(text: str, name: str, where: Where) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadRow(f"{where()} has {name} that cannot be read as JSON: {error}.") from error


def _without_nulls(value: Any) -> Any:
    """Return a value without the keys whose value is null, at any depth."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
