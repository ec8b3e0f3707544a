"""From a model name to a model that is ready to fine-tune: base weights, quantisation, LoRA."""

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
"""Heads that PEFT trains and saves by itself where an adapter is for classification."""

NEW_HEAD = "ignore_mismatched_sizes"
"""The flag of classifiers for a head that does not fit."""

QUANTISED = {"Params4bit": "4-bit", "Int8Params": "8-bit"}

AUTO_CLASSES: dict[TaskType, Any] = {
    TaskType.CAUSAL_LM: AutoModelForCausalLM,
    TaskType.SEQ_CLS: AutoModelForSequenceClassification,
}


def load_config(arguments: LoadArguments, **settings: Any) -> PreTrainedConfig:
    """Load the model's configuration: cheap, and enough to check the data against.

    Args:
        settings: What is to be otherwise in it.
    """
    flag, name = _named(arguments, "config_name")
    if Path(name, "adapter_config.json").exists() and not list(Path(name).glob("model*.safetensors")):
        raise ValueError(
            f"{flag} {name} is an adapter, not a model: give the model that it was trained on, and this as {FLAG}."
        )
    try:
        config = AutoConfig.from_pretrained(name, **arguments.hub_options, **settings)
    except (OSError, ValueError) as error:
        adapter = getattr(arguments, "adapter_name_or_path", None)
        if adapter is not None and name == read_adapter(adapter, arguments.task).base_model_name_or_path:
            name += f", which {FLAG} {adapter} was trained on,"
        raise ValueError(f"{flag} {name} cannot be loaded: {one_line(error)}") from error
    if arguments.task is TaskType.CAUSAL_LM:
        refuse_non_causal(config, f"{flag} {name}")
    return config


def refuse_non_causal(config: PreTrainedConfig, origin: str) -> None:
    """Refuse a model whose tokens see those after them: as a causal language model it would load, and be nonsense.

    Args:
        origin: The flag that named it, for messages.

    Raises:
        ValueError: It is an encoder, or an encoder and a decoder, or has no head of a language model.
    """
    has_remote_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if config.is_encoder_decoder:
        kind = "a model of encoder and decoder"
    elif sees_all_tokens(config):
        kind = "a masked language model: its tokens see those that they are to predict"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not has_remote_code:
        kind = "of another kind"
    else:
        return
    named = ", ".join([config.model_type, *(config.architectures or [])])
    raise ValueError(f"{origin} is no causal language model but {kind} ({named}). Give one such as LLaMA or GPT-2.")


def sees_all_tokens(config: PreTrainedConfig) -> bool:
    """Tell whether a model for masked language modelling has not been made a decoder."""
    is_masked = config.model_type in (*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation", "xlnet")
    return is_masked and not (getattr(config, "is_decoder", False) or getattr(config, "causal", False))


def load_tokenizer(arguments: LoadArguments) -> PreTrainedTokenizerBase:
    """Load the tokenizer, of an adapter its own if it has one; a missing pad token becomes the end-of-text token."""
    flag, name = _named(arguments, "tokenizer_name")
    options = arguments.hub_options
    adapter = getattr(arguments, "adapter_name_or_path", None)
    if adapter is not None and not arguments.tokenizer_name and get_tokenizer_config(adapter):
        flag, name, options = FLAG, adapter, {**options, "revision": "main"}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag} {name} has no tokenizer: {one_line(error)}") from error
    if tokenizer.eos_token is None and arguments.task is TaskType.CAUSAL_LM:
        logger.warning_once(
            f"The tokenizer of {flag} {name} has no end-of-text token: documents follow one another without a mark "
            "between them."
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
    """Load the base model, quantise it, and attach a LoRA adapter, new or trained before, as the arguments ask.

    Args:
        device: Where a quantised model is put; any other stays on the CPU until Trainer moves it.
        activation_checkpointing: Whether it will be trained with activation checkpointing.

    Raises:
        ValueError: Model, adapter, tokenizer or flags do not fit each other.
    """
    model = load_base(arguments, config, device)
    is_sharded = shards_weights()
    adapter = arguments.adapter_name_or_path
    if adapter is None and len(tokenizer) > embeddings_in(model):
        # Only then: an adapter trained on resized embeddings carries the whole table.
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
        model.enable_input_require_grads()  # or no gradient reaches the adapters past a checkpoint
    if adapter is None:
        # DeepSpeed gathers what ZeRO-3 split into a buffer of one dtype.
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
            f"base have embeddings of {embeddings_in(adapted)}. Give --tokenizer_name of what it was trained with."
        )
    return adapted


