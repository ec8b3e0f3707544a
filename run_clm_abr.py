"""Fine-tune a causal language model with adaptive batch repetition.

    abr train --dataset_name demo --do_train --do_eval --eval_on_start --output_dir runs/demo
    abr train --model_name_or_path huggyllama/llama-7b --load_in_8bit --dataset_name wikitext \
        --repeat_scheduler abr --max_passes 2000 --bf16 --do_train --do_eval --output_dir runs/wikitext
    abr train --adapter_name_or_path runs/wikitext --do_train --do_eval --output_dir runs/further
    torchrun --nproc_per_node 8 -m abr_trainer train config.yaml --learning_rate 3e-4

`abr train` calls `main` below; `python run_clm_abr.py` does the same.
"""

from __future__ import annotations

if __name__ == "__main__":  # as `abr` does, before what takes long to import
    from abr_trainer.cli.noise import filter_noise, say_what_is_loaded

    filter_noise()
    say_what_is_loaded()

from functools import partial

from safetensors import SafetensorError
from transformers import default_data_collator

from abr_trainer.cli.command_line import parse_arguments
from abr_trainer.cli.header import describe_blocks
from abr_trainer.cli.job import begin, carry_out, command_of, push_result, run_alone, show_results, wanted_splits
from abr_trainer.cli.run_directory import check_output_dir, find_checkpoint
from abr_trainer.data.arguments import DataArguments
from abr_trainer.data.blocks import choose_block_size, load_blocks
from abr_trainer.data.prompts import prompts_in
from abr_trainer.models.arguments import ModelArguments
from abr_trainer.models.loading import describe_model, load_config, load_model, load_tokenizer
from abr_trainer.perplexity.measurement import EvaluationArguments, prepare_measurement
from abr_trainer.records.errors import exit_statuses, one_line_errors
from abr_trainer.training.config import ABRConfig, checkpoints_activations
from abr_trainer.training.engines import leave_ranks
from abr_trainer.training.identity import asks_for_rows
from abr_trainer.training.log_table import Score
from abr_trainer.training.samples import GenerationArguments, follow_text
from abr_trainer.training.tracking import PerplexityCallback
from abr_trainer.training.trainer import ABRTrainer

ARGUMENTS = (ModelArguments, DataArguments, EvaluationArguments, GenerationArguments, ABRConfig)
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
    data_args: DataArguments,
    eval_args: EvaluationArguments,
    text_args: GenerationArguments,
    args: ABRConfig,
) -> dict[str, float]:
    with one_line_errors(ValueError):
        if args.metric_for_best_model == "loss":  # Trainer leaves NaN and infinite losses out of the evaluation loss
            args.metric_for_best_model = eval_args.metric
        if eval_args.eval_definition and not args.do_eval:
            raise ValueError("--eval_definition needs --do_eval.")
        splits = wanted_splits(args)
        text_args.fit(args)
        if args.do_train and data_args.is_streamed and args.max_steps <= 0:
            raise ValueError(
                "The length of a streamed data set is unknown. Give --max_steps, --max_passes or --max_seconds."
            )
        if args.do_train and data_args.primer_file:
            if not args.primer_batches:
                raise ValueError("--primer_file needs --primer_batches, the number of batches to train on.")
            splits.append("primer")
        checkpoint = find_checkpoint(args) if args.do_train else None
        check_output_dir(args, model_args.model_name_or_path, model_args.adapter_name_or_path)
        config, tokenizer = load_config(model_args), load_tokenizer(model_args)
        block_size = choose_block_size(data_args, config)
        with args.main_process_first(desc="preparing the data"):
            vocabulary = max(len(tokenizer), getattr(config.get_text_config(), "vocab_size", 0))
            wants_sources = asks_for_rows(args)
            blocks = load_blocks(data_args, tokenizer, block_size, splits, args.seed, vocabulary, wants_sources)
            measurement = prepare_measurement(
                eval_args, data_args, tokenizer, block_size, args.eval_batch_size, args.distributed_state
            )

    begin(args)
    with one_line_errors(ValueError, OSError, ImportError, RuntimeError, SafetensorError):
        model = load_model(model_args, config, tokenizer, args.device, checkpoints_activations(args))
        trainer = ABRTrainer(
            model=model,
            args=args,
            train_dataset=blocks.get("train"),
            eval_dataset=blocks.get("validation"),
            primer_dataset=blocks.get("primer"),
            processing_class=tokenizer,
            data_collator=default_data_collator,
            callbacks=[PerplexityCallback(f"eval_{eval_args.metric}", prints=False)],
            eval_measurement=measurement,
        )
        follow_text(trainer, text_args, lambda split, count: prompts_in(blocks[split], tokenizer, count, block_size))
    command = command_of(argv, "train")
    described = [
        *describe_model(model, model_args.adapter_name_or_path),
        describe_blocks(blocks, block_size, data_args),
    ]
    score = Score(f"eval_{eval_args.metric}", eval_args.metric.replace("_", " "))

    def test() -> dict[str, float]:
        return trainer.evaluate(blocks["test"], metric_key_prefix="test")

    arguments = (model_args, data_args, eval_args, text_args)
    results = carry_out(trainer, checkpoint, command, arguments, described, test, score=score)
    show_results(trainer, results, score)
    push_result(trainer)
    return results


if __name__ == "__main__":
    with exit_statuses():
        main()
