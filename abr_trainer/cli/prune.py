"""Prune a model by magnitude, write it to a new directory, and print its sparsity.

abr prune --output_dir runs/pruned            # half of the demo model's weights
abr prune --model_name_or_path my/model --pattern 2:4 --output_dir runs/2of4
"""

from __future__ import annotations

from safetensors import SafetensorError

from ..models.arguments import LoadArguments
from ..models.pruning import PruneArguments, describe_pruned, prune_to
from ..records.errors import one_line_errors
from .command_line import parse_arguments


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    with one_line_errors(
        ValueError,
        OSError,
        ImportError,
        RuntimeError,
        SafetensorError,
        when_interrupted="--output_dir was not written",
    ):
        load, arguments = parse_arguments((LoadArguments, PruneArguments), argv)
        pruned = prune_to(load, arguments)
    print(*describe_pruned(pruned), f"model  {arguments.output_dir}", sep="\n")
    return pruned.sparsity
