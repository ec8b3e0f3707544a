"""What TensorBoard shows of a comparison: the same tags for every run, over passes instead of steps, and HParams."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..comparison.curves import on_clock
from ..comparison.scores import score_of
from ..records.files import TRACE_NAME, TRAINER_STATE, read_lines
from ..records.flags import given_flags

FOLDER = "tensorboard"

OF_BATCHES = ("loss", "repeats", "learning_rate")


def write_events(data: dict[str, Any], out: Path) -> None:
    """Write the logs of all runs in `data` to `tensorboard/` in `out`, a folder each; what was there is replaced.

    The step of an event is the number of passes spent until then, rounded. Its time is that of the training: the
    horizontal axis "Relative" shows seconds without evaluations, logs and checkpoints.
    """
    begin = time.time()
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams as untyped

    hparams: Callable[..., Any] = untyped
    shutil.rmtree(out / FOLDER, ignore_errors=True)
    scores = list(dict.fromkeys(score_of(metric).name for run in data["runs"] for metric in run["metrics"]))
    columns = alike([settings_of(run, data) for run in data["runs"]])
    shown = {tag: 0.0 for run in data["runs"] for tag in results_of(run)}
    # TensorBoard takes the columns of all runs from the first one that it reads: each has them all.
    header, *_ = hparams({name: value for settings in columns for name, value in settings.items()}, shown)
    for run, settings in zip(data["runs"], columns, strict=True):
        directory = out / run["directory"]
        folder = out / FOLDER / Path(run["directory"]).relative_to("runs")
        results = results_of(run)
        with SummaryWriter(str(folder)) as writer:
            written = {}
            for tag, value, passes, seconds in scalars(directory, ["loss", *scores]):
                writer.add_scalar(tag, value, passes, walltime=begin + seconds)
                written[tag] = value
            for tag, value in results.items():
                if written.get(tag) != value:  # else it is the last point of a curve
                    end = begin + run["cost"]["seconds"]
                    writer.add_scalar(tag, value, round(run["cost"]["passes"]), walltime=end)
            _, start, end = hparams(settings, results)
            for summary in (header, start, end):
                writer.file_writer.add_summary(summary)


def results_of(run: dict[str, Any]) -> dict[str, float]:
    """Return what a run has reached and spent, by tag: scores go on where their curves end.

    What it has spent comes last by the alphabet: TensorBoard opens on the curves.
    """
    metrics = {name.replace("_", "/", 1): value for name, value in run["metrics"].items() if value is not None}
    return metrics | {f"used/{name}": value for name, value in run["cost"].items()}


def settings_of(run: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Return what makes a run differ from the others, a value each: its arm, its seed, and each of its parameters."""
    flags = next(arm["flags"] for arm in data["arms"] if arm["name"] == run["arm"])
    given = {flag.lstrip("-"): " ".join(values) for flag, values in given_flags(flags).items()}
    parameters = json.loads(given.pop("repeat_scheduler_kwargs", "{}"))
    settings = {data["varied"]: run["arm"], "seed": run["seed"], **given, **parameters, **run["tuned"]}
    return {name: _as_number(value) for name, value in settings.items()}


def _as_number(value: Any) -> Any:
    try:
        return value if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return value if isinstance(value, str) else json.dumps(value)


def alike(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the same settings with values of one type in each column, as TensorBoard needs them.

    >>> alike([{"seed": 0.0, "loss_threshold": 2.0}, {"loss_threshold": "q0.8"}])
    [{'seed': 0.0, 'loss_threshold': '2.0'}, {'loss_threshold': 'q0.8'}]
    """
    types: dict[str, set[type]] = {}
    for row in rows:
        for name, value in row.items():
            types.setdefault(name, set()).add(type(value))
    return [{name: value if len(types[name]) == 1 else str(value) for name, value in row.items()} for row in rows]


def scalars(directory: Path, of_evaluations: list[str]) -> Iterator[tuple[str, float, int, float]]:
    """Yield `(tag, value, passes, seconds)` for each batch and each evaluation of a run."""
    spent = {0: (0, 0.0)}
    for batch in on_clock(list(read_lines(directory / TRACE_NAME)), "seconds"):
        at = spent[batch["step"]] = round(batch["passes"]), batch["seconds"]
        values = {name: batch[name] for name in OF_BATCHES} | {"skipped": float(batch["repeats"] == 0)}
        yield from ((f"train/{name}", value, *at) for name, value in values.items() if value is not None)
    log = json.loads((directory / TRAINER_STATE).read_text(encoding="utf-8"))["log_history"]
    for logs in (logs for logs in log if logs["step"] in spent):
        names = (name for name in of_evaluations if f"eval_{name}" in logs)
        yield from ((f"eval/{name}", logs[f"eval_{name}"], *spent[logs["step"]]) for name in names)
