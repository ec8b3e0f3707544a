"""Flags that choose a model, its quantisation and its adapter."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import LoraConfig, PeftType, TaskType

from ..data.demo import DEMO_MODEL
from ..records.errors import refuse_below
from .adapters import FLAG, base_of, read_adapter

LLAMA_MLP = ("gate_proj", "up_proj", "down_proj")
LLAMA_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", *LLAMA_MLP)


@dataclass
class LoadArguments:
    """Which model to load, and how.

    Attributes:
        task: The task that the model is for.
    """

    task: ClassVar[TaskType] = TaskType.CAUSAL_LM

    model_name_or_path: str = field(
        default="",
        metadata={
            "help": "A model: id on the Hub, directory, or demo, a tiny LLaMA. Default: demo, or the base model of "
            "the adapter, if one is given."
        },
    )
    config_name: str | None = field(default=None, metadata={"help": "Configuration. Default: the model's."})
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer. Default: the adapter's if it has one, else the model's."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    torch_dtype: str = field(
        default="auto",
        metadata={
            "help": "Precision of the weights: auto, bfloat16, float16, float32. auto: as in the checkpoint.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
            "aliases": ["--dtype"],
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Attention implementation, e.g. sdpa or flash_attention_2. Default: chosen by transformers."
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code from the model's repository. Only for authors you trust."}
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantise the frozen model to 8 bit (LLM.int8)."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantise the frozen model to 4 bit (nf4)."})
    bnb_4bit_compute_dtype: str = field(
        default="bfloat16",
        metadata={"help": "Precision for computing 4-bit layers.", "choices": ["bfloat16", "float16", "float32"]},
    )
    llm_int8_enable_fp32_cpu_offload: bool = field(
        default=False,
        metadata={
            "help": "With --load_in_8bit and --device_map: keep layers that do not fit on the GPU on the CPU in fp32."
        },
    )
    device_map: str | None = field(
        default=None,
        metadata={"help": "auto spreads the model of one process over all devices. Default: one device per process."},
    )

    def __post_init__(self) -> None:
        if self.model_name_or_path in ("", "demo"):
            self.model_name_or_path = str(DEMO_MODEL)
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("--load_in_8bit and --load_in_4bit cannot be used together.")
        if self.llm_int8_enable_fp32_cpu_offload and not (self.load_in_8bit and self.device_map):
            raise ValueError("--llm_int8_enable_fp32_cpu_offload needs --load_in_8bit and --device_map auto.")
        if self.device_map == "auto" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(
                "--device_map auto spreads one model over all devices, but several processes were started. Leave it "
                "out, so that each process loads the model on its own device."
            )

    @property
    def is_quantised(self) -> bool:
        return self.load_in_8bit or self.load_in_4bit

    @property
    def hub_options(self) -> dict[str, Any]:
        return {"revision": self.model_revision, "trust_remote_code": self.trust_remote_code}


@dataclass
class AdaptedArguments(LoadArguments):
    """Which model and which adapter to load."""

    adapter_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A LoRA adapter for the model: id on the Hub, or directory. Training continues from it.",
            "aliases": ["--adapter"],
        },
    )

    def __post_init__(self) -> None:
        if self.adapter_name_or_path is not None:
            adapter = read_adapter(self.adapter_name_or_path, self.task)
            if not self.model_name_or_path:
                self.model_name_or_path = base_of(self.adapter_name_or_path, adapter)
                if adapter.revision and self.model_revision == "main":
                    self.model_revision = adapter.revision
        super().__post_init__()


@dataclass
class AdaptedClassifierArguments(AdaptedArguments):
    """Which classifier and which adapter to load."""

    task: ClassVar[TaskType] = TaskType.SEQ_CLS


@dataclass
class ModelArguments(AdaptedArguments):
    """Which model to fine-tune, and how. LoRA settings that are None are taken from the adapter, or the defaults."""

    lora_defaults: ClassVar[dict[str, Any]] = {"lora_r": 8, "lora_alpha": 32, "lora_dropout": 0.1}
    usual_targets: ClassVar[tuple[str, ...]] = LLAMA_PROJECTIONS

    use_lora: bool = field(default=True, metadata={"help": "Train a LoRA adapter; --no_use_lora trains all weights."})
    lora_r: int | None = field(
        default=None, metadata={"help": "Rank of the adapter. Default: 8, or that of --adapter_name_or_path."}
    )
    lora_alpha: int | None = field(
        default=None,
        metadata={
            "help": "Scale of the adapter: its output is multiplied by alpha / r. Default: 32, or that of "
            "--adapter_name_or_path."
        },
    )
    lora_dropout: float | None = field(
        default=None,
        metadata={"help": "Dropout on the adapter's input. Default: 0.1, or that of --adapter_name_or_path."},
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Layers to adapt, by the end of their names, or all-linear. Default: those of "
            "--adapter_name_or_path; else attention and MLP of LLaMA-like models, attention only of mixtures of "
            "experts, all-linear for others."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.is_quantised and not self.use_lora:
            raise ValueError("Quantised weights cannot be trained: --load_in_8bit and --load_in_4bit need --use_lora.")
        if self.adapter_name_or_path is not None:
            self._follow(self.adapter_name_or_path)
        for flag, default in self.lora_defaults.items():
            if getattr(self, flag) is None:
                setattr(self, flag, default)
        if not 0 <= (self.lora_dropout or 0) < 1:
            raise ValueError(f"--lora_dropout must be in [0, 1), got {self.lora_dropout}.")
        refuse_below(self, {"lora_r": 1})

    def _follow(self, adapter: str) -> None:
        """Take over the settings of an adapter.

        Raises:
            ValueError: It is not a LoRA adapter, or a flag contradicts it.
        """
        config = read_adapter(adapter, self.task)
        if not self.use_lora:
            advice = (
                "" if self.task is TaskType.SEQ_CLS else " Merge the adapter into its base model with abr export, "
            )
            advice += "and give the result as --model_name_or_path." if advice else ""
            raise ValueError(f"--use_lora false cannot be used with {FLAG} {adapter}.{advice}")
        if not isinstance(config, LoraConfig):
            raise ValueError(
                f"{FLAG} {adapter} is of the kind {PeftType(config.peft_type).value}, but only LoRA can be trained."
            )
        targets = config.target_modules or []
        own = {
            "lora_r": config.r,
            "lora_alpha": config.lora_alpha,
            "lora_target_modules": [targets] if isinstance(targets, str) else sorted(targets),
        }
        for flag, value in own.items():
            given = getattr(self, flag)
            if (sorted(given) if isinstance(given, list) else given) not in (None, value):
                shown = [" ".join(map(str, each)) if isinstance(each, list) else each for each in (given, value)]
                raise ValueError(
                    f"--{flag} {shown[0]} contradicts {FLAG} {adapter}, which has {shown[1]}: leave it out."
                )
            setattr(self, flag, value)
        if self.lora_dropout is None:
            self.lora_dropout = config.lora_dropout
