"""Which chats, instructions or texts the rows of a table hold, checked row by row."""

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
"""Says which row it is."""

CHAT_COLUMNS = ("messages", "conversations", "conversation", "chat", "dialogue")
"""Usual names of a column of messages; any other is taken where it is the only one that holds them."""

PAIR = ("prompt", "completion")
ASKED = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
)
"""Columns of what is asked and of what is answered, as texts. The chat template writes them down as a chat."""
INPUTS = ("input", "context")
"""Columns that add to an instruction."""
SYSTEMS = ("system", "system_prompt")
"""Columns with a system prompt, beside a chat or a question."""

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
"""What the writers of messages are called, and what chat templates call them."""

WEIGHTS = ("weight", "loss", "train", "training")
"""Keys of messages that say whether they are learnt, as OpenAI, ms-swift and axolotl read them."""

NEEDED = (
    "messages (lists of objects with role and content), conversations (from and value), prompt and completion, "
    "instruction and output, or a column of text"
)

Kind = Literal["chat", "pair", "asked", "text"]


@dataclass(frozen=True)
class Shape:
    """What rows hold, and in which columns."""

    kind: Kind
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Chat:
    """What is said, in order.

    Attributes:
        given: How many of the first messages are a prompt: an answer to it is learnt, and nothing of it.
        tools: What the assistant may call, as chat templates take it.
        options: What else the row tells the chat template.
    """

    messages: list[Message]
    given: int = 0
    tools: list[Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """A text that no chat template is needed for; after a prompt, if there is one."""

    text: str
    prompt: str | None = None


def find_shape(rows: Sequence[Row], origin: str, wanted: str | None = None) -> Shape:
    """Return what rows hold.

    Args:
        rows: The first of them. Keys may be missing.
        origin: What named the rows, for messages.
        wanted: `--text_column`: the column of the messages, or of the text.

    Raises:
        ValueError: They hold nothing that can be learnt from; the message names the columns.
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
            f"{origin} holds preferences: its columns are {', '.join(columns)}. abr sft learns from answers, not from "
            "chosen and rejected ones. For DPO and reward training from Python see docs/start/chat.md."
        )
    named = next((name for name in CHAT_COLUMNS if name in chats), None)
    # A column of this name that holds something else is refused where its first row is read.
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
            f"{origin} holds nothing that abr sft can learn from: its columns are {', '.join(columns)}. It needs "
            f"{NEEDED}. --text_column names a column of messages or of text that is called otherwise."
        ) from error


def read_row(row: Row, shape: Shape, where: Where, may_be_padded: bool = False) -> Chat | Written | None:
    """Return what a row holds; None for a text that is missing or empty.

    Args:
        where: Says which row it is.
        may_be_padded: A key whose value is null may be of other rows: a table gives all objects the same keys.

    Raises:
        BadRow: It does not hold what its shape asks for.
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
    """Tell whether something is a list of messages, or a text that is meant as one, as a cell of a .csv holds it."""
    if isinstance(value, str) and re.match(r"\s*\[\s*\{", value):
        return any(all(re.search(rf"[\"']{key}[\"']\s*:", value) for key in pair) for pair in MESSAGES)
    return isinstance(value, list) and tuple(keys_of_objects([value])) in MESSAGES


def _read_pair(prompt: Any, completion: Any, row: Row, where: Where) -> Chat | Written:
    are_texts = [isinstance(value, str) and not are_messages(value) for value in (prompt, completion)]
    if all(are_texts):
        beside = next((name for name in (*SYSTEMS, "tools") if row.get(name)), None)
        if beside is not None:
            raise BadRow(
                f"{where()} has {beside} beside a prompt that is a text, which no chat template writes. Put it into "
                "the prompt, or make prompt and completion lists of messages."
            )
        return Written(_text(completion, "completion", where), prompt)
    for name, value in (("prompt", prompt), ("completion", completion)):
        if value is None or value == [] or value == "":
            raise BadRow(f"{where()} has no {name}.")
    if are_texts[0]:
        raise BadRow(f"{where()} has a text as prompt, but its completion is {shortly(completion)}: make both texts.")
    asked = _with_system(read_messages(prompt, where, "prompt"), row, where)
    answer = read_messages(
        [{"role": "assistant", "content": completion}] if are_texts[1] else completion, where, "completion"
    )
    _check_answers(answer, where)
    return Chat([*asked, *answer], len(asked), *_for_template(row, where))


def read_messages(value: Any, where: Where, column: str) -> list[Message]:
    """Return messages as chat templates take them: with `role` and `content`, and whatever else they have.

    Raises:
        BadRow: They are something else; the message says which one of them.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):  # as a cell of a .csv holds them
        value = _parse(value, column, where)
    if value is None or value == [] or value == "":
        raise BadRow(f"{where()} has no {column}.")
    if not isinstance(value, list):
        raise BadRow(f"{where()} holds {shortly(value)} as {column}, where a list of messages must be.")
    return [_read_message(each, number, where) for number, each in enumerate(value, 1)]


def _read_message(value: Any, number: int, where: Where) -> Message:
    pair = next((pair for pair in MESSAGES if isinstance(value, dict) and set(value) & set(pair)), None)
    if pair is None:
        raise BadRow(
            f"{where()} holds {shortly(value)} as message {number}, where an object with role and content must be."
        )
    role, content = (value.get(name) for name in pair)
    if not isinstance(role, str) or role not in ROLES:
        said = f"{shortly(role)} as {pair[0]}" if role is not None else f"no {pair[0]}"
        raise BadRow(f"{where()} has {said} in message {number}. Known are {', '.join(ROLES)}.")
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
        raise BadRow(f"{where()} holds {shortly(content)} as {pair[1]} of message {number}, where text must be.")
    if not content.strip() and ROLES[role] == "assistant" and not others:
        raise BadRow(f"{where()} has an empty {pair[1]} in message {number}, which is the assistant's.")
    return {"role": ROLES[role], "content": content, **others}


def _check_answers(messages: Sequence[Message], where: Where) -> None:
    """Refuse messages without one of the assistant, and an answer that is not to be learnt like the others."""
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        raise BadRow(f"{where()} has no message of the assistant, so nothing to learn: its roles are {roles}.")
    for number, message in enumerate(messages, 1):
        name = next((name for name in WEIGHTS if message["role"] == "assistant" and message.get(name, 1) != 1), None)
        if name is not None:
            raise BadRow(
                f"{where()} holds {shortly(message[name])} as {name} of message {number}, and abr sft learns all "
                "answers of a chat alike. Give columns prompt and completion, with the answers that are not to be "
                f"learnt in the prompt, or take {name} out."
            )


def _with_system(messages: list[Message], row: Row, where: Where) -> list[Message]:
    """Put the system prompt first that stands in a column beside the messages, if they have none."""
    system = next((row[name] for name in SYSTEMS if row.get(name)), None)
    if system is None or messages[0]["role"] in ("system", "developer"):
        return messages
    return [{"role": "system", "content": _text(system, "system prompt", where)}, *messages]


def _text(value: Any, name: str, where: Where) -> str:
    if value is None or value == "":
        raise BadRow(f"{where()} has no {name}.")
    if not isinstance(value, str) or are_messages(value):
        raise BadRow(f"{where()} holds {shortly(value)} as {name}, where text must be.")
    return value


def _for_template(row: Row, where: Where) -> tuple[list[Any] | None, Mapping[str, Any]]:
    """Return the tools of a row, which may be JSON as text, and what else it tells the chat template."""
    tools, options = row.get("tools") or None, row.get("chat_template_kwargs") or {}
    if tools is not None:
        tools = _objects(tools, "tools", where) or None
    if not isinstance(options, Mapping):
        raise BadRow(f"{where()} holds {shortly(options)} as chat_template_kwargs, where an object must be.")
    return tools, options


def _objects(value: Any, name: str, where: Where) -> list[dict[str, Any]]:
    """Return tools, or calls of them, which may be JSON as text."""
    if isinstance(value, str):
        value = (_parse(value, name, where) if value else None) or []
    if not isinstance(value, list):
        raise BadRow(f"{where()} holds {shortly(value)} as {name}, where a list of objects must be.")
    for each in value:
        function = each.get("function") or each if isinstance(each, dict) else each
        if not isinstance(function, dict):
            raise BadRow(f"{where()} holds {shortly(function)} in {name}, where an object with a name must be.")
    return value


def _parse(text: str, name: str, where: Where) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadRow(f"{where()} has {name} that cannot be read as JSON: {error}.") from error


def _without_nulls(value: Any) -> Any:
    """Return something without the keys of objects that hold null."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
