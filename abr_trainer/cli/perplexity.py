"""Measure the perplexity of a model by a named definition, and print all settings that define the number.

    abr perplexity --dataset_name demo --token_length 128
    abr perplexity --model_name_or_path huggyllama/llama-7b --dataset_name wikitext \
        --definition wanda --token_length 2048 --torch_dtype float16 --output_file perplexity.json
    torchrun --nproc_per_node 8 -m abr_trainer perplexity --adapter_name_or_path runs/mine \
        --text_file my.txt --stride 1024
"""

from __future__ import annotations

from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError

from ..data.arguments import TextArguments
from ..models.arguments import AdaptedArguments
from ..perplexity.measurement import MeasureArguments, describe_measurement, measure, write_measurement
from ..records.errors import one_line_errors
from ..training.engines import leave_ranks
from ..training.failing import ending_together
from .command_line import parse_arguments


def main(argv: list[str] | None = None) -> dict[str, Any]:
    with one_line_errors(
        ValueError, OSError, ImportError, RuntimeError, SafetensorError, when_interrupted="nothing was written"
    ):
        load, source, arguments = parse_arguments((AdaptedArguments, TextArguments, MeasureArguments), argv)
        state = PartialState(cpu=arguments.use_cpu)
        with ending_together():
            found = measure(load, source, arguments, state)
            if state.is_main_process:
                print(*describe_measurement(found), sep="\n")
                if arguments.output_file is not None:
                    write_measurement(found, arguments.output_file)
    leave_ranks()
    return found
