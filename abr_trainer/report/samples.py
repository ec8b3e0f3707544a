"""What a model wrote in the course of a run, as its page and the terminal show it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..records.files import SAMPLES_NAME, read_lines
from .figure import Excerpts, Section
from .text import printable

NOTHING = "(nothing)"

WIDEST = 120
"""Columns of a terminal that are used."""

MOST_SHOWN = 3
"""Prompts that the terminal shows, of four lines each."""

Samples = dict[int, list[dict[str, Any]]]
"""By the number of the prompt: a line for each evaluation, in order, that of the model that was kept last."""


def read_samples(directory: Path) -> Samples:
    """Return the samples of a run; nothing if it has none."""
    path = directory / SAMPLES_NAME
    samples: Samples = {}
    for line in read_lines(path) if path.is_file() else ():
        samples.setdefault(line["sample"], []).append(line)
    return samples


def sample_sections(directory: Path) -> list[Section]:
    """Return the section of the page of a run, or nothing if it has no samples."""
    samples = read_samples(directory)
    if not samples:
        return []
    blocks: list[str | Excerpts] = [
        "What the model writes after beginnings of texts from the evaluation set, always the most likely token, and "
        "what follows there in the data. A few samples show what a change of perplexity looks like. They measure "
        "nothing."
    ]
    for number, lines in samples.items():
        first, kept = lines[0], lines[-1]
        items = [(f"Prompt {number}", first["prompt"])]
        items += [(_named(first), first["continuation"])] if first["step"] != kept["step"] else []
        items += [(_named(kept, is_kept=True), kept["continuation"]), ("In the text", kept["reference"])]
        shown = len(items)
        between = {line["step"]: line for line in lines if line["step"] not in (first["step"], kept["step"])}
        items += [(_named(line), line["continuation"]) for line in between.values()]
        blocks.append(Excerpts(tuple((said, printable(text) or NOTHING) for said, text in items), open=shown))
    return [Section(f"Samples ({len(samples)})", tuple(blocks))]


def _named(line: dict[str, Any], is_kept: bool = False) -> str:
    if line["step"] == 0:
        return "Before training"
    return f"{'The model that was kept, after' if is_kept else 'After'} batch {line['step']:,}"


def sample_lines(directory: Path, width: int | None = None) -> list[str]:
    """Return a few lines for the end of a run: each prompt, what the model wrote before and after, what the text says.

    Of a prompt the end is shown, of the others the beginning.

    Args:
        width: Columns; default: those of the terminal, at most 120.
    """
    samples = read_samples(directory)
    if not samples:
        return []
    width = width or min(shutil.get_terminal_size().columns, WIDEST)
    seconds = sum(line["seconds"] for lines in samples.values() for line in lines)
    lines = [f"samples     the most likely continuations, made in {seconds:.1f} s in all"]
    if len(samples) > MOST_SHOWN:
        lines[0] += f"; {MOST_SHOWN} of {len(samples)}, all are in {SAMPLES_NAME}"
    for number, told in list(samples.items())[:MOST_SHOWN]:
        first, kept = told[0], told[-1]
        lines.append(_line(f"{number} prompt", first["prompt"], width, ends=True))
        if first["step"] != kept["step"]:
            lines.append(_line(f"  {'before' if first['step'] == 0 else 'at first'}", first["continuation"], width))
        lines.append(_line("  after" if kept["step"] else "  before", kept["continuation"], width))
        lines.append(_line("  in text", kept["reference"], width))
    return [line if len(line) <= width else line[: width - 3] + "..." for line in lines]


def _line(name: str, text: str, width: int, ends: bool = False) -> str:
    """Return a text on one line after its name, cut to the columns of a terminal.

    Args:
        ends: Keep the end of the text, not its beginning.
    """
    from rich.cells import cell_len, set_cell_size  # here: the page needs no rich

    text, room = printable(text) or NOTHING, width - 12
    if cell_len(text) > room and ends:
        while cell_len(text) > room - 3:
            text = text[max(1, (cell_len(text) - room + 3) // 2) :]
        text = f"...{text.lstrip()}"
    elif cell_len(text) > room:
        text = f"{set_cell_size(text, room - 3).rstrip()}..."
    return f"{name:<12}{text}"
