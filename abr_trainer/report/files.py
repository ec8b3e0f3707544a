"""The files of a report."""

from __future__ import annotations

from pathlib import Path

from ..records.files import write_whole
from .figure import Report
from .markdown import render_markdown
from .page import render_page
from .pictures import save_pictures

PICTURES = "plots"


def write_report(report: Report, directory: Path) -> None:
    """Write `report.md`, `report.html` and the pictures under `plots`. What else the directory holds stays."""
    save_pictures(report, directory / PICTURES)
    write_whole(directory / "report.md", render_markdown(report, PICTURES))
    write_whole(directory / "report.html", render_page(report))
