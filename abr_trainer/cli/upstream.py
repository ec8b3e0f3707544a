"""Flags of the scripts of transformers and TRL that users may paste, but that do not exist here."""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Collection, Sequence

SAME_HERE = {
    "keep_linebreaks": (True, "Line breaks of a text file are always kept. To leave them out, give a .jsonl file."),
    "low_cpu_mem_usage": (None, ""),
    "overwrite_cache": (None, ""),
    "pad_to_max_length": (
        False,
        "Rows are padded to the longest row of their batch, with the same results. Leave it out.",
    ),
    "save_safetensors": (True, "Weights are always saved as safetensors. Leave it out."),
    "use_bnb_nested_quant": (True, "4-bit weights are quantised twice. Leave it out."),
    "use_peft": (True, "Use --no_use_lora."),
    "use_fast_tokenizer": (True, "transformers 5 chooses the implementation of a tokenizer itself. Leave it out."),
}
"""Boolean flags for fixed behaviour: the value that is accepted (None: both, because the results are the same), and
the
message for the other value. They are accepted if a command has no flag with this name."""

LOGIN = "It could be written to logs and files. Set the environment variable HF_TOKEN, or run `hf auth login`."
FROM_SCRATCH = (
    "Training starts from a checkpoint. Save one with new weights, `AutoModelForCausalLM.from_config(config)"
    ".save_pretrained(directory)`, and give it as --model_name_or_path with --no_use_lora."
)
PLAIN_LORA = "Adapters are plain LoRA. For others, give ABRSFTTrainer a model with your adapter, in Python."
ON_CPU = "Use --use_cpu."
PRECISION = "Use --bf16 or --fp16."
COMPILE = "Use --torch_compile."

INSTEAD: dict[str, str | tuple[str, ...]] = {
    "cache_dir": "Set the environment variable HF_HOME to a directory in which to cache models and data.",
    "config_overrides": FROM_SCRATCH,
    "model_type": FROM_SCRATCH,
    "token": LOGIN,
    "use_auth_token": LOGIN,
    "push_to_hub_token": LOGIN,
    # of train, where it is a flag of classify
    "ignore_mismatched_sizes": "A language model never gets a new head. Give a checkpoint of this model.",
    "max_predict_samples": "Use --max_eval_samples, which also limits the test set.",
    "max_seq_length": ("Use --block_size.", "Use --max_length."),
    # of classify and of sft, where it is a flag of train
    "block_size": ("Use --max_seq_length.", "Use --max_length."),
    "streaming": "Rows are read before training. Leave it out.",
    "validation_split_percentage": "Give --validation_file, or --do_eval false.",
    "preprocessing_num_workers": "Rows are tokenized by one process. Leave it out.",
    # of TRL's scripts
    "bnb_4bit_quant_storage": "It is chosen by how the weights are sharded. Leave it out.",
    "bnb_4bit_quant_type": "4-bit weights are nf4. Leave it out.",
    "dataset_kwargs": "Rows are always prepared. Leave it out.",
    "dataset_streaming": "Rows are read before training. Leave it out.",
    "datasets": "Give one data set, as --dataset_name or --train_file.",
    "lora_modules_to_save": PLAIN_LORA,
    "lora_target_parameters": PLAIN_LORA,
    "lora_task_type": "The command sets it. Leave it out.",
    "model_init_kwargs": "Use --torch_dtype, --attn_implementation and --model_revision.",
    "pad_token": "The tokenizer's pad token is used, or else its end-of-text token. Leave it out.",
    "test_split_size": "Use --validation_split_percentage.",
    "truncation_mode": "Rows longer than --max_length are cut at the end. Leave it out.",
    "use_dora": PLAIN_LORA,
    "use_rslora": PLAIN_LORA,
    # gone from TrainingArguments
    "evaluation_strategy": "Use --eval_strategy.",
    "fp16_backend": PRECISION,
    "fp16_opt_level": PRECISION,
    "half_precision_backend": PRECISION,
    "group_by_length": "Use --train_sampling_strategy group_by_length.",
    "jit_mode_eval": COMPILE,
    "logging_dir": "Set the environment variable TENSORBOARD_LOGGING_DIR.",
    "no_cuda": ON_CPU,
    "per_gpu_eval_batch_size": "Use --per_device_eval_batch_size.",
    "per_gpu_train_batch_size": "Use --per_device_train_batch_size.",
    "push_to_hub_model_id": "Use --hub_model_id.",
    "push_to_hub_organization": "Use --hub_model_id organization/name.",
    "torchdynamo": COMPILE,
    "use_mps_device": "The device is found automatically. Leave it out.",
    "warmup_ratio": "Use --warmup_steps: below 1, it is a share of the run.",
}
"""What to do instead of giving a flag, if a command has no flag with this name. If there are several answers, the
first one with a flag of the command is used.
"""

TRUE = ("yes", "true", "t", "y", "1")
FALSE = ("no", "false", "f", "n", "0")
"""Words for true and false that `HfArgumentParser` accepts."""


def accepted(argv: Sequence[str], known: Collection[str]) -> list[str]:
    """Return a command line without the flags of `SAME_HERE`.

    Args:
        known: Flags of the command, with their dashes.

    Raises:
        ValueError: A flag is unknown; the message says what to use instead, or suggests a similar flag. It never
            contains the value, which may be a secret token.

    >>> accepted(["--use_fast_tokenizer", "true", "--seed", "1", "--low-cpu-mem-usage"], ["--seed"])
    ['--seed', '1']
    """
    kept: list[str] = []
    left = deque(argv)
    while left:
        argument = left.popleft()
        flag, has_value, value = argument.partition("=")
        if not flag.startswith("--") or flag == "--" or flag in known:
            kept.append(argument)
            continue
        name = flag[2:].replace("-", "_")
        is_on = name.removeprefix("no_") not in SAME_HERE or not name.startswith("no_")
        name = name if is_on else name.removeprefix("no_")
        if name not in SAME_HERE:
            raise ValueError(unknown(flag, known))
        if has_value or (left and left[0].lower() in (*TRUE, *FALSE)):
            is_on = (value if has_value else left.popleft()).lower() in TRUE
        done, reason = SAME_HERE[name]
        if done is not None and is_on is not done:
            raise ValueError(f"--{name} {str(is_on).lower()} is not supported. {reason}")
    return kept


def unknown(flag: str, known: Collection[str]) -> str:
    """Return the error message for a flag that a command does not have."""
    answers = INSTEAD.get(flag[2:].replace("-", "_"), ())
    answers = (answers,) if isinstance(answers, str) else answers
    if answers:
        fits = (each for each in answers if each.removeprefix("Use ").removesuffix(".") in known)
        return f"{flag} is not a flag here. {next(fits, answers[0])}"
    close = difflib.get_close_matches(flag, known, n=1)
    return f"Unknown flag {flag}." + (f" Did you mean {close[0]}?" if close else " See --help.")
