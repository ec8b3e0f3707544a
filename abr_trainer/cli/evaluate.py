"""Evaluate a classifier that `abr classify` trained: an adapter or a full model, in a directory or on the Hub.

    abr evaluate --adapter_name_or_path runs/reports
    abr evaluate --adapter_name_or_path runs/mrpc/checkpoint-459 --split validation
    abr evaluate --adapter_name_or_path me/mrpc --test_file mine.jsonl --output_file predictions.jsonl
    torchrun --nproc_per_node 8 -m abr_trainer evaluate --model_name_or_path runs/whole

Task, prompt, length, quantisation and precision are taken from `task.json` next to the weights; flags override them.
Data files of the training are not recorded: rows come from the Hub unless you give files.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

from safetensors import SafetensorError
from transformers import DataCollatorWithPadding

from ..classification.records import beside_earlier, predictions_file, recalled_flags, write_predictions
from ..classification.scores import logits_of
from ..classification.sentences import SentenceArguments, load_sentences, tokenize_sentences
from ..classification.trainer import (
    DEFAULT_LENGTH,
    ClassifierArguments,
    ClassifierTrainer,
    EvaluateArguments,
    Judge,
    labels_in_config,
    scores_in,
)
from ..data.context import fit_context
from ..data.demo import DEMO_MODEL
from ..models.loading import load_config, load_model, load_tokenizer
from ..records.errors import one_line_errors
from ..training.engines import leave_ranks
from ..training.failing import ending_together
from .command_line import parse_arguments

ARGUMENTS = (ClassifierArguments, SentenceArguments, EvaluateArguments)
"""Dataclasses for the command line."""

NAMES = ("--adapter_name_or_path", "--adapter", "--model_name_or_path")
"""Flags for the classifier to evaluate."""


def main(argv: list[str] | None = None) -> dict[str, float]:
    results = run(argv)
    leave_ranks()
    return results


def run(argv: list[str] | None) -> dict[str, float]:
    with (
        one_line_errors(
            ValueError, OSError, ImportError, RuntimeError, SafetensorError, when_interrupted="nothing was written"
        ),
        tempfile.TemporaryDirectory() as scratch,
        contextlib.ExitStack() as held,
    ):
        told = recalled_flags(ARGUMENTS, argv, NAMES)
        model_args, data_args, eval_args = parse_arguments(ARGUMENTS, argv, told)
        if model_args.adapter_name_or_path is None and model_args.model_name_or_path == str(DEMO_MODEL):
            raise ValueError(f"Give the classifier to evaluate, as {NAMES[0]} or {NAMES[-1]}.")
        if model_args.ignore_mismatched_sizes:
            raise ValueError(
                "--ignore_mismatched_sizes creates a new head, which must be trained before it is evaluated."
            )
        args = eval_args.as_training_arguments(scratch)
        held.enter_context(ending_together())
        with args.main_process_first(desc="preparing the data"):
            sentences = load_sentences(data_args, [eval_args.split])
        task = sentences.task
        config, tokenizer = load_config(model_args, **labels_in_config(task)), load_tokenizer(model_args)
        length = fit_context("max_seq_length", data_args.max_seq_length, DEFAULT_LENGTH, config)
        rows = tokenize_sentences(sentences, tokenizer, length)
        trainer = ClassifierTrainer(
            model=load_model(model_args, config, tokenizer, args.device),
            args=args,
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=Judge(task, data_args),
        )
        results: dict[str, float] = {}
        for split in rows:
            found = trainer.predict(rows[split], metric_key_prefix=split)
            results |= found.metrics or {}
            if not trainer.is_world_process_zero():
                continue
            logits = logits_of(found.predictions)
            scores = scores_in(results, task, split) or "no labels, so no scores"
            print(f"{split:<11} {scores}, of {len(logits):,} rows")
            earlier = predictions_file(model_args.adapter_name_or_path or model_args.model_name_or_path, split)
            if again := beside_earlier(earlier, logits, task, rows[split]):
                print(f"again       {again}")
            if eval_args.output_file is not None:
                output = Path(eval_args.output_file)
                second = output.with_stem(f"{output.stem}_mm")
                write_predictions(output if split == eval_args.split else second, task, found, rows[split])
    return results
