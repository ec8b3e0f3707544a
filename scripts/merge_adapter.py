"""Merge an adapter into its base, zeros of a pruned base kept, and say what that does to perplexity and sparsity.

    python scripts/merge_adapter.py --model_name_or_path runs/pruned --adapter runs/pruned-lora \
        --dataset_name demo --token_length 128 --output_dir runs/merged
    python scripts/merge_adapter.py ... --keep_mask false      # a plain merge, which fills the zeros

All three are measured by the same definition, see eval_perplexity.py: the base, the base with the adapter beside it,
and what was merged, as it was written.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError

from abr_trainer.command_line import parse_arguments
from abr_trainer.data import TextArguments
from abr_trainer.errors import one_line_errors
from abr_trainer.measurement import MeasureArguments, describe_measurement, measure
from abr_trainer.modeling import LoadArguments
from abr_trainer.pruning import MergeArguments, describe_sparsity, merge_to


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    with one_line_errors(ValueError, OSError, RuntimeError, SafetensorError, when_interrupted="see --output_dir"):
        load, source, arguments, merge = parse_arguments(
            (LoadArguments, TextArguments, MeasureArguments, MergeArguments), argv
        )
        if arguments.adapter is None:
            raise ValueError("--adapter is missing: what to merge.")
        state = PartialState(cpu=arguments.use_cpu)
        found = {"base": measure(load, source, replace(arguments, adapter=None), state)}
        found["beside"] = measure(load, source, arguments, state)
        report = merge_to(load, arguments.adapter, merge)
        merged = replace(load, model_name_or_path=merge.output_dir)
        found["merged"] = measure(merged, source, replace(arguments, adapter=None), state)
    print(*describe_measurement(found["merged"]), *describe_sparsity(report), sep="\n")
    for name, each in found.items():
        value = "not finite" if each["perplexity"] is None else f"{each['perplexity']:.4f}"
        print(f"{name:12}{value}, {1 - each['nonzero_share']['all']:.2%} zeros")
    return found


if __name__ == "__main__":
    main()
