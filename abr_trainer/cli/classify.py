"""Fine-tune a sentence classifier with adaptive batch repetition, on GLUE tasks or your own data.

    abr classify --model_name_or_path demo --task_name demo --num_train_epochs 2 \
        --learning_rate 3e-3 --use_cpu --do_train --do_eval --do_predict --output_dir runs/reports
    abr classify --model_name_or_path meta-llama/Meta-Llama-3-8B --task_name mrpc --prompt perfect \
        --load_in_4bit --bf16 --gradient_checkpointing --load_best_model_at_end \
        --do_train --do_eval --do_predict --output_dir runs/mrpc
    torchrun --nproc_per_node 8 -m abr_trainer classify config.yaml --prompt "Do these two agree?"
"""

from __future__ import annotations

from safetensors import SafetensorError
from transformers import DataCollatorWithPadding

from ..classification.records import predict, recalled_flags, take_up_classes
from ..classification.sentences import SentenceArguments, load_sentences, tokenize_sentences
from ..classification.trainer import (
    DEFAULT_LENGTH,
    ClassifierArguments,
    ClassifierCallback,
    ClassifierConfig,
    ClassifierTrainer,
    Judge,
    check_order,
    describe_rows,
    labels_in_config,
    score_lines,
    score_of,
    show_scores,
)
from ..data.context import fit_context
from ..models.loading import describe_model, load_config, load_model, load_tokenizer
from ..records.errors import exit_statuses, one_line_errors
from ..training.config import checkpoints_activations
from ..training.engines import leave_ranks
from ..training.identity import asks_for_rows
from ..training.summary import kept_step
from .command_line import parse_arguments
from .header import describe_data
from .job import begin, carry_out, command_of, push_result, run_alone, show_end, wanted_splits
from .run_directory import check_output_dir, find_checkpoint

ARGUMENTS = (ClassifierArguments, SentenceArguments, ClassifierConfig)
"""Dataclasses for the command line."""


def main(argv: list[str] | None = None) -> dict[str, float]:
    results = run(argv)
    leave_ranks()
    return results


def run(argv: list[str] | None) -> dict[str, float]:
    return run_alone(
        argv, lambda argv: parse_arguments(ARGUMENTS, argv, recalled_flags(ARGUMENTS, argv)), train_and_evaluate
    )


def train_and_evaluate(
    argv: list[str] | None, model_args: ClassifierArguments, data_args: SentenceArguments, args: ClassifierConfig
) -> dict[str, float]:
    with one_line_errors(ValueError):
        splits = wanted_splits(args)
        if data_args.merge_validation and (args.do_eval or not args.do_train):
            raise ValueError("--merge_validation trains on the validation rows. Give --do_train, but not --do_eval.")
        checkpoint = find_checkpoint(args) if args.do_train else None
        check_output_dir(args, model_args.model_name_or_path, model_args.adapter_name_or_path)
        if checkpoint is not None:
            take_up_classes(data_args, checkpoint)
        with args.main_process_first(desc="preparing the data"):
            sentences = load_sentences(data_args, splits, with_sources=asks_for_rows(args))
        task = sentences.task
        data_args.settle(task)
        args.settle(task)
        check_order(model_args, task, args.do_train)
        config, tokenizer = load_config(model_args, **labels_in_config(task)), load_tokenizer(model_args)
        data_args.max_seq_length = fit_context("max_seq_length", data_args.max_seq_length, DEFAULT_LENGTH, config)
        rows = tokenize_sentences(sentences, tokenizer, data_args.max_seq_length)

    begin(args)
    with one_line_errors(ValueError, OSError, ImportError, RuntimeError, SafetensorError):
        model = load_model(model_args, config, tokenizer, args.device, checkpoints_activations(args))
        trainer = ClassifierTrainer(
            model=model,
            args=args,
            train_dataset=rows.get("train"),
            eval_dataset=rows.get("validation"),
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=Judge(task, data_args),
            callbacks=[ClassifierCallback((model_args, data_args, args))],
        )

    def test() -> dict[str, float]:
        found = [predict(trainer, rows[split], split, task) for split in rows if split.startswith("test")]
        return {name: value for metrics in found for name, value in metrics.items()}

    score = score_of(task)
    results = carry_out(
        trainer,
        checkpoint,
        command_of(argv, "classify"),
        (model_args, data_args),
        [
            *describe_model(model, model_args.adapter_name_or_path),
            describe_data(data_args, sentences.splits, "row", {}),
            *describe_rows(sentences),
        ],
        test,
        {f"eval{split.removeprefix('validation')}": rows[split] for split in rows if split == "validation_mm"},
        score,
    )
    if trainer.is_world_process_zero():
        if args.do_train:
            show_scores(trainer.state, task, kept_step(args, trainer.state))
        show_end(trainer, score_lines(trainer.state.log_history, results, task))
    push_result(trainer)
    return results


if __name__ == "__main__":
    with exit_statuses():
        main()
