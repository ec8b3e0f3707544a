"""The page that shows what `gpu.py` has measured, and which of its bars a row misses."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

BARS = {"once": 1.01, "pass": 1.01, "memory": 1.01, "skip": 0.02, "waits": 1.0, "rows": 1e-3, "IterBatch, full": 1.3}
BARS["IterBatch, LoRA"] = 1.5
"""What must be reached: ratios to stock Trainer. A skip may cost so much more than its forward share, the decision may
cost so many more waits of the host for the GPU, and IterBatch's loop must take so many times as long as ours. With
dropped rows, weights may differ by this share of how far training moves them.
"""


def spread(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def misses(name: str, found: dict[str, Any]) -> list[str]:
    """Return which bars a row misses."""
    missed = []
    if "stock again" in found:
        noise = found["stock again"]
        kinds = ("once", "repeats and skips", "accuracy", "resumed")
        missed += [kind for kind in kinds if (found.get(kind) or 0.0) > noise]
        missed += ["rows"] if (found.get("rows") or 0.0) > max(noise, BARS["rows"] * found["moved"]) else []
        missed += ["moved"] if not found["moved"] else []
    ratios = {kind: statistics.median(values) for kind, values in found.get("ratios", {}).items()}
    missed += [kind for kind in ("once", "pass") if ratios.get(kind, 0) > BARS[kind]]
    if "skip" in ratios and ratios["skip"] > found["forward_share"] + BARS["skip"]:
        missed.append("skip")
    if "memory" in found and max(found["memory"].values()) > BARS["memory"] * found["memory"]["stock"]:
        missed.append("memory")
    waits = found.get("waits", {})
    if waits.get("stock") is not None and waits["once"] > waits["stock"] + BARS["waits"]:
        missed.append("waits")
    if "IterBatch" in ratios and ratios["IterBatch"] < BARS[f"IterBatch, {name.partition(': ')[2]}"]:
        missed.append("IterBatch")
    return missed


def page(results: dict[str, Any]) -> str:
    """Return the results as Markdown, a section for each card."""
    lines = [
        "# On a GPU",
        "",
        "`ABRTrainer` beside stock `Trainer` in one process, measured by `python benchmarks/gpu.py`, which also wrote",
        "this page. Ratios are medians over pairs of batches that were trained on in turns, with their quartiles.",
        "",
    ]
    if not results:
        lines += ["No GPU was at hand so far: there are no figures yet.", ""]
    for name, kept in results.items():
        described = ", ".join(f"{key} {value}" for key, value in kept["machine"].items())
        lines += [f"## {name}", "", f"{described}.", ""]
        for title, header, cells in TABLES:
            of_kind = {row: found for row, found in kept["rows"].items() if row.startswith(f"{title}:")}
            measured = {row: found for row, found in of_kind.items() if not {"left_out", "failed"} & found.keys()}
            if measured:
                lines += [f"| {title} | {' | '.join(header)} | misses |", "|---" * (len(header) + 2) + "|"]
                for row, found in measured.items():
                    missed = ", ".join(misses(row, found)) or "none"
                    lines.append(f"| {row.partition(': ')[2]} | {' | '.join(cells(found))} | {missed} |")
                lines.append("")
        for row, found in kept["rows"].items():
            if "tests" in found:
                lines += [f"Tests that need a GPU: {found['tests'].strip('= ')}.", ""]
            elif "left_out" in found or "failed" in found:
                what = f"left out, {found['left_out']}" if "left_out" in found else f"failed, {found['failed']}"
                lines += [f"{row}: {what}.", ""]
    lines += ["## What must be reached", "", *WANTED, ""]
    return "\n".join(lines)


def of_exactness(found: dict[str, Any]) -> list[str]:
    kinds = ("moved", "stock again", "once", "repeats and skips", "accuracy", "rows", "resumed")
    return ["refused" if found.get(kind) is None else f"{found[kind]:.0e}" for kind in kinds]


def of_cost(found: dict[str, Any]) -> list[str]:
    memory, speed, waits = found["memory"], found["tokens_per_second"], found["waits"]
    ratios = [spread(found["ratios"][kind]) if kind in found["ratios"] else "" for kind in ("once", "pass")]
    beside = {name: memory[name] / memory["stock"] for name in ("once", "pass") if name in memory}
    return [
        *ratios,
        f"{spread(found['ratios']['skip'])}, forward share {found['forward_share']:.2f}",
        f"{speed['stock']:,.0f}, {speed['once']:,.0f}",
        ", ".join([f"{memory['stock'] / 1e9:.2f} GB", *(f"{ratio:.3f}" for ratio in beside.values())]),
        ", ".join(f"{waits[kind]:.1f}" for kind in ("stock", *beside)) if waits["stock"] is not None else "not seen",
    ]


def of_loops(found: dict[str, Any]) -> list[str]:
    return [spread(values) for values in found["ratios"].values()]


COSTS = [
    "N = 1",
    "a pass of N = 3",
    "a skip",
    "tokens/s, stock and ours",
    "peak memory: stock, N = 1 and N = 3 over it",
    "waits of the host a batch: stock, N = 1, N = 3",
]
TABLES: list[tuple[str, list[str], Callable[[dict[str, Any]], list[str]]]] = [
    (
        "exact",
        [
            "training moves a weight by up to",
            "stock Trainer twice",
            "N = 1 and stock",
            "repeats and skips, and stock on these batches",
            "the same with a rule that looks at the accuracy",
            "rows dropped, and stock on masked labels",
            "resumed and unbroken",
        ],
        of_exactness,
    ),
    ("cost", COSTS, of_cost),
    ("loops", ["IterBatch over ours, N = 1", "N = 3", "bare loop over ours"], of_loops),
    ("option", COSTS, of_cost),
]
WANTED = [
    "- exact: the largest difference of two weights is at most that of stock Trainer run twice. With dropped rows "
    f"it may be {BARS['rows']} of what training moves: a compiled model has the loss of the kept rows computed "
    "outside of it, and TRL's fused head sums over other tiles.",
    f"- N = 1, and a pass of N = 3: at most {BARS['once']} of a batch of stock Trainer.",
    f"- A skip: at most its forward share + {BARS['skip']:.0%} of such a batch.",
    f"- Peak memory: at most {BARS['memory']} of that of stock Trainer.",
    "- The host waits for the GPU once more a batch than under stock Trainer: for the loss that the rule decides on.",
    f"- IterBatch's loop takes {BARS['IterBatch, full']} (full) to {BARS['IterBatch, LoRA']} (LoRA) times as long as "
    "ours at N = 1.",
]
