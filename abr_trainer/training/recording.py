"""`run.json` of a run that a Python program has started: a command writes its own, with the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..models.devices import provenance_of
from ..records.files import PROVENANCE, write_whole
from ..schedulers.recorded import INSTANCES, record_of
from .config import ABRConfig


def record_run(trainer: Any, directory: Path, is_resumed: bool) -> None:
    """Write down which arguments and rules make this run, and by which versions on which machine.

    A resumed run keeps what stands there.
    """
    path, args = directory / PROVENANCE, trainer.args
    if is_resumed and path.exists():
        return
    has_fields = isinstance(args, ABRConfig)
    instances = {
        "repeat_scheduler": trainer.repeat_scheduler
        if trainer._given_scheduler is not None or not has_fields
        else None,
        "row_rule": trainer._given_row_rule,
    }
    record = {
        **provenance_of(args.device, args.world_size),
        "arguments": {**args.to_dict(), "model_name_or_path": trainer._name_of_base()},
        INSTANCES: {name: record_of(rule) for name, rule in instances.items() if rule is not None},
    }
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record, indent=2, default=str) + "\n")
