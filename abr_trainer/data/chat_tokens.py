"""Turn chats, instructions and texts into tokens, and into labels that say which tokens are targets."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from .. import __version__
from ..records.errors import BadRow, one_line
from .arguments import ChatArguments
from .blocks import at_most, cut_blocks, tokenize
from .chat import Chat, Message, Shape, Where, Written, are_messages, find_shape, read_row
from .columns import TOKENS, Row, choose_every, parse_line
from .context import fit_context
from .identity import SOURCE_COLUMN, name_sources, rows_of
from .prompts import ANSWER_TOKENS, LEAST_ROOM, Prompt, prompts_in, spread
from .sources import TextRows, first_rows, load_rows
from .templates import Template, marks_assistant, refuse_missing_template

logger = logging.get_logger(__name__)

DEFAULT_LENGTH = 1024
NO_TARGET = -100
ROW = "row"
"""Column with the index of a row among the loaded rows."""

Encoded = tuple[list[int], list[int]]
"""Token ids and labels: the token id if it is a target, else -100."""


def choose_max_length(arguments: ChatArguments, config: PreTrainedConfig) -> int:
    """Return `--max_length` or its default, checked against the model's context length."""
    return fit_context("max_length", arguments.max_length, DEFAULT_LENGTH, config)


# ---- Rows ----


@dataclass(frozen=True)
class ChatRows:
    """The rows of one split, and their kind.

    Attributes:
        limited_by: The flag that limits how many of them are used.
        shape: None for one plain text, which is cut into blocks.
        is_chat: They need a chat template.
    """

    loaded: TextRows
    limited_by: str
    shape: Shape | None
    is_chat: bool

    @property
    def has_prompts(self) -> bool:
        return self.shape is not None and self.shape.kind in ("pair", "asked")

    @property
    def kind(self) -> str:
        """The kind of the rows, in words."""
        if self.has_prompts:
            return "prompts and answers of chats" if self.is_chat else "prompts and completions as text"
        return "chats" if self.is_chat else "texts"


def load_chats(arguments: ChatArguments, splits: Collection[str], with_sources: bool = False) -> dict[str, ChatRows]:
    """Load the rows of these splits, and find out their kind.

    Args:
        with_sources: Record in `SOURCE_COLUMN` which row of which source each training row is.

    Raises:
        ValueError: A split is missing, cannot be read, or holds no data that we can train on.
    """
    if arguments.is_streamed:
        raise ValueError(f"--dataset_name {arguments.dataset_name} is streamed, but abr sft cannot read streams.")
    found = {}
    for split, loaded in load_rows(arguments, splits, choose_every, is_numbered=with_sources).items():
        flag = "max_train_samples" if split == "train" else "max_eval_samples"
        limit = getattr(arguments, flag)
        if loaded.rows_are_lines:
            found[split] = ChatRows(loaded, flag, None, is_chat=False)
            continue
        read = _read(loaded, _columns(first_rows(loaded.rows, loaded.origin)), range(len(loaded.rows)))
        first = [row for row in read if row is not None]
        shape = find_shape(first, loaded.origin, arguments.text_column)
        is_chat = shape.kind in ("chat", "asked") or any(are_messages(row.get(shape.columns[0])) for row in first)
        if limit is not None and limit < len(loaded.rows):
            loaded = replace(loaded, rows=loaded.rows.select(range(limit)))
        elif limit is not None and limit > len(loaded.rows):
            logger.warning(f"--{flag} is {limit}, but there are only {len(loaded.rows)} rows: using all of them.")
        found[split] = ChatRows(loaded, flag, shape, is_chat and shape.kind != "text")
    return found


def _columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    return {name: [row.get(name) for row in rows] for name in (rows[0] if rows else ())}


