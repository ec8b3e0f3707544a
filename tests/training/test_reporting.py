"""Other trackers than TensorBoard get the same figures, in the offline mode of each; those that are not installed are
skipped.
"""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import Scripted, token_rows

OURS = {"perplexity", "repeats", "skipped", "passes", "updates"}


def of_wandb(directory):
    import wandb

    found = {name: value for name, value in dict(wandb.run.summary).items() if not name.startswith("_")}
    wandb.finish()
    return found


def of_mlflow(directory):
    import mlflow

    run = mlflow.active_run() or mlflow.search_runs(search_all_experiments=True, output_format="list")[0]
    metrics = mlflow.get_run(run.info.run_id).data.metrics
    mlflow.end_run()
    # The callback of transformers gives it plain names. Those of TensorBoard are made of them so.
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in metrics.items()
    }


def of_trackio(directory):
    from trackio.sqlite_storage import SQLiteStorage

    runs = [(project, run) for project in SQLiteStorage.get_projects() for run in SQLiteStorage.get_runs(project)]
    return {name: value for each in runs for line in SQLiteStorage.get_logs(*each) for name, value in line.items()}


READERS = {"wandb": of_wandb, "mlflow": of_mlflow, "trackio": of_trackio}


@pytest.mark.parametrize("tracker", READERS)
def test_a_tracker_gets_what_tensorboard_gets(train, tmp_path, monkeypatch, tracker):
    pytest.importorskip(tracker)
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "WANDB_SILENT": "true",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "TENSORBOARD_LOGGING_DIR": str(tmp_path / "tensorboard"),
    }.items():
        monkeypatch.setenv(name, value)
    train(
        repeat_scheduler=Scripted(2, 0, 1),
        report_to=["tensorboard", tracker],
        eval_strategy="epoch",
        trainer_options={"eval_dataset": token_rows(4)},
    )
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    last = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    # Of the totals at the end, some trackers keep those of stock Trainer under other names, or not at all.
    expected = {
        tag: value for tag, value in last.items() if tag.startswith("eval/") or tag.removeprefix("train/") in OURS
    }
    assert len(expected) > len(OURS) + 2
    found = READERS[tracker](tmp_path)
    assert {tag: found.get(tag) for tag in expected} == pytest.approx(expected, rel=1e-5)
    assert {f"train/train_{name}" for name in ("passes", "updates", "skips", "tokens")} <= found.keys()
