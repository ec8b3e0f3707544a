"""Load a model and make it ready to fine-tune: base weights, quantisation, LoRA."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import logging

from ..records.errors import one_line
from .adapters import FLAG, embeddings_in, load_adapter, read_adapter
from .arguments import LLAMA_MLP, LoadArguments, ModelArguments
from .experts import holds_stack, layers_beside_experts, linear_routers
from .quantisation import check_kernels

logger = logging.get_logger(__name__)

HEADS_OF_PEFT = ("classifier", "score")
"""Heads that PEFT trains and saves by itself if an adapter is for classification."""

NEW_HEAD = "ignore_mismatched_sizes"
"""Flag that replaces a classifier's head if it has another number of labels."""

QUANTISED = {"Params4bit": "4-bit", "Int8Params": "8-bit"}

AUTO_CLASSES: dict[TaskType, Any] = {
    TaskType.CAUSAL_LM: AutoModelForCausalLM,
    TaskType.SEQ_CLS: AutoModelForSequenceClassification,
}


def load_config(arguments: LoadArguments, **settings: Any) -> PreTrainedConfig:
    """Load the model's configuration, which is cheap and enough to check the data.

    Args:
        settings: Settings to override.

    Raises:
        ValueError: It cannot be loaded, or is not that of a model for this task.
    """
    flag, name = _named(arguments, "config_name")
    if Path(name, "adapter_config.json").exists() and not list(Path(name).glob("model*.safetensors")):
        raise ValueError(f"{flag} {name} is an adapter, not a model. Give it as {FLAG}, and its base model as {flag}.")
    try:
        config = AutoConfig.from_pretrained(name, **arguments.hub_options, **settings)
    except Exception as error:  # a damaged file raises errors of each library's own
        adapter = getattr(arguments, "adapter_name_or_path", None)
        if adapter is not None and name == read_adapter(adapter, arguments.task).base_model_name_or_path:
            name += f", the base model of {FLAG} {adapter},"
        raise ValueError(f"{flag} {name} cannot be loaded: {one_line(error)}") from error
    if arguments.task is TaskType.CAUSAL_LM:
        refuse_non_causal(config, f"{flag} {name}")
    return config


def refuse_non_causal(config: PreTrainedConfig, origin: str) -> None:
    """Refuse a model that is not a causal language model. Some would load as one and give wrong results.

    Args:
        origin: The flag that gave the model, for messages.

    Raises:
        ValueError: It is an encoder or an encoder-decoder, or has no language model head.
    """
    has_remote_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if config.is_encoder_decoder:
        kind = "an encoder-decoder"
    elif sees_all_tokens(config):
        kind = "a masked language model, which can see the tokens that it should predict"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not has_remote_code:
        kind = "another kind of model"
    else:
        return
    named = ", ".join([config.model_type, *(config.architectures or [])])
    raise ValueError(
        f"{origin} is not a causal language model but {kind} ({named}). Give a model such as LLaMA or GPT-2."
    )


