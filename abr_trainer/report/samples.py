"""What a model wrote in the course of a run, as its page and the terminal show it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..records.files import PROVENANCE, SAMPLES_NAME, TRAINER_STATE, read_json, read_lines, step_of
from ..records.shapes import RUN, SAMPLE, STATE
from .figure import Excerpts, Section
from .text import printable

NOTHING = "(nothing)"

WIDEST = 120
"""Columns of a terminal that are used."""

NAME, LEAST_ROOM = 12, 8
"""Columns of the name of a text, and of a text in a terminal that is narrower than both."""

MOST_SHOWN = 3
"""Prompts that the terminal shows, of four lines each."""

Samples = dict[int, list[dict[str, Any]]]
"""By the number of the prompt: a line for each evaluation, in order; that of the model that was kept is the last."""


def read_samples(directory: Path) -> Samples:
    """Return the samples of a run; nothing if it has none."""
    path = directory / SAMPLES_NAME
    samples: Samples = {}
    for line in read_lines(path, SAMPLE) if path.is_file() else ():
        samples.setdefault(line["sample"], []).append(line)
    return samples


def sample_sections(directory: Path) -> list[Section]:
    """Return the section of the page of a run, or nothing if it has no samples."""
    samples, kept = read_samples(directory), _kept_step(directory)
    if not samples:
        return []
    blocks: list[str | Excerpts] = [
        "What the model writes after beginnings of texts from the evaluation set, always the most likely token, and "
        "what follows there in the data. A few samples show what a change of perplexity looks like. They measure "
        "nothing."
    ]
    for number, lines in samples.items():
        first, last = lines[0], lines[-1]
        items = [(f"Prompt {number}", first["prompt"])]
        items += [(_named(first), first["continuation"])] if first["step"] != last["step"] else []
        items += [(_named(last, last["step"] == kept), last["continuation"]), ("In the text", last["reference"])]
        shown = len(items)
        between = {line["step"]: line for line in lines if line["step"] not in (first["step"], last["step"])}
        items += [(_named(line), line["continuation"]) for line in between.values()]
        blocks.append(Excerpts(tuple((said, printable(text) or NOTHING) for said, text in items), open=shown))
    return [Section(f"Samples ({len(samples)})", tuple(blocks))]


def _kept_step(directory: Path) -> int | None:
    """Return after how many batches the weights were saved that a run has kept; None if it is not finished."""
    state = read_json(directory / TRAINER_STATE, STATE)
    if state is None:
        return None
    arguments = (read_json(directory / PROVENANCE, RUN) or {}).get("arguments", {})
    best = state.get("best_model_checkpoint") if arguments.get("load_best_model_at_end") else None
    return step_of(Path(best)) if best else int(state.get("global_step", 0))


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
    samples, kept = read_samples(directory), _kept_step(directory)
    if not samples:
        return []
    width = width or min(shutil.get_terminal_size().columns, WIDEST)
    seconds = sum(line["seconds"] for lines in samples.values() for line in lines)
    lines = [f"samples     what the model writes after a prompt; all samples of the run took {seconds:.1f} s"]
    if len(samples) > MOST_SHOWN:
        lines[0] += f"; {MOST_SHOWN} of {len(samples)}, all are in {SAMPLES_NAME}"
    for number, told in list(samples.items())[:MOST_SHOWN]:
        first, last = told[0], told[-1]
        lines.append(_line(f"{number} prompt", first["prompt"], width, ends=True))
        if first["step"] != last["step"]:
            lines.append(_line(f"  {'before' if first['step'] == 0 else 'at first'}", first["continuation"], width))
        after = "after" if last["step"] == kept else f"batch {last['step']}"
        lines.append(_line(f"  {after if last['step'] else 'before'}", last["continuation"], width))
        lines.append(_line("  in text", last["reference"], width))
    return [_cut(line, width) for line in lines]


def _line(name: str, text: str, width: int, ends: bool = False) -> str:
    """Return a text on one line after its name, cut to the columns of a terminal.

    Args:
        ends: Keep the end of the text, not its beginning.
    """
    from rich.cells import cell_len  # here: the page needs no rich

    text, room = printable(text) or NOTHING, max(width - NAME, LEAST_ROOM)
    if cell_len(text) > room and ends:
        while cell_len(text) > room - 3:
            text = text[max(1, (cell_len(text) - room + 3) // 2) :]
        text = f"...{text.lstrip()}"
    return f"{name:<{NAME}}{_cut(text, room)}"


def _cut(text: str, width: int) -> str:
    """Return the beginning of a text that is wider than so many columns, with three dots where there is room."""
    from rich.cells import cell_len, set_cell_size

    if cell_len(text) <= width:
        return text
    return f"{set_cell_size(text, width - 3).rstrip()}..." if width > 3 else set_cell_size(text, width)
