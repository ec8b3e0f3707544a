"""`abr report`: it sees what a directory holds."""

from __future__ import annotations

import json
import shutil

import pytest

from abr_trainer.cli import report
from tests.conftest import ROOT

EXAMPLE = ROOT / "docs" / "compare" / "wiki-llama-mrpc-prompts"


def test_the_report_of_a_comparison_is_made_where_it_is(tmp_path, capsys):
    shutil.copy(EXAMPLE / "comparison.json", tmp_path)
    lines = report.main([str(tmp_path)])
    assert capsys.readouterr().out == "\n".join(lines) + "\n"
    assert (tmp_path / "report.md").read_bytes() == (EXAMPLE / "report.md").read_bytes()
    assert not (tmp_path / "_report").exists()


def test_the_report_of_a_run_of_a_comparison_is_that_of_the_run(tmp_path):
    shutil.copy(EXAMPLE / "comparison.json", tmp_path)
    run = tmp_path / "runs" / "none" / "seed-0"
    run.mkdir(parents=True)
    batch = {"step": 1, "epoch": 0.5, "passes": 1.0, "loss": 2.0, "losses": [2.0], "repeats": 1, "reason": "constant"}
    batch |= {"progress": 0.0, "learning_rate": 1e-3, "seconds": 0.1, "memory": 2**30}
    (run / "abr_trace.jsonl").write_text(json.dumps(batch) + "\n")
    assert report.main([str(run)]) == [str(run / "_report" / "report.html")]
    assert "- batches: **1**" in (run / "_report" / "report.md").read_text()
    assert not (tmp_path / "report.md").exists()


@pytest.mark.parametrize(
    ("name", "message"), [("", "contains neither a run"), ("nowhere", "nowhere is not a directory")]
)
def test_a_directory_of_something_else_is_refused_in_one_line(tmp_path, name, message):
    with pytest.raises(SystemExit, match=f"error: .*{message}") as caught:
        report.main([str(tmp_path / name)])
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
