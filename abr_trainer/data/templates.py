"""Chat templates: from a file, from another tokenizer, or one of ours by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from ..records.errors import find_named, one_line

logger = logging.get_logger(__name__)

CHATML = """\
{%- for message in messages %}
    {%- if tools or message.tool_calls %}
        {{- raise_exception('chatml has no place for tools') }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

ALPACA = """\
{%- for message in messages %}
    {%- if tools or message.tool_calls or message['role'] not in ('system', 'user', 'assistant') %}
        {{- raise_exception('alpaca has no place for tools') }}
    {%- endif %}
    {%- if message['role'] == 'assistant' %}
        {{- '### Response:\\n' }}
        {%- generation %}{{- message['content'] + eos_token }}{%- endgeneration %}
    {%- else %}
        {{- ('### Instruction:\\n' if message['role'] == 'user' else '') + message['content'] }}
    {%- endif %}
    {%- if not loop.last or add_generation_prompt %}
        {{- '\\n\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '### Response:\\n' }}
{%- endif %}"""

TEMPLATES = {"chatml": CHATML, "alpaca": ALPACA}
"""Templates that mark the assistant's tokens. `chatml` needs its two tokens in the vocabulary. `alpaca` is plain text
and an end-of-text token, so that it works with any base model.
"""

MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
SPECIAL = re.compile(r"<\|[^|<>\s]+\|>")
SUFFIXES = (".jinja", ".jinja2", ".j2", ".txt")

Template = str | dict[str, str]
"""The chat template of a tokenizer: one text, or several by name."""


def find_template(name: str, **hub_options: Any) -> Template:
    """Return the chat template that `--chat_template` names: one of `TEMPLATES`, a file, or a tokenizer's.

    Args:
        hub_options: Options for loading the tokenizer, e.g. `trust_remote_code`.

    Raises:
        ValueError: There is no such template.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name)
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(f"--chat_template {name} cannot be read: {one_line(error)}") from error
        if not text.strip():
            raise ValueError(f"--chat_template {name} is empty.")
        return text
    if path.suffix in SUFFIXES or (not path.exists() and name.startswith(("/", "./", "../", "~"))):
        raise ValueError(f"--chat_template {name} does not exist.")
    if not path.exists() and "/" not in name:
        return find_named("--chat_template", name, TEMPLATES)
    try:
        found: Template | None = AutoTokenizer.from_pretrained(name, **hub_options).chat_template
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--chat_template {name} is neither a file, nor one of {', '.join(TEMPLATES)}, nor a tokenizer: "
            f"{one_line(error)}"
        ) from error
    if not found:
        raise ValueError(f"--chat_template {name}: the tokenizer of this model has no chat template.")
    return found


def refuse_missing_template(tokenizer: PreTrainedTokenizerBase, origin: str) -> None:
    """Refuse to train on chats if the tokenizer has no chat template.

    Args:
        origin: The flag that the chats come from.

    Raises:
        ValueError: It has none.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"{origin} holds chats, but the tokenizer of {tokenizer.name_or_path} has no chat template. "
            "Give --chat_template: a file, the name of a model to take it from, or one of "
            f"{', '.join(TEMPLATES)}. alpaca works with any base model."
        )


def check_template(tokenizer: PreTrainedTokenizerBase, named: str) -> None:
    """Check that a template is valid, and warn of special tokens that the tokenizer does not have.

    Args:
        named: The flag or model that the template comes from, for messages.

    Raises:
        ValueError: It is not valid Jinja.
    """
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ValueError(f"{named} is not valid, line {error.lineno}: {one_line(error)}") from error
    except Exception:  # the template may need other messages than this one; it is third-party code
        return
    whole = tokenizer.chat_template
    vocabulary = tokenizer.get_vocab()
    written = SPECIAL.findall(whole if isinstance(whole, str) else "".join(whole.values()))
    missing = [mark for mark in dict.fromkeys(written) if mark not in vocabulary]
    if missing:
        logger.warning(
            f"{named} writes {', '.join(missing[:3])}, but the tokenizer has no such token and splits it. "
            "Use the template of a model with this tokenizer, or alpaca, which needs no special tokens."
        )


def marks_assistant(template: Template | None) -> bool:
    """Tell whether a template marks the assistant's tokens."""
    text = template.get("default", "") if isinstance(template, dict) else template
    return MARK.search(text or "") is not None
