"""Merge an adapter into its base, zeros of a pruned base kept, and say what that does to perplexity and sparsity.

    python scripts/merge_adapter.py --model_name_or_path runs/pruned --adapter runs/pruned-lora \
        --dataset_name demo --token_length 128 --output_dir runs/merged
    python scripts/merge_adapter.py ... --keep_mask false      # a plain merge, which fills the zeros

All three are measured by the same definition, see eval_perplexity.py: the base, the base with the adapter beside it,
and what was merged, as it was written. --output_file holds the three.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError

from abr_trainer.command_line import parse_arguments
from abr_trainer.data import TextArguments
from abr_trainer.errors import one_line_errors
from abr_trainer.measurement import (
    MeasureArguments,
    describe_measurement,
    measure,
    shown_number,
    write_measurement,
)
from abr_trainer.modeling import AdaptedArguments
from abr_trainer.pruning import MergeArguments, describe_sparsity, merge_to


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    with one_line_errors(
        ValueError, OSError, ImportError, RuntimeError, SafetensorError, when_interrupted="look for --output_dir"
    ):
        load, source, arguments, merge = parse_arguments(
            (AdaptedArguments, TextArguments, MeasureArguments, MergeArguments), argv
        )
        if load.adapter_name_or_path is None:
            raise ValueError("--adapter is missing: what to merge.")
        if load.is_quantised:
            raise ValueError("An adapter is merged into weights as they are: without --load_in_8bit, --load_in_4bit.")
        state = PartialState(cpu=arguments.use_cpu)
        if state.num_processes > 1:
            raise ValueError("Merging is the work of one process: start this script without a launcher.")
        alone = replace(load, adapter_name_or_path=None)
        found = {"base": measure(alone, source, arguments, state), "beside": measure(load, source, arguments, state)}
        report = merge_to(load, load.adapter_name_or_path, merge)
        found["merged"] = measure(replace(alone, model_name_or_path=merge.output_dir), source, arguments, state)
        if arguments.output_file is not None:
            write_measurement(found, arguments.output_file)
    print(*describe_measurement(found["merged"]), *describe_sparsity(report), sep="\n")
    for name, each in found.items():
        print(f"{name:12}{shown_number(each['perplexity'])}, {1 - each['nonzero_share']['all']:.2%} zeros")
    return found


if __name__ == "__main__":
    main()
