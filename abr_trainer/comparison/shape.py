"""The shape of `comparison.json`: a report is made of that file alone, which may come from anywhere."""

from __future__ import annotations

from typing import Any

from ..records.shapes import ANY, COUNT, NUMBER, SPENT, TEXT, Each, Kind, Maybe, Shape, Some, misfit
from .curves import clock_of
from .scores import BY_NAME, SCORES, score_of

SCORE = (NUMBER, None)

ENDS = ("t_low", "t_high", "bootstrap_low", "bootstrap_high", "deviation", "detectable")

NO_PAIR = {"seeds": Kind("0", lambda value: value == 0 and not isinstance(value, bool))}
ONE_PAIR = {
    "seeds": Kind("1", lambda value: value == 1 and not isinstance(value, bool)),
    **dict.fromkeys(("mean", "wins", "relative_to"), NUMBER),
}
PAIRS = ONE_PAIR | {"seeds": COUNT} | dict.fromkeys(ENDS, NUMBER)

ENTRY: Shape = {
    "values": Each(SCORE),
    "not_finite": COUNT,
    "mean": SCORE,
    "deviation": SCORE,
    "interval": (Some(NUMBER), None),
    "difference": (NO_PAIR, ONE_PAIR, PAIRS),
    "verdict": TEXT,
}
"""What is known of one score of an arm."""

COST: Shape = dict.fromkeys(SPENT, NUMBER) | {"waiting_seconds": Maybe(NUMBER)}

RUN: Shape = {
    "arm": TEXT,
    "seed": COUNT,
    "directory": TEXT,
    "argv": [TEXT],
    "versions": Each(ANY),
    "machine": {"system": TEXT, "cores": COUNT, "device": TEXT, "processes": COUNT},
    "metrics": Each(SCORE),
    "cost": COST,
}


def flaw_of_comparison(data: Any) -> str | None:
    """Return what is wrong in the data of a comparison, and where; None if a report can be made of them."""
    head: Shape = {
        **dict.fromkeys(("metric", "reference", "launcher"), TEXT),
        **{name: [TEXT] for name in ("argv", "flags", "missing", "failures", "warnings")},
        "varied": Maybe(Kind(" or ".join(SCORES), lambda value: value in list(SCORES))),
        "match": Maybe(Kind("passes, seconds or batches", lambda value: value in ["passes", "seconds", "batches"])),
        "seeds": [COUNT],
        "jobs": COUNT,
        "runs": Some(RUN),
        "arms": Some({"name": TEXT}),
    }
    if wrong := misfit(data, head):
        return wrong
    if data["metric"].partition("_")[2] not in BY_NAME:
        return f"metric is {data['metric']!r}, which is no score"
    varied = data.get("varied", "scheduler")
    if varied == "scheduler" and "match" not in data:
        return "match is missing"
    if wrong := misfit(data, _body(data["metric"], varied, data.get("match", ""))):
        return wrong
    of_runs = {run["arm"] for run in data["runs"]}
    lost = [arm["name"] for arm in data["arms"] if arm["seeds"] and arm["name"] not in of_runs]
    if lost:
        return f"there is no run of {lost[0]!r}"
    return None


def _body(metric: str, varied: str, match: str) -> Shape:
    """Return the shape of the arms, which depends on what is compared by what."""
    clock = clock_of(varied, match)
    point = dict.fromkeys((clock, "mean", "low", "high"), NUMBER)
    metrics = {f"{split}_{score.name}": Maybe(ENTRY) for score in SCORES[varied] for split in ("eval", "test")}
    tried = {"values": Each(TEXT), f"eval_{score_of(metric).name}": SCORE}
    spent = "seconds" if clock == "seconds" else "passes"
    seen: Shape = {
        "seeds": [COUNT],
        "tuning": ({"chosen": Each(TEXT), "tried": [tried], "at_edge": [TEXT]}, None),
        "curve": [point],
        "relative_curve": [point],
        "over_time": [dict.fromkeys((spent, "repeats", "skipped"), NUMBER)],
        "over_loss": [dict.fromkeys(("loss", "mean", "low", "high"), NUMBER)],
        "over_passes": [dict.fromkeys(("pass", "mean", "low", "high"), NUMBER)],
        **({"loss_curve": [point]} if varied == "prompt" else {}),
    }
    without_runs = {"seeds": Kind("an empty list", lambda value: value == []), "tuning": seen["tuning"]}
    return {
        "arms": [(without_runs, {**seen, "cost": COST, **metrics})],
        "against_controls": [{"name": TEXT, "control": TEXT, **metrics}],
        **({"runs": [{"prompt": (TEXT, None)}]} if varied == "prompt" else {}),
    }
