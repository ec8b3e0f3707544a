"""What runs and comparisons leave on disk, by name; readable without torch and transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROVENANCE = "run.json"
RESULTS = "all_results.json"
TRAINER_STATE = "trainer_state.json"
COMPARISON = "comparison.json"
CHECKPOINT_PREFIX = "checkpoint-"

TRACE_NAME = "abr_trace.jsonl"
HISTORY_NAME = "perplexity_history.json"

SUMMARY_NAME = "abr_summary.json"

TASK_NAME = "task.json"
"""What a classifier was trained to do: the flags that its predictions depend on."""

QUANT_CONFIG_NAME = "quant_config.json"
CONFIGS = ("config.json", QUANT_CONFIG_NAME, "adapter_config.json")
"""What describes the model of a run."""

PREDICTIONS_NAME = "{split}_predictions.jsonl"

SKIPPED_NAME = "_skipped_batches.jsonl"
REPORT_FOLDER = "_report"
"""These hold text of the training set: `Trainer` pushes nothing from the output directory that begins with `_`."""


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file all or nothing: a kill leaves what stood there before."""
    replacement = path.with_name(f"{path.name}.tmp")
    replacement.write_bytes(content.encode() if isinstance(content, str) else content)
    replacement.replace(path)


def read_json(path: Path) -> Any:
    """Return what a JSON file holds, or None if it is missing or was not written to its end."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_lines(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yield the lines of a trace, an object each, up to the first that a killed run left unfinished."""
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            if not line.endswith("\n"):
                return
            yield json.loads(line)


def updates_of(batch: dict[str, Any]) -> int:
    """Return the updates that a line of a trace tells of: on the batch, and on earlier ones after it."""
    return int(batch["repeats"]) + sum(earlier["loss"] is not None for earlier in batch.get("replayed", ()))


def cut_lines(path: Path, step: int) -> int:
    """Drop the batches after `step` from a trace, all or nothing, and return how many are left."""
    kept = [batch for batch in read_lines(path) if batch["step"] <= step] if step and path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(batch) + "\n" for batch in kept))
    return len(kept)


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """Return the newest checkpoint written to its end, or None. A killed run can leave a newer one half-written."""
    checkpoints = sorted(Path(output_dir).glob(f"{CHECKPOINT_PREFIX}*"), key=step_of, reverse=True)
    return next((str(checkpoint) for checkpoint in checkpoints if is_complete(checkpoint)), None)


def step_of(checkpoint: Path) -> int:
    """Return the number of batches in the name of a checkpoint, -1 if there is none."""
    step = checkpoint.name.rpartition("-")[2]
    return int(step) if step.isdigit() else -1


def is_complete(checkpoint: Path) -> bool:
    """Tell whether a checkpoint has been written to its end, which is the state of the trainer."""
    return "global_step" in (read_json(checkpoint / TRAINER_STATE) or {})
