"""Batches that a rule wants to train on again later: their inputs, in memory and in checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .rollouts import Rollout
from .rows import KeptRows

HELD_NAME = "_abr_held_{rank}.safetensors"


class Call(NamedTuple):
    """Inputs, and the other arguments of one call of `training_step`."""

    inputs: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    kept: KeptRows | None = None
    """Which of its rows are trained on, once that is decided."""
    rollout: Rollout | None = None
    """What is generated of the inputs, by a trainer that does that."""

    @property
    def items_in_batch(self) -> Any:
        """The number of targets in the whole batch, as Trainer passes it on; None where it counts none."""
        return self.args[0] if self.args else self.kwargs.get("num_items_in_batch")

    def tokens(self, main_input: str) -> int:
        """Return the tokens of a pass, padding included: by the name of the model's main input, or as generated."""
        if self.rollout is not None:
            return self.rollout.tokens
        return self.inputs[main_input].numel() if main_input in self.inputs else 0


def rollouts_of(calls: Sequence[Call]) -> list[Rollout]:
    """Return what was generated, by micro-batch; nothing under a trainer that does not generate."""
    return [call.rollout for call in calls if call.rollout is not None]


@dataclass(frozen=True)
class HeldBatch:
    """A batch as it is trained on.

    Attributes:
        calls: Its micro-batches, on this rank.
        tokens: In the batch, over all ranks.
        forward_flops: Of one forward over it, over all ranks.
        share: Targets of the rows that are trained on, as a share of all targets, over all ranks.
    """

    calls: list[Call]
    tokens: int
    forward_flops: float
    share: float = 1.0


def check_holdable(calls: list[Call]) -> None:
    """Refuse to hold what could not be written into a checkpoint.

    Raises:
        ValueError: A micro-batch is no mapping of names to tensors.
    """
    wanted = "To train on a batch again later, its inputs must be tensors by name"
    for inputs, *_ in calls:
        if not isinstance(inputs, Mapping):
            raise ValueError(f"{wanted}, not one {type(inputs).__name__}. Use another --repeat_scheduler.")
        for name, value in inputs.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"{wanted}; {name} is something else. Use another --repeat_scheduler.")


def save_held(directory: Path, rank: int, held: dict[int, HeldBatch]) -> None:
    """Write the batches that this rank holds into a checkpoint; no file where there are none."""
    path = directory / HELD_NAME.format(rank=rank)
    if not held:
        path.unlink(missing_ok=True)  # of a run that was here before
        return
    tensors: dict[str, Tensor] = {}
    described = []
    for index, batch in held.items():
        counts = []
        for i, (inputs, args, kwargs, kept, _) in enumerate(batch.calls):
            for name, value in inputs.items():
                tensors[f"{index}.{i}.{name}"] = value.detach().cpu().contiguous().clone()
            counts.append(
                {
                    "args": [_as_number(value) for value in args],
                    "kwargs": {name: _as_number(value) for name, value in kwargs.items()},
                    **({} if kept is None else {"kept": kept._asdict()}),
                }
            )
        described.append(
            {
                "batch": index,
                "calls": counts,
                "tokens": batch.tokens,
                "forward_flops": batch.forward_flops,
                "share": batch.share,
            }
        )
    save_file(tensors, path, metadata={"held": json.dumps(described)})


def load_held(directory: Path, rank: int, device: torch.device) -> dict[int, HeldBatch]:
    """Read what `save_held` wrote; nothing if there is no such file."""
    path = directory / HELD_NAME.format(rank=rank)
    if not path.exists():
        return {}
    held = {}
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        for described in json.loads(file.metadata()["held"]):
            calls: list[Call] = []
            for i, count in enumerate(described["calls"]):
                prefix = f"{described['batch']}.{i}."
                inputs = {
                    name.removeprefix(prefix): file.get_tensor(name) for name in names if name.startswith(prefix)
                }
                args = tuple(_as_argument(value, device) for value in count["args"])
                kwargs = {name: _as_argument(value, device) for name, value in count["kwargs"].items()}
                kept = KeptRows(**count["kept"]) if "kept" in count else None
                calls.append(Call(inputs, args, kwargs, kept))
            share = described.get("share", 1.0)  # earlier versions dropped no rows
            held[described["batch"]] = HeldBatch(calls, described["tokens"], described["forward_flops"], share)
    return held


def _as_number(value: Any) -> Any:
    """Return what `training_step` is given beside the inputs, the number of targets, as JSON."""
    return {"tensor": value.tolist()} if isinstance(value, Tensor) else value


def _as_argument(value: Any, device: torch.device) -> Any:
    return torch.tensor(value["tensor"], device=device) if isinstance(value, dict) else value
