"""Rows of sentences that a tiny model learns to tell apart in seconds: tales and reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset

from abr_trainer.data.demo import passages
from abr_trainer.data.tasks import GLUE

QUICK = ["--use_cpu", "--disable_tqdm", "true", "--report_to", "none", "--learning_rate", "2e-2", "--max_seq_length"]
QUICK += ["24", "--per_device_train_batch_size", "4"]
"""Flags of a quick run of `abr classify`."""


def tales_and_reports(count: int, seed: int = 1) -> list[dict[str, Any]]:
    """Return `count` rows, a tale and a report in turn."""
    tales = list(passages("tale", count // 2 + 1, seed=seed))
    reports = list(passages("report", count // 2 + 1, seed=seed))
    rows = [
        {"sentence": text, "label": label}
        for pair in zip(tales, reports, strict=True)
        for text, label in zip(pair, ("tale", "report"), strict=True)
    ]
    return rows[:count]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def lay_out_as_on_the_hub(folder: Path, task: str, splits: dict[str, list[dict[str, Any]]], monkeypatch: Any) -> None:
    """Make `folder` the working directory, in which a task of GLUE goes by the name that it has on the Hub."""
    repository = folder / GLUE
    repository.mkdir(parents=True)
    for split, rows in splits.items():
        Dataset.from_list(rows).to_parquet(repository / f"{task}-{split}.parquet")
    files = [{"split": split, "path": f"{task}-{split}.parquet"} for split in splits]
    card = {"configs": [{"config_name": task, "data_files": files}]}
    (repository / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n", encoding="utf-8")
    monkeypatch.chdir(folder)
    # `datasets` knows a directory of this name again by its name, whatever has become of its files.
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder / "cache"))
