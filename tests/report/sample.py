"""A report as a comparison makes it, with all that a report can hold, and names that must not be taken for markup."""

from __future__ import annotations

import math
import random

from abr_trainer.report.figure import (
    Commands,
    Excerpts,
    Facts,
    Figure,
    Fold,
    Notice,
    Report,
    Section,
    Series,
    Table,
)

NAMES = ("baseline", "abr:loss_threshold=2.0,max_repeats=3", "fixed:2", "my_module:Mine")
HOSTILE = "</script><script>document.title='taken'</script><b>bold</b> & \"quoted\" | *starred* `tick"

LOG = {"x_log": True, "y_log": True}


def sample_report() -> Report:
    """Build the sample: four arms, five seeds, every kind of figure and block."""
    return Report(
        title="Repeat schedulers at equal compute",
        lead=(
            Notice(
                "good", "With fixed:2, perplexity is lower.", "better", "95 % interval -1.5 to -0.2, 5 of 5 seeds."
            ),
            Notice("neutral", "With my_module:Mine, it is 1 % lower, but 2 seeds cannot tell.", "cannot tell"),
            Facts((("batches", "2,000"), ("test perplexity", "19.71"))),
            "Four arms, five seeds each, trained on `small-shakespeare` until 2,000 passes were spent.",
            Notice("good", "abr:loss_threshold=2.0,max_repeats=3 is better than baseline: 95 % interval below zero."),
            Notice("warning", "my_module:Mine: one of five seeds diverged and is counted as missing."),
        ),
        sections=(
            Section(
                "Perplexity over compute",
                ("Every arm had the same number of passes; shaded is one standard error.", curves()),
            ),
            Section("Final perplexity", (finals(), differences(), summary(), Notice("neutral", "fixed:2 is a tie."))),
            Section("What was repeated", (points(), Notice("bad", "my_module:Mine is worse than baseline."))),
            Section("Cost", ("What each arm spent, and on what.", costs())),
            Section("Broken rows", ("Twelve rows were dropped.", excerpts())),
            Section("How to make it again", (commands(), Fold("Every cost", (costs(), "All of it.")))),
        ),
        names=NAMES,
    )


def curves() -> Figure:
    return Figure(
        name="validation_perplexity",
        title="Validation perplexity over passes",
        description="All arms fall fast at first; the adaptive one is lowest from 600 passes on.",
        kind="lines",
        x_label="passes (forward and backward over a batch)",
        y_label="validation perplexity",
        series=tuple(_curve(index, name) for index, name in enumerate(NAMES)),
        y_log=True,
        whole_x=True,
    )


def _curve(index: int, name: str) -> Series:
    x = tuple(range(100, 2001, 100))
    level = [18 + 2.0 * index * (-1) ** index + 60 * math.exp(-step / (350 + 40 * index)) for step in x]
    y = tuple(
        None if name == "my_module:Mine" and step in (900, 1100) else value
        for step, value in zip(x, level, strict=True)
    )
    spread = [0.4 + 4 * math.exp(-step / 500) for step in x]
    low = tuple(None if value is None else value - width for value, width in zip(y, spread, strict=True))
    high = tuple(None if value is None else value + width for value, width in zip(y, spread, strict=True))
    return Series(name, x, y, low, high)


def finals() -> Figure:
    return Figure(
        name="final_perplexity",
        title="Final perplexity",
        description="Dots are seeds; the thin line is the 95 % interval of the mean, the thick one the 50 % interval.",
        kind="intervals",
        x_label="validation perplexity after 2,000 passes",
        y_label="arm",
        series=tuple(_interval(name, 21 - index * 1.3, 0.6) for index, name in enumerate(NAMES)),
    )


def differences() -> Figure:
    return Figure(
        name="difference",
        title="Difference to baseline",
        description="Paired by seed. Left of zero is better than the baseline.",
        kind="intervals",
        x_label="difference in perplexity to baseline",
        y_label="arm",
        series=tuple(_interval(name, (-1.2, -0.1, 0.9)[index], 0.4) for index, name in enumerate(NAMES[1:])),
        reference=0.0,
    )


def _interval(name: str, center: float, spread: float) -> Series:
    dice = random.Random(name)
    seeds = tuple(center + dice.gauss(0, spread) for _ in range(5))
    mean = sum(seeds) / 5
    return Series(
        name,
        x=seeds,
        low=(mean - spread,),
        high=(mean + spread,),
        inner=(mean - spread / 3, mean + spread / 3),
        center=mean,
    )


