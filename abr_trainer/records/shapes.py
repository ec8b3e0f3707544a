"""The shapes of the files that runs leave: what does not fit is damaged, and the error says where."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Shape = Any
"""A `Kind`; a list of one shape; a mapping of keys to shapes, of which others may be there, too; `None`; or a tuple of
shapes, one of which must fit.
"""


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    Attributes:
        name: In an error: "must be ...".
    """

    name: str
    fits: Callable[[Any], bool]


@dataclass(frozen=True)
class Maybe:
    """A key that may be missing."""

    shape: Shape


@dataclass(frozen=True)
class Each:
    """A mapping whose values all have this shape."""

    shape: Shape


@dataclass(frozen=True)
class Some:
    """A list of at least one value of this shape."""

    shape: Shape


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_whole(value) and abs(value) < 1e300) or (isinstance(value, float) and math.isfinite(value))


ANY = Kind("anything", lambda value: True)
TEXT = Kind("text", lambda value: isinstance(value, str))
COUNT = Kind("a whole number from 0 on", lambda value: _is_whole(value) and 0 <= value < 2**63)
STEP = Kind("a whole number from 1 on", lambda value: _is_whole(value) and 0 < value < 2**63)
NUMBER = Kind("a number", _is_number)
REAL = Kind("a number", lambda value: isinstance(value, int | float) and not isinstance(value, bool))
"""NaN and infinity among them."""

YES_OR_NO = Kind("true or false", lambda value: isinstance(value, bool))
LOSS = (NUMBER, None)
"""A loss that is not finite is written as null."""

BATCH: Shape = {
    "step": STEP,
    "passes": NUMBER,
    "loss": LOSS,
    "losses": Some(LOSS),
    "repeats": COUNT,
    "reason": TEXT,
    "progress": Maybe(NUMBER),
    "learning_rate": Maybe(NUMBER),
    **{name: Maybe(NUMBER) for name in ("seconds", "waiting_seconds", "generating_seconds", "working_seconds")},
    **{name: Maybe(LOSS) for name in ("epoch", "pass_seconds", "accuracy", "grad_norm", "advantage", "memory")},
    **{name: Maybe(COUNT) for name in ("rows", "rows_dropped")},
    "replayed": Maybe([{"step": STEP, "loss": LOSS}]),
    "policy": Maybe([dict.fromkeys(("kl", "clip_fraction", "ess"), LOSS)]),
}
"""A line of a trace."""

DROP: Shape = {
    "step": STEP,
    "position": COUNT,
    "loss": LOSS,
    "limit": Maybe((NUMBER, None)),
    **{name: Maybe((COUNT, None)) for name in ("index", "first_row", "last_row", "targets")},
    **{name: Maybe((TEXT, None)) for name in ("source", "text", "reason")},
    "input_ids": Maybe(([COUNT], None)),
    "is_block": Maybe(YES_OR_NO),
}
"""A line of the dropped rows."""

RANKED: Shape = {name: shape for name, shape in DROP.items() if name not in ("step", "position", "loss")} | {
    "index": COUNT
}
"""A line of the ranked rows."""

SKIPPED: Shape = {"step": STEP, "input_ids": [[COUNT]]}
"""A line of the skipped batches."""

SAMPLE: Shape = {
    "step": COUNT,
    "sample": COUNT,
    "seconds": Maybe(NUMBER),
    **dict.fromkeys(("prompt", "continuation", "reference"), TEXT),
}
"""A line of the samples."""

RULE: Shape = {"name": TEXT, "class": TEXT, "parameters": (Each(ANY), None), "rules": Maybe(Each(ANY))}

RULES: Shape = {
    "arguments": Each(ANY),
    "instances": Maybe({"repeat_scheduler": Maybe(RULE), "row_rule": Maybe(RULE)}),
}

