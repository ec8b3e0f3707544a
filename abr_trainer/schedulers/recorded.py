"""Rules in `run.json`: how those that a Python program made are written down, and made again."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .base import RepeatScheduler
from .registry import build_row_rule, build_rule, import_class
from .rows import RowRule

INSTANCES = "instances"
"""Where `run.json` holds the rules that are no matter of arguments: those that the trainer was given."""


def rule_of_run(provenance: Mapping[str, Any]) -> RepeatScheduler:
    """Return the repeat scheduler of a run, as it was at the start.

    Args:
        provenance: What `run.json` holds.

    Raises:
        ValueError: It cannot be made again; the message says why.
    """
    record = provenance.get(INSTANCES, {}).get("repeat_scheduler")
    return build_rule(provenance["arguments"]) if record is None else rebuild(record, RepeatScheduler)


def name_of_rule(provenance: Mapping[str, Any]) -> str:
    """Return what the repeat scheduler of a run is called, with its parameters as far as they are known."""
    return _name_of(provenance, "repeat_scheduler", "repeat_scheduler", build_rule)


def name_of_row_rule(provenance: Mapping[str, Any]) -> str:
    """Return what the row rule of a run is called, with its parameters as far as they are known."""
    return _name_of(provenance, "row_rule", "skip_rows", build_row_rule)


def _name_of(provenance: Mapping[str, Any], instance: str, flag: str, build: Callable[[Any], Any]) -> str:
    record = provenance.get(INSTANCES, {}).get(instance)
    try:
        return str(record["name"]) if record is not None else repr(build(provenance["arguments"]))
    except ValueError:
        return str(provenance["arguments"][flag])


def parts_of(provenance: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the beginning of a run, and where it was resumed under another rule: `arguments` and `instances` of each.

    `step` is that of the checkpoint. `resumed` also holds the commands that resumed a run.
    """
    return [provenance, *(each for each in provenance.get("resumed", ()) if isinstance(each, Mapping))]


def part_at(
    provenance: Mapping[str, Any], step: int, name: Callable[[Mapping[str, Any]], str]
) -> tuple[Mapping[str, Any], int]:
    """Return the part of `run.json` under which a batch was trained on, and the step after which its rule began.

    Args:
        name: `name_of_rule` or `name_of_row_rule`: a part may change one of them alone, and the other goes on.
    """
    first, *later = parts_of(provenance)
    found, begun = first, 0
    for part in later:
        if part["step"] < step and name(part) != name(found):
            found, begun = part, part["step"]
    return found, begun


def resumed_under(provenance: Mapping[str, Any], rules: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Return `run.json` of a run that goes on from a step, with its rules if they are others than before.

    Args:
        rules: `arguments` and `instances` of the trainer that goes on.
    """
    # What was recorded of batches after the checkpoint is void, as they are.
    resumed = [each for each in provenance.get("resumed", ()) if not isinstance(each, Mapping) or each["step"] < step]
    kept = {**provenance, "resumed": resumed}
    last = parts_of(kept)[-1]
    if "arguments" in last and any(name(last) != name(rules) for name in (name_of_rule, name_of_row_rule)):
        resumed.append({"step": step, **rules})
    if not resumed:
        del kept["resumed"]
    return kept


def row_rule_of_run(provenance: Mapping[str, Any]) -> RowRule | None:
    """Return the row rule of a run, as it was at the start; None for a run without one.

    Raises:
        ValueError: It cannot be made again; the message says why.
    """
    record = provenance.get(INSTANCES, {}).get("row_rule")
    return build_row_rule(provenance["arguments"]) if record is None else rebuild(record, RowRule)


def record_of(rule: RepeatScheduler | RowRule) -> dict[str, Any]:
    """Return a rule as JSON: its name, its class, and how to make it again, with what it has seen before the run.

    `parameters` is None where it is not known how: the class is no dataclass and takes arguments, or one of them is
    not JSON. `rules` are those that it wraps.

    >>> from abr_trainer.schedulers import ConstantScheduler
    >>> record_of(ConstantScheduler(2))["class"], record_of(ConstantScheduler(2))["parameters"]
    ('abr_trainer.schedulers.constant:ConstantScheduler', {'repeats': 2})

    Raises:
        TypeError: What it has seen is not JSON.
    """
    state = rule.state_dict()
    with must_be_json(repr(rule)):
        json.dumps(state)
    return _made_of(rule) | ({"state": state} if state else {})


@contextlib.contextmanager
def must_be_json(rule: str) -> Iterator[None]:
    """Name the rule in the error of a `json.dumps` of its state.

    Raises:
        TypeError: The state is not JSON.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        raise TypeError(f"The state_dict of {rule} is not JSON: {error}.") from error


def _made_of(rule: RepeatScheduler | RowRule) -> dict[str, Any]:
    kind = type(rule)
    record: dict[str, Any] = {"name": repr(rule), "class": f"{kind.__module__}:{kind.__qualname__}"}
    if not dataclasses.is_dataclass(rule):
        return record | {"parameters": None if inspect.signature(kind).parameters else {}}
    values = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule) if field.init}
    wrapped = {name: value for name, value in values.items() if isinstance(value, RepeatScheduler)}
    given = {name: value for name, value in values.items() if name not in wrapped}
    rules = {name: _made_of(value) for name, value in wrapped.items()}
    return record | {"parameters": given if _is_json(given) else None} | ({"rules": rules} if rules else {})


def rebuild(record: Mapping[str, Any], base: type[Any]) -> Any:
    """Return the rule that a record is of.

    Raises:
        ValueError: It cannot be made again.
    """
    name, path = record["name"], record["class"]
    if record["parameters"] is None:
        raise ValueError(f"{name} of {path} cannot be made again: its class is no dataclass with JSON parameters.")
    if path.startswith("__main__:"):
        raise ValueError(f"{name} cannot be made again: its class stands in a script or a notebook, not in a module.")
    wrapped = {key: rebuild(each, RepeatScheduler) for key, each in record.get("rules", {}).items()}
    try:
        rule = import_class(path, base)(**record["parameters"], **wrapped)
    except TypeError as error:
        raise ValueError(f"{name} of {path} cannot be made again: {error}.") from error
    if repr(rule) != name:
        raise ValueError(f"{name} cannot be made again: {path} has changed, and now makes {rule!r}.")
    if "state" in record:
        rule.load_state_dict(record["state"])
    return rule


def _is_json(values: dict[str, Any]) -> bool:
    try:
        return bool(json.loads(json.dumps(values, allow_nan=False)) == values)
    except (TypeError, ValueError):
        return False
