"""`run.json` of a run that a Python program has started: a command writes its own, with the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..models.devices import provenance_of
from ..records.files import FINISHED, PROVENANCE, read_json, write_whole
from ..schedulers.recorded import INSTANCES, record_of, resumed_under
from .config import ABRConfig
from .summary import kept_step


def record_run(trainer: Any, directory: Path, is_resumed: bool) -> None:
    """Write down which arguments and rules make this run, and by which versions on which machine.

    A resumed run, that of a command too, keeps what stands there, and adds its rules if they are others.
    """
    path = directory / PROVENANCE
    record = read_json(path) if is_resumed else None
    if record is not None:
        record = resumed_under(record, _rules_of(trainer), trainer.state.global_step)
    elif trainer.is_recorded:
        return
    else:
        record = {**provenance_of(trainer.args.device, trainer.args.world_size), **_rules_of(trainer)}
    if trainer.is_recorded:
        record.pop(FINISHED, None)  # a command has other files for that
    else:
        record[FINISHED] = None
    directory.mkdir(parents=True, exist_ok=True)
    _write(path, record)


def record_end(trainer: Any, directory: Path, totals: Mapping[str, float]) -> None:
    """Write down that a run has ended: what it has spent, and the step of the model that it has kept."""
    path = directory / PROVENANCE
    record = read_json(path)
    if record is not None:
        _write(path, {**record, FINISHED: {"totals": totals, "kept_step": kept_step(trainer.args, trainer.state)}})


def _rules_of(trainer: Any) -> dict[str, Any]:
    """Return the arguments of a run, and the rules that they do not describe, as JSON."""
    args = trainer.args
    has_fields = isinstance(args, ABRConfig)
    instances = {
        "repeat_scheduler": trainer.repeat_scheduler
        if trainer._given_scheduler is not None or not has_fields
        else None,
        "row_rule": trainer._given_row_rule,
    }
    rules = {
        "arguments": {**args.to_dict(), "model_name_or_path": trainer._name_of_base()},
        INSTANCES: {name: record_of(rule) for name, rule in instances.items() if rule is not None},
    }
    plain: dict[str, Any] = json.loads(json.dumps(rules, default=str))
    return plain


def _write(path: Path, record: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(record, indent=2, default=str) + "\n")