def _without_adapter_because(error: Exception, arguments: ModelArguments) -> str:
    targets = " ".join(arguments.lora_target_modules or ["(default)"])
    if "does not work with lora_dropout" in str(error):
        reason = "experts are adapted without dropout: give --lora_dropout 0, or name no layers of experts"
    else:
        reason = one_line(error)
    return f"--lora_target_modules {targets} cannot be adapted: {reason.rstrip('.')}."


def load_base(arguments: LoadArguments, config: PreTrainedConfig, device: str | torch.device) -> PreTrainedModel:
    """Load a base model, quantised as the arguments ask.

    Args:
        device: Where a quantised model is put; any other stays on the CPU.
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
    """Load a model that was written to a directory, as anybody would."""
    model: PreTrainedModel = AUTO_CLASSES[arguments.task].from_pretrained(
        directory, attn_implementation=arguments.attn_implementation, trust_remote_code=arguments.trust_remote_code
    )
    return model


def _gets_other_head(arguments: LoadArguments) -> bool:
    """Tell whether the head of a checkpoint is not wanted: one is trained anew, or comes with the adapter."""
    adapter = getattr(arguments, "adapter_name_or_path", None)
    if arguments.task is not TaskType.SEQ_CLS or adapter is None:
        return getattr(arguments, NEW_HEAD, False)
    return bool(getattr(read_adapter(adapter, arguments.task), "modules_to_save", None))


@contextlib.contextmanager
def _naming_other_heads(arguments: LoadArguments, config: PreTrainedConfig) -> Iterator[None]:
    """Say which flag makes a new head where a classifier has one for another number of labels."""
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
    """Return what a classifier has beside its base: made anew, so it must be trained, saved, and never be quantised.

    A language model has none: its head was trained with the others.
    """
    if task is TaskType.CAUSAL_LM:
        return []
    beside = [(name, child) for name, child in model.named_children() if name != model.base_model_prefix]
    return [name for name, child in beside if any(True for _ in child.parameters())]


def compute_in_fp32(head: torch.nn.Module) -> None:
    """Let a head that is trained as a whole have its weights, its input and its output in fp32, autocast or not.

    An engine or an evaluation that casts whole models to halves casts it, too, and then it computes in these.
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
    """Tell whether FSDP or ZeRO-3 will split the weights over ranks."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" or is_deepspeed_zero3_enabled()


def quantization_config(
    arguments: LoadArguments, sharded: PreTrainedConfig | None = None, kept: Sequence[str] = ()
) -> BitsAndBytesConfig | None:
    """Return how bitsandbytes shall quantise.

    Args:
        sharded: Configuration of a model that FSDP or ZeRO-3 will split. They split floats only: its four-bit weights
            are packed into the dtype of the others.
        kept: Modules to leave as they are, beside the output layer of a language model.
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
            raise ValueError("--load_in_4bit under FSDP needs --torch_dtype: the model's configuration names none.")
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
    """Keep bitsandbytes from repacking 4-bit weights at the first evaluation on a CPU.

    That rounds their scales, so that training goes on with another model, and fails where a layer's input is no
    multiple of the block of 64.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def lora_config(arguments: ModelArguments, model: PreTrainedModel, heads: Sequence[str] = ()) -> LoraConfig:
    settings: Any = arguments  # in which nothing of LoRA is None any more, but the targets
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
    """Return the layers to adapt where none are named; of mixtures of experts those of the attention alone.

    PEFT adapts a stack of experts as a parameter, without dropout, and takes the names of an MLP's layers for those of
    experts.
    """
    usual = set(arguments.usual_targets)
    beside = layers_beside_experts(model, model.get_output_embeddings())
    if beside is None:
        names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        return list(arguments.usual_targets) if names >= usual else "all-linear"
    beside -= set(LLAMA_MLP)
    return sorted(beside & usual if beside >= {"q_proj", "v_proj"} else beside)


def describe_model(model: PreTrainedModel | PeftModel, adapter: str | None = None) -> list[str]:
    """Return a line each on what is trainable and, where there is any, what is quantised and offloaded.

    Args:
        adapter: The adapter that it starts from, if that is no new one.
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
        lines.append(f"quantised: {quantised}; frozen matrices left as they are: {kept}{of_experts}")
    placed = Counter(str(device) for device in getattr(model, "hf_device_map", {}).values())
    offloaded = {device: count for device, count in placed.items() if device in ("cpu", "disk")}
    if offloaded and len(placed) > 1:
        lines.append("offloaded: " + ", ".join(f"{count} modules to {device}" for device, count in offloaded.items()))
    return lines
