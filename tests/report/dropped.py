"""A run that dropped rows, written by hand: its trace, and what it says of the rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

HOSTILE_TEXT = "</script><b>bold</b> `tick` ``` | *s* $x$ [a](b)\n\x1b[31mred\x1b]0;title\x07 \u202eback\r# head"

BATCH = {"epoch": 0.5, "progress": 0.1, "reason": "constant", "learning_rate": 1e-3, "seconds": 0.1, "memory": 2**30}


def drop(step: int, position: int, index: int, loss: float | None, text: Any, /, **more: Any) -> dict[str, Any]:
    """What a run writes of a row that it drops from a batch: row `index + 1` of notes.jsonl."""
    place = {"index": index, "source": "notes.jsonl", "first_row": index + 1, "last_row": index + 1}
    reason = {"reason": "non-finite"} if loss is None else {"reason": "outlier", "limit": 3.0}
    known = {"step": step, "position": position, "loss": loss, "targets": 12, "input_ids": [3] * 13, "text": text}
    return {name: value for name, value in (known | place | reason | more).items() if value is not ...}


def write_run(directory: Path, drops: list[dict[str, Any]], batches: int = 6, rows: int = 4) -> Path:
    """Write a run of so many batches of so many rows whose loss is 2.0, but for those that were dropped."""
    directory.mkdir(parents=True, exist_ok=True)
    trace, row_trace = [], []
    for step in range(1, batches + 1):
        own = {each["position"]: each for each in drops if each["step"] == step}
        losses = [[own[i]["loss"], own[i]["targets"]] if i in own else [2.0, 12] for i in range(rows)]
        is_skipped = len(own) * 2 > rows
        line = {"step": step, "passes": float(step), "loss": 2.0, "losses": [2.0], "repeats": int(not is_skipped)}
        line |= {**BATCH, "rows": rows, "rows_dropped": len(own)}
        row_trace.append({"step": step, "rows": losses})
        trace.append(line | ({"reason": "rows"} if is_skipped else {}))
    for name, lines in (("abr_trace", trace), ("_row_trace", row_trace), ("_dropped_rows", drops)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def write_losses(directory: Path, loss: list[float], visits: list[int]) -> None:
    """Write what a run with `--rank_rows` keeps of each row."""
    arrays = {"loss": np.array(loss, np.float32), "visits": np.array(visits, np.int32)}
    np.savez(directory / "_row_losses.npz", step=np.arange(len(loss), dtype=np.int32), **arrays)


def write_slow_run(directory: Path, batches: int = 60, waits: float = 0.4, **totals: float) -> Path:
    """Write a run of batches of a second, without drops, of which so much is a wait in its second half.

    Args:
        totals: What a finished run has spent beside them; a run at work has none.
    """
    write_run(directory, [], batches)
    path = directory / "abr_trace.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line |= {"seconds": 1.0, "waiting_seconds": waits if line["step"] > batches / 2 else 0.0}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if totals:
        spent = dict.fromkeys(("passes", "flops", "updates", "batches", "tokens"), float(batches))
        spent |= {"skips": 0, "repeats": 1.0, "seconds": float(batches), "waiting_seconds": waits * batches / 2}
        results = {f"train_{name}": value for name, value in (spent | totals).items()}
        (directory / "all_results.json").write_text(json.dumps(results))
    return directory