def points() -> Figure:
    dice = random.Random(7)
    series = []
    for name in NAMES[1:]:
        loss = tuple(abs(dice.gauss(3.0, 0.7)) for _ in range(60))
        repeats = tuple(float(max(1, min(int(value / 1.5), 3))) if "abr" in name else 2.0 for value in loss)
        series.append(Series(name, loss, repeats, labels=tuple(f"batch {index}" for index in range(60))))
    return Figure(
        name="repeats_by_loss",
        title="Repeats by first-pass loss",
        description="The adaptive arm repeats what is hard; the fixed one repeats everything.",
        kind="points",
        x_label="first-pass loss, nats per token",
        y_label="repeats",
        series=tuple(series),
    )


def summary() -> Table:
    return Table(
        "Final perplexity by arm",
        ("arm", "mean", "95 % interval", "difference", "verdict"),
        (
            ("baseline", "21.03", "20.40 to 21.66", "-", "reference"),
            ("abr:loss_threshold=2.0,max_repeats=3", "19.71", "19.11 to 20.31", "-1.32", "better"),
            ("fixed:2", "20.96", "20.33 to 21.60", "-0.07", "tie"),
            ("my_module:Mine", "21.90", "21.30 to 22.50", "+0.87", "worse"),
        ),
        notes=("Intervals are of the mean over seeds, by Student's t.",),
        emphasised=(1,),
    )


def costs() -> Table:
    columns = (
        *("arm", "batches", "skips", "forwards", "backwards", "passes", "updates", "tokens", "FLOPs", "seconds"),
        *("tokens per second", "peak memory, MiB"),
    )
    rows = tuple(
        (
            name,
            "2,000",
            "0",
            "2,000",
            "2,000",
            "2,000",
            "2,000",
            "4,096,000",
            "2.51e15",
            f"{310 + 9 * index}",
            "13,213",
            "1,904",
        )
        for index, name in enumerate(NAMES)
    )
    return Table("What each arm spent", columns, rows)


def excerpts() -> Excerpts:
    long = "a_very_long_word_without_a_place_to_break_at" * 8
    texts = ("Short.", "Words and words. " * 60, long, "\u6587\u5b57" * 90)
    return Excerpts(tuple((f"notes.jsonl, row {i}: loss {9 - i / 4:g}", texts[i % 4]) for i in range(12)))


def commands() -> Commands:
    return Commands(
        "The commands of this comparison, one run a line:",
        tuple(
            f"abr train configs/demo.yaml --repeat_scheduler {name} --seed {seed} --output_dir runs/{seed}"
            for name in ("constant", "threshold")
            for seed in (1, 2)
        ),
    )


def hostile_report(text: str = HOSTILE) -> Report:
    """Build a report whose every text would be markup or script if it were not escaped."""
    series = (Series(text, (1, 2), (3.5, 4.5)), Series("other", (1, 2), (4.5, 3.5)))
    figure = Figure("hostile", text, text, "lines", text, text, series)
    empty = Figure("empty", "Nothing yet", "No run has ended.", "points", "x", "y", (Series("_none", (), ()),))
    table = Table(text, (text, "b"), ((text, "1"),), notes=(text,))
    excerpts = Excerpts(((text, text), (text, "``` " + text)), open=1)
    said = (Notice("bad", text), Notice("bad", text, text, text), Facts(((text, text),)))
    commands = Commands(text, (text, "```"))
    blocks = (text, figure, empty, table, excerpts, commands, *said, Fold(text, (text, table)))
    return Report(text, (text,), (Section(text, blocks),))


def odd_report() -> Report:
    """Build a report of what is seldom: one point, no change, many decades, more names than colours, no data."""
    names = (*NAMES, "robust:threshold=2.5,inner=threshold", "a_very_long_name_without_punctuation_" * 3, "g", "h")
    x = tuple(range(30))
    tens = tuple(10.0**power for power in range(-3, 16))
    rows = tuple(Series(name, (float(i),), (), (i - 1.0,), (i + 1.0,), center=i) for i, name in enumerate(names[:7]))
    shapes: tuple[tuple[str, tuple[Series, ...], dict[str, bool]], ...] = (
        ("one", (Series("baseline", (5,), (1.5,), (1.2,), (1.9,)),), {}),
        ("flat", tuple(Series(name, x, (0.0,) * 30) for name in names[:2]), {}),
        ("decades", (Series("fixed:2", tens, tens[::-1]), Series("baseline", (0, 1), (1, 0))), LOG),
        ("many", tuple(Series(name, x, tuple(i + at for at in x)) for i, name in enumerate(names)), {"whole_x": True}),
    )
    figures = [Figure(name, name, "Odd.", "lines", "x", "y", series, **axes) for name, series, axes in shapes]
    intervals = Figure("rows", "Rows", "Odd.", "intervals", "x", "y", (*rows, Series("none")), reference=2.0)
    decades = Figure("log_rows", "Rows", "Odd.", "intervals", "x", "y", rows[1:], x_log=True, reference=10.0)
    return Report("Oddities of `all` kinds", (), (Section("Odd", (*figures, intervals, decades)),), names)
