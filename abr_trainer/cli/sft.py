"""Fine-tune on chats or instructions with adaptive batch repetition, using TRL's SFTTrainer.

    abr sft --dataset_name demo --chat_template alpaca --learning_rate 2e-3 --use_cpu \
        --do_train --do_eval --output_dir runs/chat
    abr sft config.yaml --learning_rate 1e-4
    abr sft --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --train_file chats.jsonl --max_passes 2000 \
        --do_train --do_eval --output_dir runs/chat
    torchrun --nproc_per_node 8 -m abr_trainer sft config.yaml --packing

Rows may be messages, ShareGPT conversations, prompts with completions, instructions with outputs, or texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging
from transformers.utils.import_utils import is_torch_bf16_gpu_available

from ..data.arguments import ChatArguments
from ..data.chat_tokens import (
    ChatRows,
    Encoder,
    Tokenised,
    choose_max_length,
    load_chats,
    prompts_of_chats,
    tokenise_chats,
)
from ..data.prompts import Prompt
from ..data.templates import check_template, find_template, marks_assistant
from ..integrations.trl import ABRSFTConfig, ABRSFTTrainer, learns_to_stop, marked_template
from ..models.arguments import ModelArguments
from ..models.loading import describe_model, load_config, load_model, load_tokenizer
from ..records.errors import exit_statuses, one_line_errors
from ..report.text import share
from ..training.config import ABRConfig, checkpoints_activations
from ..training.engines import leave_ranks
from ..training.identity import asks_for_rows
from ..training.log_table import Score
from ..training.samples import GenerationArguments, follow_text
from ..training.tracking import PerplexityCallback
from .command_line import parse_arguments
from .header import describe_data
from .job import begin, carry_out, command_of, push_result, run_alone, show_results, wanted_splits
from .run_directory import check_output_dir, find_checkpoint

logger = logging.get_logger(__name__)


OF_ABR: dict[str, Any] = {
    name: field(default=known.default, metadata=known.metadata)
    for name, known in ABRConfig.__dataclass_fields__.items()
    if name in ("eval_on_start", "eval_strategy", "report_to")
}
"""Fields of `ABRConfig` whose defaults TRL's class replaces by those of `TrainingArguments`."""


@dataclass
class SFTJobConfig(ABRSFTConfig):
    """`ABRSFTConfig` with the defaults of our other verbs, and without TRL's fields for data and model."""

    eval_on_start: bool | None = OF_ABR["eval_on_start"]  # type: ignore[assignment]
    eval_strategy: str | None = OF_ABR["eval_strategy"]  # type: ignore[assignment]
    report_to: None | str | list[str] = OF_ABR["report_to"]  # noqa: RUF036  # HfArgumentParser takes the second type
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Use bf16 mixed precision. Default: true on a GPU that supports it.",
            "nargs": "?",  # HfArgumentParser sets it only for a flag whose default is not None
            "const": True,
        },
    )
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Save memory by computing activations twice. Default: true, as in TRL.",
            "nargs": "?",
            "const": True,
        },
    )
    assistant_only_loss: bool = field(default=False, init=False)
    chat_template_path: str | None = field(default=None, init=False)
    completion_only_loss: bool | None = field(default=None, init=False)
    dataset_kwargs: dict[str, Any] | str | None = field(default=None, init=False)
    dataset_num_proc: int | None = field(default=None, init=False)
    dataset_text_field: str = field(default="text", init=False)
    max_length: int | None = field(default=None, init=False)
    model_init_kwargs: dict[str, Any] | str | None = field(default=None, init=False)
    pad_token: str | None = field(default=None, init=False)
    truncation_mode: str = field(default="keep_start", init=False)
    trust_remote_code: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        if self.activation_checkpointing is None:  # TRL sets the old name, for which transformers then warns
            self.activation_checkpointing = self.gradient_checkpointing
        self.gradient_checkpointing = self.activation_checkpointing
        super().__post_init__()


ARGUMENTS = (ModelArguments, ChatArguments, GenerationArguments, SFTJobConfig)
"""Dataclasses for the command line."""


def main(argv: list[str] | None = None) -> dict[str, float]:
    results = run(argv)
    leave_ranks()
    return results


def run(argv: list[str] | None) -> dict[str, float]:
    return run_alone(argv, partial(parse_arguments, ARGUMENTS), train_and_evaluate)


