"""The reports in docs/ are what their data give."""

from __future__ import annotations

from pathlib import Path

import pytest

from abr_trainer.comparison.collecting import read_comparison
from abr_trainer.report.markdown import render_markdown
from abr_trainer.report.of_comparison import report_on_comparison
from abr_trainer.report.page import render_page
from tests.conftest import ROOT

EXAMPLES = sorted(path.parent for path in (ROOT / "docs" / "compare").glob("*/comparison.json"))


@pytest.mark.parametrize("example", EXAMPLES, ids=[example.name for example in EXAMPLES])
def test_an_example_is_made_of_its_data(example: Path):
    report = report_on_comparison(read_comparison(example))
    assert (example / "report.md").read_text(encoding="utf-8") == render_markdown(report)
    assert (example / "report.html").read_text(encoding="utf-8") == render_page(report)
    pictures = {path.name for path in (example / "plots").iterdir()}
    assert pictures == {f"{figure.name}.{suffix}" for figure in report.figures for suffix in ("png", "svg")}