RUN: Shape = {
    **RULES,
    "arguments": Maybe(RULES["arguments"]),
    "argv": Maybe([TEXT]),
    "resumed": Maybe([([TEXT], {"step": COUNT, **RULES})]),
    "finished": Maybe((None, {"totals": (Each(ANY), None), "kept_step": Maybe((COUNT, None))})),
    "machine": Maybe(Each(ANY)),
    "versions": Maybe(Each(ANY)),
}
"""`run.json`."""

STATE: Shape = {
    "log_history": Maybe([{"step": COUNT, "epoch": Maybe(LOSS)}]),
    "global_step": Maybe(COUNT),
    "best_model_checkpoint": Maybe((TEXT, None)),
}
"""`trainer_state.json`, as far as it is read here."""


SPENT = ("passes", "updates", "batches", "skips", "repeats", "tokens", "flops", "seconds")
"""What each run has spent; later versions count more kinds of seconds."""

RESULTS: Shape = {
    **{f"train_{name}": Maybe(NUMBER) for name in SPENT},
    **{f"train_{name}_seconds": Maybe(NUMBER) for name in ("waiting", "generating", "evaluation", "saving", "total")},
    **{f"{split}_perplexity": Maybe((REAL, None)) for split in ("eval", "test")},
}
"""`all_results.json`, as far as a page shows it."""

FINISHED: Shape = RESULTS | {f"train_{name}": NUMBER for name in SPENT}


def misfit(value: Any, shape: Shape) -> str | None:
    """Return where a value does not have a shape, and what is wrong there; None if it fits.

    >>> misfit({"step": 1, "loss": "high"}, {"step": STEP, "loss": LOSS})
    "loss is 'high', but must be a number or null"
    >>> misfit({"runs": [{"seed": 0}, {}]}, {"runs": [{"seed": COUNT}]})
    'runs.1.seed is missing'
    """
    found = _find(value, shape)
    if found is None:
        return None
    what, *path = found
    return f"{'.'.join(map(str, reversed(path))) or 'it'} {what}"


def _find(value: Any, shape: Shape) -> list[Any] | None:
    """Return what is wrong, and the keys of the place where it is, the innermost first."""
    if isinstance(shape, Kind) or shape is None:
        fits = value is None if shape is None else shape.fits(value)
        return None if fits else [_told(value, shape)]
    if isinstance(shape, tuple):
        if any(_find(value, each) is None for each in shape):
            return None
        holders = [each for each in shape if isinstance(value, _holder(each))]
        return _find(value, holders[-1]) if holders else [_told(value, shape)]
    if not isinstance(value, _holder(shape)):
        return [_told(value, shape)]
    if isinstance(shape, Some) and not value:
        return ["is empty"]
    if isinstance(shape, Mapping):
        return _find_in_object(value, shape)
    inner = shape[0] if isinstance(shape, list) else shape.shape
    for key, each in value.items() if isinstance(shape, Each) else enumerate(value):
        if (found := _find(each, inner)) is not None:
            return [*found, key]
    return None


def _find_in_object(value: Mapping[str, Any], shape: Mapping[str, Shape]) -> list[Any] | None:
    for key, inner in shape.items():
        is_optional = isinstance(inner, Maybe)
        if key not in value:
            if is_optional:
                continue
            return ["is missing", key]
        if (found := _find(value[key], inner.shape if is_optional else inner)) is not None:
            return [*found, key]
    return None


def _holder(shape: Shape) -> Any:
    """Return the type of what holds other values; of another shape, one that nothing has."""
    if isinstance(shape, list | Some):
        return list
    return Mapping if isinstance(shape, Mapping | Each) else ()


def _told(value: Any, shape: Shape) -> str:
    names = [_name_of(each) for each in (shape if isinstance(shape, tuple) else (shape,))]
    found = "null" if value is None else repr(value)
    found = found if len(found) <= 60 else f"{found[:57]}..."
    return f"is {found}, but must be {' or '.join(names)}"


def _name_of(shape: Shape) -> str:
    if shape is None:
        return "null"
    if isinstance(shape, Kind):
        return shape.name
    return "a list" if isinstance(shape, list | Some) else "an object"
