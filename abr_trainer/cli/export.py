"""Merge an adapter into its base model, and write a model with its tokenizer that plain transformers can load.

    abr export --adapter_name_or_path runs/wikitext --output_dir runs/whole
    abr export --adapter_name_or_path runs/pruned-lora --dataset_name demo --token_length 128 \
        --output_dir runs/merged      # a pruned base model keeps its zeros, unless --keep_mask false

The base model is the one that the adapter records, unless --model_name_or_path gives another copy. The written model
is loaded again to check that its logits are those of base model and adapter. If a text is given, the perplexity of the
base model, the base model with the adapter, and the merged model is measured, see `abr perplexity`; --output_file
contains all three. Classifiers of `abr classify` can be exported, too; evaluate them with `abr evaluate
--model_name_or_path`.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError

from ..classification.records import named_in, recall_labels, task_of_merged
from ..data.arguments import OptionalTextArguments
from ..models.adapters import FLAGS, is_of_classifier
from ..models.arguments import AdaptedArguments, AdaptedClassifierArguments
from ..models.merging import MergeArguments, check_mergeable, describe_merge, merge_to
from ..models.pruning import describe_sparsity
from ..perplexity.measurement import (
    MeasureArguments,
    describe_measurement,
    measure,
    refuse_without_text,
    shown_number,
    write_measurement,
)
from ..records.errors import one_line_errors
from .command_line import parse_arguments


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    with one_line_errors(
        ValueError,
        OSError,
        ImportError,
        RuntimeError,
        SafetensorError,
        when_interrupted="the model is complete if --output_dir exists",
    ):
        adapter = named_in(argv, FLAGS) or ""
        is_classifier = bool(adapter) and is_of_classifier(adapter)
        loading = AdaptedClassifierArguments if is_classifier else AdaptedArguments
        load, source, arguments, merge = parse_arguments(
            (loading, OptionalTextArguments, MeasureArguments, MergeArguments), argv
        )
        labels, files = (recall_labels(adapter), task_of_merged(adapter)) if is_classifier else ({}, {})
        check_mergeable(load, **labels)
        if source.is_given and is_classifier:
            raise ValueError(
                f"{adapter} is an adapter of a classifier, which has no perplexity. Export it without a text, and "
                "evaluate it with abr evaluate --model_name_or_path."
            )
        if not source.is_given:
            refuse_without_text(source, arguments)
        state = PartialState(cpu=arguments.use_cpu)
        if state.num_processes > 1:
            raise ValueError("abr export uses only one process. Start it without a launcher.")
        base = replace(load, adapter_name_or_path=None)
        found: dict[str, dict[str, Any]] = {}
        if source.is_given:
            found = {
                name: measure(each, source, arguments, state) for name, each in (("base", base), ("beside", load))
            }
        merged = merge_to(load, merge, labels, files)
        if source.is_given:
            whole = replace(base, model_name_or_path=merge.output_dir, config_name=None, tokenizer_name=None)
            found["merged"] = measure(whole, source, arguments, state)
            print(*describe_measurement(found["merged"]), sep="\n")
        if arguments.output_file is not None:
            write_measurement(found, arguments.output_file)
    if merged.keep_mask:
        print(*describe_sparsity(merged.sparsity), sep="\n")
    print(*describe_merge(merged), f"model       {merge.output_dir}", sep="\n")
    for name, each in found.items():
        print(f"{name:12}{shown_number(each['perplexity'])}, {1 - each['nonzero_share']['all']:.2%} zeros")
    return {"merge": asdict(merged), **found}