def _read(loaded: TextRows, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> Iterator[Row | None]:
    """Yield rows with all columns; None for an empty line in a file of JSON lines."""
    column = loaded.column
    if column.is_json:
        for line, index in zip(batch["text"], indices, strict=False):
            yield parse_line(line, column.where(index)) if column.is_row(line) else None
    else:
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


# ---- Tokens ----


@dataclass(frozen=True)
class Tokenised:
    """The rows of one split, ready for a trainer.

    Attributes:
        rows: Columns `input_ids`, `labels`, and, unless they are blocks of a plain text, `row`.
        tokens: Number of tokens in all rows.
        targets: Number of tokens that are targets.
        cut: Number of rows that were cut because they were too long.
    """

    rows: Dataset
    tokens: int
    targets: int
    cut: int = 0


@dataclass(frozen=True)
class Encoder:
    """Turns a chat or text into tokens and labels.

    Attributes:
        template: Chat template. None for the tokenizer's own.
        assistant_only: In chats, only the assistant's tokens are targets.
        completion_only: If there is a prompt, only the tokens after it are targets.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str | None = None
    assistant_only: bool = False
    completion_only: bool = True

    @property
    def is_marked(self) -> bool:
        """Whether the template marks the assistant's tokens."""
        own: Template | None = self.tokenizer.chat_template
        return marks_assistant(self.template or own)

    def __call__(self, example: Chat | Written, where: Where) -> Encoded:
        """Return tokens and labels.

        Raises:
            BadRow: The chat template does not accept the messages.
        """
        return self._written(example) if isinstance(example, Written) else self._chat(example, where)

    def _written(self, example: Written) -> Encoded:
        before = "" if example.prompt is None else example.prompt
        ids = self.tokenizer(before + example.text)[TOKENS]
        end = self.tokenizer.eos_token_id
        if end is not None and ids[-1:] != [end]:
            ids = [*ids, end]
        learnt = np.ones(len(ids), bool)
        if example.prompt is not None and self.completion_only:
            learnt[: _common(self.tokenizer(before)[TOKENS], ids)] = False
        return ids, _labels(ids, learnt)

    def prompt(self, example: Chat | Written, where: Where, length: int) -> Prompt | None:
        """Return what the model is to answer, and the answer: of a chat the last one that there is room for.

        Args:
            length: Tokens that prompt and answer may have.

        Returns:
            None for a text without a prompt, and for a prompt that leaves no room.
        """
        candidates: Iterator[tuple[list[int], str, str]]
        if isinstance(example, Written):
            candidates = self._asked_in_text(example)
        else:
            candidates = self._asked_in_chat(example, where)
        for ids, text, reference in candidates:
            if 0 < len(ids) <= length - LEAST_ROOM:
                return Prompt(ids, text, reference, min(ANSWER_TOKENS, length - len(ids)))
        return None

    def _asked_in_text(self, example: Written) -> Iterator[tuple[list[int], str, str]]:
        if example.prompt:
            whole, _ = self._written(example)
            yield whole[: _common(self.tokenizer(example.prompt)[TOKENS], whole)], example.prompt, example.text

    def _asked_in_chat(self, chat: Chat, where: Where) -> Iterator[tuple[list[int], str, str]]:
        """Yield tokens, text and answer for each answer, from the last one back: as a user of the model asks.

        Answers that the chat template refuses to ask for are left out.

        Raises:
            BadRow: It refuses all of them.
        """
        refused, is_accepted = None, False
        for number in range(len(chat.messages) - 1, max(chat.given, 1) - 1, -1):
            message, before = chat.messages[number], chat.messages[:number]
            if message["role"] == "assistant" and message["content"].strip():
                options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
                text = "\n".join(f"{each['role']}: {each['content']}" for each in before)
                try:
                    ids = self._apply(chat, before, where, **options)[TOKENS]
                except BadRow as error:
                    refused = error
                    continue
                is_accepted = True
                yield ids, text, message["content"]
        if refused is not None and not is_accepted:
            raise refused

    def _chat(self, chat: Chat, where: Where) -> Encoded:
        if self.assistant_only:
            ids, learnt = self._marked(chat, where) if self.is_marked else self._told_apart(chat, where)
        else:
            ids = self._apply(chat, chat.messages, where, tokenize=True, return_dict=True)[TOKENS]
            learnt = np.ones(len(ids), bool)
        if chat.given and self.completion_only:
            learnt[: self._prompt_length(chat, ids, where)] = False
        if chat.tools or any({"tool_calls", "function_call"} & set(message) for message in chat.messages):
            self._refuse_dropped_tools(chat, where)
        return ids, _labels(ids, learnt)

    def _prompt_length(self, chat: Chat, ids: Sequence[int], where: Where) -> int:
        """Return the number of leading tokens of a chat that belong to its prompt."""
        given = chat.messages[: chat.given]
        is_answered = chat.messages[chat.given]["role"] == "assistant"
        # The generation prompt may be longer than the text before a given answer: some templates add <think> to it.
        prompts = [
            partial(self._apply, chat, given, where, add_generation_prompt=asks)
            for asks in dict.fromkeys((is_answered, False))
        ]
        whole = self._apply(chat, chat.messages, where, tokenize=False)
        if not any(whole.startswith(prompt(tokenize=False)) for prompt in prompts):
            raise BadRow(
                f"{where()}: the chat template writes the prompt differently if an answer follows, so the prompt's "
                "tokens are not known. Give a --chat_template without this, or --completion_only_loss false."
            )
        # A token that covers the end of the prompt and the start of the answer is a target.
        return max(_common(prompt(tokenize=True, return_dict=True)[TOKENS], ids) for prompt in prompts)

    def _marked(self, chat: Chat, where: Where) -> tuple[list[int], np.ndarray]:
        """Return the tokens, and a mask of those that the template marks."""
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        found = self._apply(chat, chat.messages, where, **options)
        return found[TOKENS], np.asarray(found["assistant_masks"], bool)

    def _told_apart(self, chat: Chat, where: Where) -> tuple[list[int], np.ndarray]:
        """Return the tokens, and a mask of those of the assistant's messages, for a template without marks.

        The chat up to an assistant's message, with the generation prompt, must be a prefix of the chat with that
        message. The text after this prefix is the assistant's.
        """
        whole = self._apply(chat, chat.messages, where, tokenize=False)
        spans = []
        for number, message in enumerate(chat.messages):
            if message["role"] == "assistant":
                if number == 0:
                    raise BadRow(
                        f"{where()}: message 1 is the assistant's, and the chat template does not mark the "
                        "assistant's tokens with {% generation %}, so they cannot be found. Put a system or user "
                        "message before it, give a --chat_template with these marks, or --assistant_only_loss false."
                    )
                before = self._apply(chat, chat.messages[:number], where, tokenize=False, add_generation_prompt=True)
                after = self._apply(chat, chat.messages[: number + 1], where, tokenize=False)
                if not (whole.startswith(after) and after.startswith(before) and len(before) < len(after)):
                    raise BadRow(
                        f"{where()}: the chat template does not mark the assistant's tokens with {{% generation %}}, "
                        f"and writes the earlier messages differently if message {number + 1} follows, so the "
                        "assistant's tokens cannot be found. Give a --chat_template with these marks, or "
                        "--assistant_only_loss false."
                    )
                spans.append((len(before), len(after)))
        found = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        begins = np.array([begin for begin, _ in found["offset_mapping"]], np.int64)
        learnt = np.zeros(len(begins), bool)
        for begin, end in spans:
            learnt |= (begins >= begin) & (begins < end)
        return found[TOKENS], learnt

    def _refuse_dropped_tools(self, chat: Chat, where: Where) -> None:
        """Refuse a template that leaves out the tools: many do so without an error."""
        whole = self._apply(chat, chat.messages, where, tokenize=False)
        said = [("tools", tool) for tool in chat.tools or ()]
        for message in chat.messages:
            said += [("tool_calls", call) for call in message.get("tool_calls", ())]
            said += [("function_call", message["function_call"])] if "function_call" in message else []
        for what, each in said:
            name = (each.get("function") or each).get("name") if isinstance(each, dict) else None
            if name is not None and str(name) not in whole:
                raise BadRow(
                    f"{where()} has {what}, but the chat template leaves them out: {name} is not in the text that the "
                    "model reads. Give the --chat_template of a model that calls tools, or remove them from the data."
                )

    def _apply(self, chat: Chat, messages: Sequence[Message], where: Where, **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tools=chat.tools, chat_template=self.template, **chat.options, **options
            )
        except Exception as error:  # a template is third-party code and may raise anything
            raise BadRow(f"{where()} is not accepted by the chat template: {one_line(error)}") from error


def _common(some: Sequence[int], others: Sequence[int]) -> int:
    """Return the length of the common prefix of two sequences."""
    return next(
        (index for index, (one, other) in enumerate(zip(some, others, strict=False)) if one != other),
        min(len(some), len(others)),
    )


def _labels(ids: Sequence[int], learnt: np.ndarray) -> list[int]:
    return [token if is_learnt else NO_TARGET for token, is_learnt in zip(ids, learnt.tolist(), strict=True)]


def tokenise_chats(
    found: ChatRows,
    arguments: ChatArguments,
    encoder: Encoder,
    length: int,
    keeps_whole: bool = False,
    with_sources: bool = False,
) -> Tokenised:
    """Turn the rows of a split into tokens and labels, and cut rows that are too long.

    Empty rows and rows without a target are left out, with a warning.

    Args:
        length: Most tokens per row.
        keeps_whole: Do not cut long rows; packing splits them later.
        with_sources: Record in `SOURCE_COLUMN` which row of which source each row is.

    Raises:
        ValueError: No row has a target. It is a `BadRow` if a row cannot be used.
    """
    loaded, shape = found.loaded, found.shape
    if shape is None:
        return _blocks_of(found, arguments, encoder.tokenizer, length, with_sources)
    if found.is_chat:
        refuse_missing_template(encoder.tokenizer, loaded.origin)
    column = loaded.column

    def encode(batch: dict[str, list[Any]], indices: list[int], version: str) -> dict[str, list[Any]]:
        rows: list[tuple[int, list[int], list[int], int, int]] = []
        for index, row in zip(indices, _read(loaded, batch, indices), strict=True):
            if row is None:
                continue
            example = read_row(row, shape, column.where(index), not column.is_json) if row else None
            if example is not None:
                ids, labels = encoder(example, column.where(index))
                most = len(ids) if keeps_whole else length
                targets = sum(label != NO_TARGET for label in labels[1:most])
                rows.append((index, ids[:most], labels[:most], len(ids), targets))
            else:
                rows.append((index, [], [], 0, 0))
        names = (ROW, TOKENS, "labels", "_length", "_targets")
        return {name: [row[number] for row in rows] for number, name in enumerate(names)}

    rows = loaded.rows.map(
        encode,
        batched=True,
        with_indices=True,
        remove_columns=loaded.rows.column_names,
        num_proc=arguments.preprocessing_num_workers,
        load_from_cache_file=not arguments.overwrite_cache,
        fn_kwargs={"version": __version__},  # so that another version of ours does not reuse the cache
        desc="Tokenizing",
    )
    lengths, targets = (np.array(rows[name], np.int64) for name in ("_length", "_targets"))
    kept = np.flatnonzero(targets)
    if not len(kept):
        raise ValueError(f"{loaded.origin} has no row with a target within --max_length {length}.")
    _say_what_is_left_out(found, rows, targets, lengths, length)
    cut = 0 if keeps_whole else int((lengths[kept] > length).sum())
    rows = rows.remove_columns(["_length", "_targets"])
    if with_sources:
        kept_rows = rows[ROW][:]
        numbers = rows_of(0, column.place.rows(kept_rows))
        if loaded.numbered:
            numbers = np.asarray(loaded.rows[SOURCE_COLUMN][:])[kept_rows]
        rows = name_sources(rows.add_column(SOURCE_COLUMN, numbers), loaded.sources)
    rows = rows if len(kept) == len(rows) else rows.select(kept)
    tokens = int(lengths[kept].sum() if keeps_whole else np.minimum(lengths[kept], length).sum())
    return Tokenised(rows, tokens, int(targets.sum()), cut)


def prompts_of_chats(
    found: ChatRows, rows: Tokenised, encoder: Encoder, length: int, count: int | None = None
) -> list[Prompt]:
    """Return the prompts in the rows of a split: of so many at equal distances, or of all. Texts are to be continued.

    Args:
        length: Tokens that prompt and answer may have.

    Raises:
        BadRow: The chat template refuses all prompts. If it refuses some, a warning says so.
    """
    loaded, shape = found.loaded, found.shape
    if shape is None or shape.kind == "text":
        return prompts_in(rows.rows, encoder.tokenizer, count, length)
    column, prompts, refused = loaded.column, [], []
    kept = rows.rows[ROW][:]
    for index in (kept[place] for place in spread(len(kept), count)):
        [row] = _read(loaded, {name: [value] for name, value in loaded.rows[index].items()}, [index])
        example = read_row(row or {}, shape, column.where(index), not column.is_json)
        try:
            prompt = encoder.prompt(example, column.where(index), length) if example is not None else None
        except BadRow as error:
            refused.append(error)
            continue
        if prompt is not None:
            prompts.append(prompt)
    if refused and not prompts:
        raise refused[0]
    if refused:
        logger.warning(f"{len(refused)} rows of {loaded.origin} are not continued: {refused[0]}")
    return prompts


def _say_what_is_left_out(
    found: ChatRows, rows: Dataset, targets: np.ndarray, lengths: np.ndarray, length: int
) -> None:
    place = found.loaded.column.place
    reasons = {
        "are empty": lengths == 0,
        f"have no target within --max_length {length}": (targets == 0) & (lengths > 0),
    }
    for reason, are in reasons.items():
        if are.any():
            first = place.number(rows[ROW][int(np.flatnonzero(are)[0])])
            logger.warning(
                f"{are.sum()} of {len(rows)} rows of {found.loaded.origin} {reason} and are left out. The first is "
                f"{first}."
            )


def _blocks_of(
    found: ChatRows, arguments: ChatArguments, tokenizer: PreTrainedTokenizerBase, length: int, with_sources: bool
) -> Tokenised:
    """Cut a plain text into blocks, as `abr train` does."""
    loaded, flag = found.loaded, found.limited_by
    used = ["text", SOURCE_COLUMN] if loaded.numbered else ["text"]
    text = replace(
        loaded, rows=loaded.rows.select_columns(used), column=replace(loaded.column, name="text", is_json=False)
    )
    sources: list[str] | None = [] if with_sources else None
    tokens = tokenize(text, arguments, tokenizer)
    blocks = cut_blocks(tokens, length, arguments, text, len(tokenizer), sources, flag="max_length")
    blocks = at_most(blocks, getattr(arguments, flag), flag, must_end=True)
    if sources is not None:
        name_sources(blocks, sources, are_blocks=True)
    return Tokenised(blocks, len(blocks) * length, len(blocks) * (length - 1))