def train_and_evaluate(
    argv: list[str] | None,
    model_args: ModelArguments,
    data_args: ChatArguments,
    text_args: GenerationArguments,
    args: SFTJobConfig,
) -> dict[str, float]:
    with one_line_errors(ValueError):
        if args.metric_for_best_model == "loss":  # Trainer leaves NaN and infinite losses out of the evaluation loss
            args.metric_for_best_model = "perplexity"
        splits = wanted_splits(args)
        text_args.fit(args)
        checkpoint = find_checkpoint(args) if args.do_train else None
        check_output_dir(args, model_args.model_name_or_path, model_args.adapter_name_or_path)
        config, tokenizer = load_config(model_args), load_tokenizer(model_args)
        data_args.max_length = choose_max_length(data_args, config)
        take_up_tokens(tokenizer, model_args, data_args, args)
        with args.main_process_first(desc="preparing the data"):
            wants_sources = asks_for_rows(args)
            found = load_chats(data_args, splits, wants_sources)
            encoder = choose_targets(found, data_args, tokenizer)
            splits_whole = args.packing and args.packing_strategy != "bfd"
            rows = {
                split: tokenise_chats(
                    each,
                    data_args,
                    encoder,
                    data_args.max_length,
                    keeps_whole=splits_whole,
                    with_sources=wants_sources and split == "train",
                )
                for split, each in found.items()
            }
        if args.packing:  # otherwise all rows are already cut
            args.max_length = data_args.max_length

    def prompts(split: str, count: int | None) -> list[Prompt]:
        return prompts_of_chats(found[split], rows[split], encoder, data_args.max_length or 0, count)

    begin(args)
    with one_line_errors(ValueError, OSError, ImportError, RuntimeError, SafetensorError):
        model = load_model(model_args, config, tokenizer, args.device, checkpoints_activations(args))
        trainer = ABRSFTTrainer(
            model=model,
            args=args,
            train_dataset=next(iter(rows.values())).rows,  # SFTTrainer needs one even if there is no training
            eval_dataset=rows["validation"].rows if "validation" in rows else None,
            processing_class=tokenizer,
            callbacks=[PerplexityCallback("eval_perplexity", prints=False)],
        )
        follow_text(trainer, text_args, prompts)
    described = [
        *describe_model(model, model_args.adapter_name_or_path),
        describe_data(data_args, {name: each.rows for name, each in rows.items()}, "row", {}),
        *describe_chats(rows, data_args, any(each.is_chat for each in found.values())),
    ]

    def test() -> dict[str, float]:
        return trainer.evaluate(rows["test"].rows, metric_key_prefix="test")

    arguments = (model_args, data_args, text_args)
    results = carry_out(trainer, checkpoint, command_of(argv, "sft"), arguments, described, test)
    show_results(trainer, results, Score())
    push_result(trainer)
    return results


def take_up_tokens(
    tokenizer: PreTrainedTokenizerBase, model_args: ModelArguments, data_args: ChatArguments, args: SFTJobConfig
) -> None:
    """Set the tokenizer's chat template and end-of-text token according to the flags.

    Raises:
        ValueError: One of them is invalid.
    """
    if args.eos_token is not None:
        if args.eos_token not in tokenizer.get_vocab():
            raise ValueError(f"--eos_token {args.eos_token} is not in the vocabulary of {tokenizer.name_or_path}.")
        tokenizer.eos_token = args.eos_token
    if data_args.chat_template is not None:
        options = {"trust_remote_code": model_args.trust_remote_code}
        tokenizer.chat_template = find_template(data_args.chat_template, **options)
        check_template(tokenizer, f"--chat_template {data_args.chat_template}")


def choose_targets(
    found: Mapping[str, ChatRows], data_args: ChatArguments, tokenizer: PreTrainedTokenizerBase
) -> Encoder:
    """Choose the targets if no flag does, and return the encoder for the rows.

    Raises:
        ValueError: The rows do not have what a flag asks for.
    """
    first, *others = found.values()
    is_chat, has_prompts, origin = first.is_chat, first.has_prompts, first.loaded.origin
    for other in others:
        if (other.is_chat, other.has_prompts) != (is_chat, has_prompts):
            raise ValueError(
                f"{origin} holds {first.kind}, but {other.loaded.origin} holds {other.kind}, so training and "
                "evaluation would have different targets. Give rows of the same kind."
            )
    if data_args.chat_template is not None and not is_chat:
        logger.warning(f"--chat_template {data_args.chat_template} is not used: {origin} holds {first.kind}.")
    if data_args.assistant_only_loss and not is_chat:
        raise ValueError(f"--assistant_only_loss is for chats, but {origin} holds texts. Leave it out.")
    if data_args.completion_only_loss and not has_prompts:
        instead = "For chats, use --assistant_only_loss instead." if is_chat else "Leave it out."
        raise ValueError(f"--completion_only_loss: {origin} has no prompts with completions. {instead}")
    variant = None
    if is_chat and tokenizer.chat_template and not marks_assistant(tokenizer.chat_template):
        variant = marked_template(tokenizer)
    if data_args.assistant_only_loss is None:
        is_marked = variant is not None or marks_assistant(tokenizer.chat_template)
        data_args.assistant_only_loss = is_chat and not has_prompts and is_marked
    if data_args.completion_only_loss is None:
        data_args.completion_only_loss = has_prompts
    if data_args.assistant_only_loss and not tokenizer.is_fast:
        raise ValueError(
            f"--assistant_only_loss needs a fast tokenizer, but that of {tokenizer.name_or_path} is slow and has no "
            "token offsets. Give --assistant_only_loss false."
        )
    encoder = Encoder(
        tokenizer,
        variant if data_args.assistant_only_loss else None,
        data_args.assistant_only_loss,
        data_args.completion_only_loss,
    )
    if encoder.assistant_only and encoder.is_marked and not learns_to_stop(tokenizer, encoder.template):
        logger.warning(
            "The chat template does not mark the end of the assistant's turn as the assistant's, so the model may not "
            "learn to stop. Put it between {% generation %} and {% endgeneration %}."
        )
    return encoder


def describe_chats(rows: Mapping[str, Tokenised], data_args: ChatArguments, is_chat: bool) -> list[str]:
    """Return lines about the targets, and about rows that were cut."""
    split, first = next(iter(rows.items()))
    part = f"{first.targets:,} of the {first.tokens:,} {split} tokens ({share(first.targets, first.tokens)})"
    if data_args.assistant_only_loss:
        what = "the assistant's tokens"
    elif data_args.completion_only_loss:
        what = "completions"
    elif is_chat:
        what = "all tokens, including the user's messages (--assistant_only_loss: only the assistant's)"
    else:
        what = "all tokens"
    lines = [f"targets: {what}; {part}"]
    lines += [
        f"cut: {each.cut:,} of the {len(each.rows):,} {split} rows are longer than --max_length {data_args.max_length}"
        for split, each in rows.items()
        if each.cut
    ]
    return lines


if __name__ == "__main__":
    with exit_statuses():
        main()
