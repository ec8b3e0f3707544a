"""The prose of a Markdown file, sentence by sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator

from markdown_it import MarkdownIt

PARSER = MarkdownIt("commonmark").enable("table")


def paragraphs(markdown: str) -> Iterator[str]:
    """Yield headings, paragraphs, items and cells as plain text, with each piece of code as one word."""
    for token in PARSER.parse(markdown):
        if token.type == "inline":
            kinds = {"text": None, "code_inline": "code", "softbreak": " ", "hardbreak": " "}
            yield "".join(kinds[child.type] or child.content for child in token.children or () if child.type in kinds)


def sentences(markdown: str) -> Iterator[str]:
    """Yield what is read in one breath: up to a full stop, a colon or a semicolon."""
    for paragraph in paragraphs(markdown):
        yield from re.split(r"(?<=[.!?;:])[\"')]*\s+", paragraph)
