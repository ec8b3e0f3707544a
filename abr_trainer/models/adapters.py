"""Read the configuration of trained adapters, and attach them to a base model."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, TaskType, get_peft_model_state_dict, load_peft_weights
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import logging

from ..data.demo import DEMO_MODEL, is_demo_elsewhere
from ..records.errors import one_line

logger = logging.get_logger(__name__)

FLAG = "--adapter_name_or_path"
FLAGS = (FLAG, "--adapter")

MODELS = {TaskType.CAUSAL_LM: "a causal language model", TaskType.SEQ_CLS: "a sequence classifier"}
"""Names of the kinds of models that adapters are for, by task."""

WRAPPED = ("base_layer", "original_module")
"""Names under which an adapter keeps modules of the base model."""


def read_adapter(adapter: str, task: TaskType = TaskType.CAUSAL_LM) -> PeftConfig:
    """Return the configuration of an adapter in a directory or on the Hub.

    Raises:
        ValueError: There is no adapter, or it is for another task.
    """
    try:
        config = PeftConfig.from_pretrained(adapter)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{FLAG} {adapter} is not an adapter: {one_line(error)}") from error
    if config.task_type not in (None, task):
        raise ValueError(f"{FLAG} {adapter} is an adapter for {config.task_type}, not for {MODELS[task]}.")
    return config


def is_of_classifier(adapter: str) -> bool:
    """Tell whether this is an adapter for a sequence classifier; False if it is not an adapter."""
    with contextlib.suppress(ValueError):
        return bool(read_adapter(adapter, TaskType.SEQ_CLS).task_type)
    return False


def base_of(adapter: str, config: PeftConfig) -> str:
    """Return the base model of an adapter.

    Raises:
        ValueError: The adapter does not record it.
    """
    if not config.base_model_name_or_path:
        raise ValueError(f"{FLAG} {adapter} does not record its base model. Give --model_name_or_path.")
    name = str(config.base_model_name_or_path)
    return str(DEMO_MODEL) if is_demo_elsewhere(name) else name


def virtual_tokens_in(adapter: str) -> int:
    """Return the number of virtual tokens that an adapter puts before the text (prompt or prefix tuning)."""
    return getattr(read_adapter(adapter), "num_virtual_tokens", None) or 0


def load_adapter(
    model: PreTrainedModel,
    adapter: str,
    name: str,
    is_trainable: bool = False,
    dropout: float | None = None,
    task: TaskType = TaskType.CAUSAL_LM,
) -> PeftModel:
    """Attach a trained adapter to a model, and warn if the adapter records another base model.

    If the adapter holds an embedding table with another number of rows, the model's table is resized first.

    Args:
        name: What the model was loaded from. A copy of the adapter saved later records it as its base model.
        is_trainable: Whether to train it further. Its weights are then in fp32, like those of a new adapter.
        dropout: LoRA dropout. None for the one that the adapter was trained with.

    Raises:
        ValueError: There is no such adapter, or it does not fit the model.
    """
    config = read_adapter(adapter, task)
    base = base_of(adapter, config) if config.base_model_name_or_path else "a model that it does not record"
    if dropout is not None:
        config.lora_dropout = dropout  # type: ignore[attr-defined]
    try:
        weights = load_peft_weights(adapter, device="cpu")
        if is_deepspeed_zero3_enabled() and any("lora_" not in key for key in weights):
            raise ValueError("it contains full layers, which cannot be loaded into layers sharded by ZeRO-3")
        _resize_embeddings(model, weights)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(
                model,
                adapter,
                is_trainable=is_trainable,
                config=config,
                # DeepSpeed gathers sharded weights into a buffer of one dtype.
                autocast_adapter_dtype=not is_deepspeed_zero3_enabled(),
                torch_device="cpu",
            )
        known = set(get_peft_model_state_dict(adapted, save_embedding_layers=False)) | set(adapted.state_dict())
        if lost := set(weights) - known:
            raise ValueError(f"the model has no {min(lost)}")
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, UserWarning) as error:
        raise ValueError(
            f"{FLAG} {adapter} does not fit --model_name_or_path {name}; it was trained on {base}: {one_line(error)}"
        ) from error
    if base != name and Path(base).resolve() != Path(name).resolve():
        logger.warning(f"{FLAG} {adapter} was trained on {base}, but is used on {name}.")
    adapted.peft_config["default"].base_model_name_or_path = name
    return adapted


def unwrapped(module: Any) -> Any:
    """Return the base model's module inside an adapter's wrappers."""
    while inside := [each for name in (*WRAPPED, "token_adapter") if (each := module._modules.get(name)) is not None]:
        module = inside[0]
    return module


def embeddings_in(model: Any) -> int:
    """Return the number of rows of the model's embedding table, also if an adapter wraps it."""
    return int(unwrapped(model.get_input_embeddings()).num_embeddings)


def _resize_embeddings(model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Resize the model's embedding table to that in the adapter, if there is one."""
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    for key in (f"base_model.model.{name}.weight", f"base_model.model.{name}.base_layer.weight"):
        if key in weights and len(weights[key]) != embeddings_in(model):
            model.resize_token_embeddings(len(weights[key]), mean_resizing=False)
