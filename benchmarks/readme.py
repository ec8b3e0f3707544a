"""Make what the README and the examples show: two pictures, and the notebook with its outputs.

python benchmarks/readme.py                      # all three, in two minutes
python benchmarks/readme.py --only worth         # docs/images/worth.png, of benchmarks/results alone
python benchmarks/readme.py --only comparison    # docs/images/comparison.png, a page in Chromium
python benchmarks/readme.py --only notebook      # examples/first_run.ipynb, run from top to bottom
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from abr_trainer.comparison.statistics import paired
from abr_trainer.records.files import write_whole

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
PAGE = ROOT / "docs" / "compare" / "stories260k-wikitext2" / "report.html"
NOTEBOOK = ROOT / "examples" / "first_run.ipynb"

INK, GOOD, BAD, RULE = "#23252f", "#00559e", "#d1570a", "#c9ccd6"
"""Colours on white: pictures have a ground of their own, so that they can be read on a dark page, too."""

CHROMIUM = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking"),
    *("--disable-component-update", "--disable-dev-shm-usage", "--no-first-run", "--disable-sync"),
)


@dataclass(frozen=True)
class Bar:
    """How far the perplexity of one way to train lies above that of another.

    Attributes:
        found: Of the differences in nll, paired by seed.
        helps: Whether this is the way to go.
    """

    name: str
    found: dict[str, Any]
    helps: bool = False

    @property
    def percent(self) -> float:
        return 100 * math.expm1(self.found["mean"])

    @property
    def reach(self) -> tuple[float, float]:
        """Return how far the 95 % interval reaches to the left and to the right."""
        ends = [100 * math.expm1(self.found[end]) for end in ("t_low", "t_high")]
        return self.percent - ends[0], ends[1] - self.percent


@dataclass(frozen=True)
class Panel:
    """A part of the picture.

    Attributes:
        measured: What the numbers are.
    """

    heading: str
    measured: str
    bars: list[Bar]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="one of the three")
    only = parser.parse_args(argv).only
    for name, make in PARTS.items():
        if only in (None, name):
            print(make().relative_to(ROOT))


# ---- What dropping rows, skipping batches and repeating them is worth ----


def panels() -> list[Panel]:
    """Return what is drawn, from left to right."""
    return [
        Panel(
            "1 row in 10 is broken",
            "perplexity, % above a run on the good rows",
            [
                Bar("train on all rows", of_rows("none")),
                Bar("skip batches", of_rows("batches")),
                Bar("drop rows", of_rows("rows"), helps=True),
            ],
        ),
        Panel(
            "1 batch in 10 is broken",
            "perplexity, % above a run on the good batches",
            [
                Bar("train on all batches", of_batches("no skipping")),
                Bar("skip batches", of_batches("robust"), helps=True),
            ],
        ),
        Panel(
            "Batches are repeated",
            "perplexity, % above fresh batches, same compute",
            [
                Bar("abr, as published", of_repeats("abr 1.0")),
                Bar("every batch twice", of_repeats("fixed 2")),
                Bar("abr, hardest 20 %", of_repeats("abr q0.8")),
            ],
        ),
    ]


def of_rows(arm: str) -> dict[str, Any]:
    """Return how an arm compares with one that drops exactly the broken rows: random tokens, batches of 16 rows."""
    chosen = {"corpus": "wikitext2", "rows": 16, "kind": "random", "share": 10}
    runs = json.loads((RESULTS / "rows.json").read_text())["runs"]
    runs = [run for run in runs if chosen.items() <= run.items()]
    nll = {name: {run["seed"]: run["nll"] for run in runs if run["arm"] == name} for name in (arm, "oracle")}
    return beside(nll[arm], nll["oracle"])


def of_batches(rule: str) -> dict[str, Any]:
    """Return how an outlier rule compares with one that skips exactly the broken batches."""
    nll = study("dirty-stories260k-wikitext2-100_passes")
    return beside(nll[f"{rule}, 10 % random"], nll["oracle, 10 % random"])


def of_repeats(arm: str) -> dict[str, Any]:
    """Return how a rule that repeats compares with fresh batches for the same compute."""
    nll = study("fresh-stories260k-wikitext2-160_passes")
    return beside(nll[arm], nll["baseline"])


def study(name: str) -> dict[str, dict[str, float]]:
    """Return the nll of a study of `benchmarks/effectiveness.py`, by arm and seed."""
    found = next(each for each in json.loads((RESULTS / "effectiveness.json").read_text()) if each["name"] == name)
    return {row["arm"]: row["nll"] for row in found["rows"]}


def beside(nll: dict[Any, float], reference: dict[Any, float]) -> dict[str, Any]:
    return paired([value - reference[seed] for seed, value in nll.items()])


def draw_worth() -> Path:
    """Draw one panel beside the other, over the same scale."""
    drawn = panels()
    figure = Figure(figsize=(8.6, 2.5), dpi=160, facecolor="white")
    for axes, panel in zip(figure.subplots(1, len(drawn), sharex=True), drawn, strict=True):
        axes.text(0, 1.17, panel.heading, transform=axes.transAxes, fontsize=10, weight="bold", color=INK)
        axes.text(0, 1.05, panel.measured, transform=axes.transAxes, fontsize=7.5, color=INK)
        for place, bar in zip(range(3, 0, -1), panel.bars, strict=False):
            colour = GOOD if bar.helps else BAD
            reach = [[end] for end in bar.reach]
            axes.barh(place, bar.percent, 0.34, color=colour)
            axes.errorbar(bar.percent, place, xerr=reach, fmt="none", ecolor=INK, lw=0.9)
            axes.text(0.3, place + 0.27, bar.name, color=INK, fontsize=8.5)
            number = f"{round(bar.percent, 1) or 0:+.1f} %".replace("-", "\N{MINUS SIGN}").replace("+0.0", "0.0")
            axes.text(20, place + 0.27, number, color=colour, fontsize=9, weight="bold", ha="right")
        axes.set(xlim=(-1.2, 20), ylim=(0.6, 3.7), yticks=[], xticks=[0, 5, 10, 15, 20])
        axes.axvline(0, color=INK, lw=0.9)
        axes.tick_params(labelsize=7.5, colors=INK, length=2)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(RULE)
    note = "LLaMA of 0.26M parameters with LoRA on WikiText-2; five seeds; lines are 95 % intervals. "
    note += "In the first two, 0 % is a run without the broken data."
    figure.text(0.02, 0.03, note, fontsize=7, color=INK)
    figure.subplots_adjust(left=0.02, right=0.98, top=0.8, bottom=0.19, wspace=0.12)
    written = io.BytesIO()
    figure.savefig(written, format="png", facecolor="white")
    return save(Image.open(written), "worth.png")


# ---- A page, as it looks ----


def photograph_comparison() -> Path:
    """Show the beginning of the page of a comparison in Chromium."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        raise SystemExit("error: the picture of the page needs chromium, which is not installed.")
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "page.png"
        size = ["--window-size=1000,708", "--force-device-scale-factor=1.5", f"--user-data-dir={folder}/profile"]
        command = [browser, *CHROMIUM, *size, f"--screenshot={picture}", PAGE.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        return save(Image.open(picture), "comparison.png")


def save(picture: Image.Image, name: str) -> Path:
    """Write a picture with few colours, which keeps it small."""
    IMAGES.mkdir(exist_ok=True)
    path = IMAGES / name
    picture.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
    return path


# ---- The notebook ----


def run_notebook() -> Path:
    """Run the notebook in a directory that is gone afterwards, and keep what its cells show."""
    import nbformat
    from nbclient import NotebookClient

    quiet = {"PYTHONWARNINGS": "ignore", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "DS_ACCELERATOR": "cpu"}
    os.environ |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **quiet}
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}, coalesce_streams=True)
        client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times, which would differ each time
    write_whole(NOTEBOOK, nbformat.writes(notebook) + "\n")
    return NOTEBOOK


PARTS = {"worth": draw_worth, "comparison": photograph_comparison, "notebook": run_notebook}

if __name__ == "__main__":
    main()
