"""What TensorBoard shows of a comparison: the same tags for every run, over passes instead of steps, and HParams."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..comparison.scores import score_of
from ..records.files import TRACE_NAME, TRAINER_STATE, read_lines

FOLDER = "tensorboard"

OF_BATCHES = ("loss", "repeats", "learning_rate")


def write_events(data: dict[str, Any], out: Path) -> None:
    """Write the logs of all runs in `data` to `tensorboard/` in `out`, a folder each; what was there is replaced.

    The step of an event is the number of passes spent until then, rounded.
    """
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(out / FOLDER, ignore_errors=True)
    flags = {arm["name"]: arm["flags"] for arm in data["arms"]}
    scores = list(dict.fromkeys(score_of(metric).name for run in data["runs"] for metric in run["metrics"]))
    for run in data["runs"]:
        directory = out / run["directory"]
        folder = out / FOLDER / Path(run["directory"]).relative_to("runs")
        with SummaryWriter(str(folder)) as writer:
            for tag, value, passes in scalars(directory, ["loss", *scores]):
                writer.add_scalar(tag, value, passes)
            settings = {data["varied"]: run["arm"], "seed": run["seed"], "flags": " ".join(flags[run["arm"]])}
            final = {f"final/{name}": value for name, value in run["metrics"].items() if value is not None}
            costs = {f"cost/{name}": value for name, value in run["cost"].items()}
            writer.add_hparams({**settings, **run["tuned"]}, {**final, **costs}, run_name=".")


def scalars(directory: Path, of_evaluations: list[str]) -> Iterator[tuple[str, float, int]]:
    """Yield `(tag, value, passes)` for each batch and each evaluation of a run."""
    spent = {0: 0}
    for batch in read_lines(directory / TRACE_NAME):
        passes = spent[batch["step"]] = round(batch["passes"])
        values = {name: batch[name] for name in OF_BATCHES} | {"skipped": float(batch["repeats"] == 0)}
        yield from ((f"train/{name}", value, passes) for name, value in values.items() if value is not None)
    log = json.loads((directory / TRAINER_STATE).read_text(encoding="utf-8"))["log_history"]
    for logs in (logs for logs in log if logs["step"] in spent):
        names = (name for name in of_evaluations if f"eval_{name}" in logs)
        yield from ((f"eval/{name}", logs[f"eval_{name}"], spent[logs["step"]]) for name in names)
