"""Whether a run can go on from a checkpoint: is it complete, and is it of this model?"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers.utils import logging

from ..records.files import flaw_in, flaw_of, judged, last_complete_checkpoint, read_json, settle_replaced, tensors_in

logger = logging.get_logger(__name__)


class UnfitCheckpoint(ValueError):
    """A run cannot go on from this checkpoint: it is damaged, or of another model."""


def agreed(choose: Callable[[], str], args: Any) -> str:
    """Let the main process choose a checkpoint, and return on all ranks which.

    Raises:
        UnfitCheckpoint: It could not.
    """
    told: list[str | None] = [None, None]
    if args.process_index == 0:
        try:
            told[0] = choose()
        except (ValueError, OSError) as error:
            told[1] = str(error)
    if args.world_size > 1:
        broadcast_object_list(told)
    chosen, refused = told
    if chosen is None:
        raise UnfitCheckpoint(refused)
    return chosen


def newest_checkpoint(output_dir: str) -> str:
    """Return the last complete checkpoint in an output directory, and warn of newer ones that are damaged.

    All bytes of these checkpoints are read. Where a kill has left two of the same step, one is removed.

    Raises:
        UnfitCheckpoint: There is none.
    """
    settle_replaced(output_dir)
    damaged: list[tuple[Path, str]] = []
    for checkpoint, flaw in judged(output_dir):
        if flaw is None:
            for other, why in damaged:
                logger.warning(f"{other} is passed over: {why}. The run goes on from {checkpoint}.")
            return str(checkpoint)
        damaged.append((checkpoint, flaw))
    why = "".join(f" {checkpoint.name}: {flaw}." for checkpoint, flaw in damaged)
    raise UnfitCheckpoint(f"--resume_from_checkpoint true: there is no complete checkpoint in {output_dir}.{why}")


def sound_checkpoint(checkpoint: str) -> str:
    """Return this checkpoint after all its bytes were read.

    Raises:
        UnfitCheckpoint: It is damaged, or was saved without what is needed.
    """
    _refuse(checkpoint, flaw_in(Path(checkpoint)))
    return checkpoint


def refuse_damaged(checkpoint: str) -> None:
    """Refuse a checkpoint that a run cannot go on from, and offer the newest beside it that is complete.

    Raises:
        UnfitCheckpoint: It is damaged, or was saved without what is needed.
    """
    _refuse(checkpoint, flaw_of(Path(checkpoint)))


def _refuse(checkpoint: str, flaw: str | None) -> None:
    if flaw is None:
        return
    other = last_complete_checkpoint(Path(checkpoint).absolute().parent)
    offer = f" The newest complete one beside it is {other}." if other else ""
    raise UnfitCheckpoint(f"--resume_from_checkpoint {checkpoint} is not a complete checkpoint: {flaw}.{offer}")


def refuse_unfit(checkpoint: str, model: Any) -> None:
    """Refuse a checkpoint of another model: other layers, other shapes, an adapter in the place of whole weights.

    Only `.safetensors` files are looked at, and not under ZeRO-3, which leaves no shapes in the model.

    Raises:
        UnfitCheckpoint: It is of another model.
    """
    saved = _shapes_in(Path(checkpoint))
    if not saved or any(hasattr(parameter, "ds_numel") for parameter in model.parameters()):
        return
    adapter = read_json(Path(checkpoint, "adapter_config.json"))
    kinds = {True: "an adapter", False: "all weights"}
    difference: str | None
    if (adapter is not None) != is_adapted(model):
        difference = f"it holds {kinds[adapter is not None]}, and this run trains {kinds[adapter is None]}"
    else:
        difference = _difference(saved, model) if adapter is None else _difference_of_adapters(saved, model, adapter)
    if difference:
        raise UnfitCheckpoint(
            f"--resume_from_checkpoint {checkpoint} does not fit the model of this run: {difference}. Give the flags "
            "that it was begun with."
        )


def is_adapted(model: Any) -> bool:
    """Tell whether a model is one of PEFT; where nobody has imported that library, it is not."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def _shapes_in(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for path in checkpoint.glob("*.safetensors"):
        if not path.name.startswith("_"):  # batches that a rank keeps
            shapes |= {name: tuple(tensor["shape"]) for name, tensor in (tensors_in(path) or {}).items()}
    return shapes


def _difference(saved: dict[str, tuple[int, ...]], model: Any) -> str | None:
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    other = next((name for name in saved if own.get(name, saved[name]) != saved[name]), None)
    return other and f"{other} is {saved[other]} there and {own[other]} here"


def lacks_names(checkpoint: Path, model: Any) -> bool:
    """Tell whether weights of a model are not in its checkpoint by the names that it has for them.

    The experts of a mixture are one tensor in the model, and one each in the file.
    """
    saved, own = _shapes_in(checkpoint), model.state_dict()
    found = {own[name].data_ptr() for name in saved if name in own}  # of weights that are tied one is saved
    ignored = model._keys_to_ignore_on_save or ()
    lacking = (name for name, value in own.items() if name not in saved and value.data_ptr() not in found)
    return bool(saved) and any(name not in ignored for name in lacking)


def load_by_other_names(checkpoint: Path, model: Any) -> None:
    """Load weights as `from_pretrained` does, which knows the names in the file.

    Raises:
        UnfitCheckpoint: Some weights are not there by any name.
    """
    loaded, told = type(model).from_pretrained(
        checkpoint, config=copy.deepcopy(model.config), dtype=torch.float32, output_loading_info=True
    )
    if told["missing_keys"]:
        raise UnfitCheckpoint(
            f"{checkpoint} does not fit the model of this run: it has no {min(told['missing_keys'])}."
        )
    model.load_state_dict(loaded.state_dict())


def _difference_of_adapters(saved: dict[str, tuple[int, ...]], model: Any, config: dict[str, Any]) -> str | None:
    from peft import get_peft_model_state_dict  # here, because whole weights need no PEFT

    name = model.active_adapters[0]
    before, now = config.get("r"), getattr(model.peft_config[name], "r", None)
    if before != now:
        return f"it was saved with --lora_r {before}, and this run has {now}"
    if config.get("peft_type") == "ADALORA":
        return None  # its shapes change while it is trained
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    own = {name: tuple(value.shape) for name, value in state.items()}
    if missing := own.keys() - saved.keys():
        return f"it has no {min(missing)}"
    if unknown := [name for name in saved.keys() - own.keys() if ".lora_" in name]:
        return f"the model has no {min(unknown)}"
    other = next((name for name in own if own[name] != saved[name]), None)
    return other and f"{other} is {saved[other]} there and {own[other]} here"