def sees_all_tokens(config: PreTrainedConfig) -> bool:
    """Tell whether a model is for masked language modelling and not configured as a decoder."""
    is_masked = config.model_type in (*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation", "xlnet")
    return is_masked and not (getattr(config, "is_decoder", False) or getattr(config, "causal", False))


def load_tokenizer(arguments: LoadArguments) -> PreTrainedTokenizerBase:
    """Load the tokenizer: the adapter's if it has one, else the model's.

    If it has no pad token, its end-of-text token is used.
    """
    flag, name = _named(arguments, "tokenizer_name")
    options = arguments.hub_options
    adapter = getattr(arguments, "adapter_name_or_path", None)
    try:
        if adapter is not None and not arguments.tokenizer_name and get_tokenizer_config(adapter):
            flag, name, options = FLAG, adapter, {**options, "revision": "main"}
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:  # a damaged file raises errors of each library's own
        what = "has no tokenizer" if isinstance(error, OSError | ValueError) else "has a damaged tokenizer"
        raise ValueError(f"{flag} {name} {what}: {one_line(error)}") from error
    if tokenizer.eos_token is None and arguments.task is TaskType.CAUSAL_LM:
        logger.warning_once(
            f"The tokenizer of {flag} {name} has no end-of-text token, so nothing separates documents."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _named(arguments: LoadArguments, flag: str) -> tuple[str, str]:
    name = getattr(arguments, flag)
    return (f"--{flag}", name) if name else ("--model_name_or_path", arguments.model_name_or_path)


def load_model(
    arguments: ModelArguments,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    device: str | torch.device,
    activation_checkpointing: bool = False,
) -> PreTrainedModel | PeftModel:
    """Load the base model, quantise it, and attach a new or a trained LoRA adapter, according to the arguments.

    Args:
        device: Device of a quantised model. Any other model stays on the CPU until Trainer moves it.
        activation_checkpointing: Whether it will be trained with activation checkpointing.

    Raises:
        ValueError: Model, adapter, tokenizer and flags do not fit together.
    """
    model = load_base(arguments, config, device)
    is_sharded = shards_weights()
    adapter = arguments.adapter_name_or_path
    if adapter is None and len(tokenizer) > embeddings_in(model):
        # Not with a trained adapter: if it was trained on resized embeddings, it contains the full table.
        model.resize_token_embeddings(len(tokenizer))
    for settings in (model.config, getattr(model, "generation_config", None)):
        if settings is not None:
            settings.pad_token_id = tokenizer.pad_token_id
    if not arguments.use_lora:
        return model
    heads = heads_in(model, arguments.task)
    for head in heads:
        compute_in_fp32(model.get_submodule(head))
    if getattr(model, "is_quantized", False) and not is_sharded:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=activation_checkpointing)
    elif activation_checkpointing:
        model.enable_input_require_grads()  # without it, checkpointed layers pass no gradient to the adapters
    if adapter is None:
        # DeepSpeed gathers sharded weights into a buffer of one dtype.
        config_of_adapter = lora_config(arguments, model, heads)
        try:
            return get_peft_model(
                model,
                config_of_adapter,
                autocast_adapter_dtype=not is_deepspeed_zero3_enabled(),
                revision=None if arguments.model_revision == "main" else arguments.model_revision,
            )
        except (ValueError, NotImplementedError) as error:
            raise ValueError(_without_adapter_because(error, arguments)) from error
    adapted = load_adapter(model, adapter, arguments.model_name_or_path, True, arguments.lora_dropout, arguments.task)
    if embeddings_in(adapted) < len(tokenizer):
        raise ValueError(
            f"The tokenizer of {tokenizer.name_or_path} has {len(tokenizer)} tokens, but {FLAG} {adapter} and its "
            f"base model have {embeddings_in(adapted)} embeddings. Give its own tokenizer as --tokenizer_name."
        )
    return adapted


def _without_adapter_because(error: Exception, arguments: ModelArguments) -> str:
    targets = " ".join(arguments.lora_target_modules or ["(default)"])
    if "does not work with lora_dropout" in str(error):
        reason = "adapters on experts cannot use dropout; give --lora_dropout 0, or leave out the experts' layers"
    else:
        reason = one_line(error)
    return f"--lora_target_modules {targets} cannot be adapted: {reason.rstrip('.')}."


def load_base(arguments: LoadArguments, config: PreTrainedConfig, device: str | torch.device) -> PreTrainedModel:
    """Load a base model, quantised according to the arguments.

    Args:
        device: Device of a quantised model. Any other model stays on the CPU.

    Raises:
        ValueError: Sharding does not support this quantisation, or a classifier's head has another number of labels.
    """
    is_sharded = shards_weights()
    if is_sharded and arguments.load_in_8bit:
        raise ValueError("--load_in_8bit weights cannot be sharded by FSDP or ZeRO-3. Use --load_in_4bit, or DDP.")
    if is_deepspeed_zero3_enabled() and arguments.load_in_4bit:
        raise ValueError("--load_in_4bit weights are sharded by FSDP2, not by ZeRO-3. Use FSDP2, ZeRO-2 or DDP.")
    has_own_device = arguments.is_quantised and not is_sharded
    auto_class = AUTO_CLASSES[arguments.task]
    kept: list[str] = []
    if arguments.is_quantised and arguments.task is TaskType.SEQ_CLS:
        with torch.device("meta"):
            outline = auto_class.from_config(config, trust_remote_code=arguments.trust_remote_code)
        kept = heads_in(outline, arguments.task)
    with _naming_other_heads(arguments, config):
        model: PreTrainedModel = auto_class.from_pretrained(
            arguments.model_name_or_path,
            config=config,
            dtype=arguments.torch_dtype,
            attn_implementation=arguments.attn_implementation,
            quantization_config=quantization_config(arguments, config if is_sharded else None, kept),
            device_map=arguments.device_map or ({"": device} if has_own_device else None),
            ignore_mismatched_sizes=_gets_other_head(arguments),
            **arguments.hub_options,
        )
    if getattr(model, "is_quantized", False):
        keep_packing(model)
        check_kernels(model)
    return model


def load_written(arguments: LoadArguments, directory: str | Path) -> PreTrainedModel:
    """Load a model from a directory with plain transformers."""
    model: PreTrainedModel = AUTO_CLASSES[arguments.task].from_pretrained(
        directory, attn_implementation=arguments.attn_implementation, trust_remote_code=arguments.trust_remote_code
    )
    return model


def _gets_other_head(arguments: LoadArguments) -> bool:
    """Tell whether to ignore the head in the checkpoint, because a new one is trained or the adapter contains one."""
    adapter = getattr(arguments, "adapter_name_or_path", None)
    if arguments.task is not TaskType.SEQ_CLS or adapter is None:
        return getattr(arguments, NEW_HEAD, False)
    return bool(getattr(read_adapter(adapter, arguments.task), "modules_to_save", None))


@contextlib.contextmanager
def _naming_other_heads(arguments: LoadArguments, config: PreTrainedConfig) -> Iterator[None]:
    """If a classifier's head has another number of labels, name the flag that replaces it."""
    try:
        yield
    except RuntimeError as error:
        if arguments.task is not TaskType.SEQ_CLS or NEW_HEAD not in str(error):
            raise
        raise ValueError(
            f"The head of --model_name_or_path {arguments.model_name_or_path} is for another number of labels than "
            f"the {config.num_labels} of the task. Give --{NEW_HEAD} to train a new head."
        ) from error


def heads_in(model: PreTrainedModel, task: TaskType) -> list[str]:
    """Return the names of a classifier's modules outside its base model. These are trained, saved and not quantised.

    For a language model there are none, because its head is pretrained.
    """
    if task is TaskType.CAUSAL_LM:
        return []
    beside = [(name, child) for name, child in model.named_children() if name != model.base_model_prefix]
    return [name for name, child in beside if any(True for _ in child.parameters())]


def compute_in_fp32(head: torch.nn.Module) -> None:
    """Keep weights, input and output of a fully trained head in fp32, also under autocast.

    If an engine or an evaluation casts the whole model to half precision, the head computes in half precision.
    """
    head.to(torch.float32)
    head.register_forward_pre_hook(_leave_autocast)
    head.register_forward_hook(_return_to_autocast, always_call=True)


def _leave_autocast(head: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    head.left_autocast = torch.autocast(inputs[0].device.type, enabled=False)
    head.left_autocast.__enter__()
    dtype = next(head.parameters()).dtype
    return tuple(each.to(dtype) for each in inputs)


def _return_to_autocast(head: Any, _inputs: Any, _output: Any) -> None:
    head.left_autocast.__exit__(None, None, None)


def shards_weights() -> bool:
    """Tell whether FSDP or ZeRO-3 will shard the weights over ranks."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" or is_deepspeed_zero3_enabled()


def quantization_config(
    arguments: LoadArguments, sharded: PreTrainedConfig | None = None, kept: Sequence[str] = ()
) -> BitsAndBytesConfig | None:
    """Return the quantisation settings for bitsandbytes; None if the model is not quantised.

    Args:
        sharded: Configuration of a model that FSDP or ZeRO-3 will shard. They only shard floats, so its 4-bit weights
            are stored in the dtype of the other weights.
        kept: Modules not to quantise, in addition to the output layer of a language model.
    """
    skipped = list(kept) or None
    if arguments.load_in_8bit:
        return BitsAndBytesConfig(
            load_in_8bit=True,
            llm_int8_enable_fp32_cpu_offload=arguments.llm_int8_enable_fp32_cpu_offload,
            llm_int8_skip_modules=skipped,
        )
    if arguments.load_in_4bit:
        dtype = arguments.torch_dtype if arguments.torch_dtype != "auto" else getattr(sharded, "dtype", None)
        if sharded is not None and dtype is None:
            raise ValueError("--load_in_4bit under FSDP needs --torch_dtype: the model's configuration has no dtype.")
        return BitsAndBytesConfig(
            load_in_4bit=True,
            llm_int8_skip_modules=skipped,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, arguments.bnb_4bit_compute_dtype),
            bnb_4bit_quant_storage=dtype if sharded is not None else torch.uint8,
        )
    return None


def keep_packing(model: PreTrainedModel) -> None:
    """Prevent bitsandbytes from repacking 4-bit weights at the first evaluation on a CPU.

    Repacking rounds their scales, so that training would continue with changed weights. It fails if a layer's input
    size is not a multiple of 64.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def lora_config(arguments: ModelArguments, model: PreTrainedModel, heads: Sequence[str] = ()) -> LoraConfig:
    settings: Any = arguments  # of the LoRA settings, only the targets may still be None
    targets = settings.lora_target_modules
    if targets is None:
        targets = usual_targets(arguments, model)
    elif targets == ["all-linear"]:
        targets = "all-linear"
    return LoraConfig(
        task_type=arguments.task,
        modules_to_save=[head for head in heads if head not in HEADS_OF_PEFT] or None,
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        exclude_modules=(targets == "all-linear" and linear_routers(model)) or None,
    )


def usual_targets(arguments: ModelArguments, model: PreTrainedModel) -> list[str] | str:
    """Return the layers to adapt by default; for mixtures of experts only those of the attention.

    PEFT adapts a stack of experts as a parameter, without dropout, and reads the names of MLP layers as experts.
    """
    usual = set(arguments.usual_targets)
    beside = layers_beside_experts(model, model.get_output_embeddings())
    if beside is None:
        names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        return list(arguments.usual_targets) if names >= usual else "all-linear"
    beside -= set(LLAMA_MLP)
    return sorted(beside & usual if beside >= {"q_proj", "v_proj"} else beside)


def describe_model(model: PreTrainedModel | PeftModel, adapter: str | None = None) -> list[str]:
    """Return one line each about trainable, quantised and offloaded weights, as far as there are any.

    Args:
        adapter: The trained adapter that training starts from, if any.
    """
    parameters = list(model.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    total = model.num_parameters() if not isinstance(model, PeftModel) else model.get_nb_trainable_parameters()[1]
    lines = [f"trainable: {trainable:,} of {total:,} parameters ({trainable / total:.2%})"]
    if adapter is not None and isinstance(model, PeftModel):
        config: Any = model.peft_config["default"]
        lines.append(f"adapter: starts from {adapter}, r {config.r}, alpha {config.lora_alpha}")
    kinds = Counter(QUANTISED[name] for parameter in parameters if (name := type(parameter).__name__) in QUANTISED)
    if kinds:
        dtypes = Counter(
            str(parameter.dtype).removeprefix("torch.")
            for parameter in parameters
            if not parameter.requires_grad and parameter.dim() > 1 and type(parameter).__name__ not in QUANTISED
        )
        kept = ", ".join(f"{count} in {dtype}" for dtype, count in dtypes.items()) or "none"
        quantised = ", ".join(f"{count} matrices in {kind}" for kind, count in kinds.items())
        experts = [each for module in model.modules() if holds_stack(module) for each in module.parameters(False)]
        share = sum(each.numel() for each in experts) / total
        of_experts = f"; experts, {share:.0%} of the weights, are not quantised" if experts else ""
        lines.append(f"quantised: {quantised}; frozen matrices not quantised: {kept}{of_experts}")
    placed = Counter(str(device) for device in getattr(model, "hf_device_map", {}).values())
    offloaded = {device: count for device, count in placed.items() if device in ("cpu", "disk")}
    if offloaded and len(placed) > 1:
        lines.append("offloaded: " + ", ".join(f"{count} modules to {device}" for device, count in offloaded.items()))
    return lines
