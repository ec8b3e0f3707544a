"""Measure the perplexity of a model on a text by a named definition, and record all settings that define it."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data.arguments import DataArguments, TextArguments
from ..data.context import fit_context
from ..data.corpora import parse_mix
from ..data.sources import load_texts
from ..models.adapters import embeddings_in, load_adapter, virtual_tokens_in
from ..models.arguments import AdaptedArguments
from ..models.devices import provenance_of
from ..models.loading import load_base, load_config, load_tokenizer
from ..models.pruning import nonzero_shares
from ..records.errors import one_line, refuse_below, refuse_missing_directory
from ..records.files import write_whole
from .definitions import DEFINITIONS, Definition, Text, find_definition
from .windows import Window, window_nlls

DEFAULT_TOKEN_LENGTH = 2048


@dataclass
class MeasureArguments:
    """Which definition to measure by, and where to write the result."""

    definition: str = field(
        default="token",
        metadata={"help": "Definition of perplexity, see the documentation: " + ", ".join(DEFINITIONS) + "."},
    )
    token_length: int | None = field(
        default=None,
        metadata={"help": "Tokens per window. Default: the model's context length, at most 2048."},
    )
    stride: int | None = field(
        default=None,
        metadata={
            "help": "Tokens from one window to the next, for 'token' and 'hf-stride'. A smaller stride gives each "
            "token more context, but takes longer. Default: --token_length, so that windows do not overlap."
        },
    )
    max_windows: int | None = field(default=None, metadata={"help": "Measure only on the first N windows."})
    batch_size: int = field(default=8, metadata={"help": "Windows per batch, on each process."})
    use_cpu: bool = field(default=False, metadata={"help": "Use the CPU even if there is a GPU."})
    output_file: str | None = field(
        default=None, metadata={"help": "Write the result, and all settings that define it, to this JSON file."}
    )

    def __post_init__(self) -> None:
        definition = find_definition(self.definition)
        refuse_below(self, {"token_length": 2, "stride": 1, "max_windows": 1, "batch_size": 1})
        check_stride(definition, self.stride)
        if self.max_windows is not None and definition.wants_whole_texts:
            raise ValueError(
                f"--max_windows cannot be used with --definition {definition.name}, which needs full texts. Give "
                "--max_rows instead."
            )
        refuse_missing_directory(self, "output_file")


@dataclass
class EvaluationArguments:
    """What to measure at each evaluation of a run, in addition to the loss."""

    eval_definition: str | None = field(
        default=None,
        metadata={
            "help": "Also measure perplexity by this definition at each evaluation, in windows of --block_size: "
            + ", ".join(DEFINITIONS)
            + ". Logs, history and the choice of the best checkpoint then use it."
        },
    )
    eval_text: str | None = field(
        default=None,
        metadata={
            "help": "Text for --eval_definition: a file, or a data set whose validation split is used. "
            "Default: the evaluation text."
        },
    )
    eval_stride: int | None = field(
        default=None,
        metadata={"help": "Tokens from one window of --eval_definition to the next. Default: --block_size."},
    )

    def __post_init__(self) -> None:
        if self.eval_definition is None:
            for flag in ("eval_text", "eval_stride"):
                if getattr(self, flag) is not None:
                    raise ValueError(f"--{flag} needs --eval_definition.")
        else:
            refuse_below(self, {"eval_stride": 1})
            check_stride(find_definition(self.eval_definition, "eval_definition"), self.eval_stride, "eval_")

    @property
    def metric(self) -> str:
        """Name of the perplexity that logs and the choice of the best checkpoint use."""
        chosen = self.eval_definition
        return "perplexity" if chosen is None else f"{find_definition(chosen).metric}_perplexity"

    @staticmethod
    def _first_of_mix(data: DataArguments) -> str | None:
        """Return the data set of a mix that is used for evaluation; None if it is a training file."""
        first = next(iter(parse_mix(data.dataset_mix))) if data.dataset_mix else None
        return None if first is None or Path(first).is_file() else first

    def text_to_measure(self, data: DataArguments) -> tuple[TextArguments, str]:
        """Return the text to read, and the flag that gives it.

        Raises:
            ValueError: No flag gives a text.
        """
        names = {
            "eval_text": self.eval_text,
            "validation_file": data.validation_file,
            "dataset_mix": self._first_of_mix(data),
            "dataset_name": data.dataset_name,
        }
        flag, name = next((item for item in names.items() if item[1] is not None), ("", None))
        if name is None:
            raise ValueError("--eval_definition needs a text. Give --eval_text or --validation_file.")
        if Path(name).is_file():
            return TextArguments(text_file=name, text_column=data.text_column), flag
        config = None if flag == "eval_text" else data.dataset_config_name
        return TextArguments(name, config, split="validation", text_column=data.text_column), flag


def refuse_without_text(*arguments: Any) -> None:
    """Refuse flags about measuring if no text is given. Defaults and --use_cpu are allowed.

    Args:
        arguments: Dataclasses of such flags.

    Raises:
        ValueError: One of them is given.
    """
    for group in arguments:
        for flag in fields(group):
            if flag.name != "use_cpu" and getattr(group, flag.name) != flag.default:
                raise ValueError(f"--{flag.name} needs a text to measure. Give --dataset_name or --text_file.")


def check_stride(definition: Definition, stride: int | None, prefix: str = "") -> None:
    """Refuse a stride for a definition whose windows cannot overlap.

    Raises:
        ValueError: There is a stride, but the definition does not use it.
    """
    if stride is not None and not definition.takes_stride:
        takers = " and ".join(repr(each.name) for each in DEFINITIONS.values() if each.takes_stride)
        raise ValueError(
            f"--{prefix}stride cannot be used with --{prefix}definition {definition.name}, only with {takers}."
        )


def fit_stride(stride: int | None, length: int, flag: str = "stride", length_flag: str = "token_length") -> int:
    """Return the stride, by default the length of a window.

    Raises:
        ValueError: The stride is longer than a window.
    """
    if stride is not None and stride > length:
        raise ValueError(
            f"--{flag} {stride} must not exceed --{length_flag} {length}, or tokens between windows would be left out."
        )
    return stride or length


def choose_windows(arguments: MeasureArguments, config: PreTrainedConfig, virtual: int = 0) -> tuple[int, int]:
    """Return the length of a window and the stride, or their defaults, checked against the model.

    Args:
        virtual: Number of virtual tokens that an adapter puts before the text.

    Raises:
        ValueError: A window is longer than the model's context, or the stride is longer than a window.
    """
    length = fit_context("token_length", arguments.token_length, DEFAULT_TOKEN_LENGTH, config, virtual)
    return length, fit_stride(arguments.stride, length)


def cut_windows(
    definition: Definition,
    text: Text,
    length: int,
    stride: int,
    most: int | None,
    origin: str,
    flags: tuple[str, str] = ("definition", "token_length"),
) -> list[Window]:
    """Return the windows of a text.

    Args:
        most: Most windows; None for all.
        origin: The flag that gives the text, for messages.
        flags: The flags that give the definition and the length, for messages.

    Raises:
        ValueError: The text is shorter than one window.
    """
    windows = list(itertools.islice(definition.windows(text, length, stride), most))
    if not windows:
        raise ValueError(
            f"{origin} is shorter than one window of --{flags[0]} {definition.name}: --{flags[1]} is {length}. Give a "
            f"lower --{flags[1]}, or more text."
        )
    return windows


def check_tokens(windows: Sequence[Window], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse tokens for which the model has no embedding.

    Raises:
        ValueError: The tokenizer belongs to another model.
    """
    known = embeddings_in(model)
    highest = max(max(window.ids) for window in windows)
    if highest >= known:
        raise ValueError(
            f"The tokenizer of {tokenizer.name_or_path} returns token {highest}, but the model has only {known} "
            "embeddings. Give the model's tokenizer as --tokenizer_name."
        )


@dataclass(frozen=True)
class Measurement:
    """A text in windows, which can be measured repeatedly, on all ranks.

    Calling it with a model returns the numbers of its definition with its name as prefix, e.g. `hf_stride_perplexity`.
    Pass it as `ABRTrainer(eval_measurement=...)`.

    Attributes:
        batch_size: Windows per batch, on each rank.
    """

    definition: Definition
    text: Text
    windows: Sequence[Window]
    batch_size: int
    state: PartialState

    def __call__(self, model: torch.nn.Module) -> dict[str, float]:
        nlls = nlls_over_ranks(model, self.windows, self.batch_size, self.state, shows_progress=False)
        numbers, non_finite = numbers_of(self.definition, self.text, self.windows, nlls)
        if non_finite:
            numbers["non_finite_windows"] = len(non_finite)
        return {f"{self.definition.metric}_{name}": value for name, value in numbers.items()}


def prepare_measurement(
    arguments: EvaluationArguments,
    data: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    batch_size: int,
    state: PartialState,
) -> Measurement | None:
    """Load the text to measure at each evaluation and cut it into at most `--max_eval_samples` windows.

    Returns None without `--eval_definition`.

    Raises:
        ValueError: The text cannot be read, or does not fit the definition and the flags.
    """
    if arguments.eval_definition is None:
        return None
    definition = find_definition(arguments.eval_definition)
    if definition.wants_whole_texts and data.max_eval_samples is not None:
        raise ValueError(
            f"--max_eval_samples cannot be used with --eval_definition {definition.name}, which needs full texts. "
            "Leave it out."
        )
    stride = fit_stride(arguments.eval_stride, length, "eval_stride", "block_size")
    source, flag = arguments.text_to_measure(data)
    rows, loaded = load_texts(source, flag)
    text = Text(rows, loaded.rows_are_lines, tokenizer, source.is_c4)
    flags = ("eval_definition", "block_size")
    windows = cut_windows(definition, text, length, stride, data.max_eval_samples, loaded.origin, flags)
    return Measurement(definition, text, windows, batch_size, state)


def measure(
    load: AdaptedArguments, source: TextArguments, arguments: MeasureArguments, state: PartialState
) -> dict[str, Any]:
    """Load a model and a text, and return a perplexity with all settings that define it. All ranks return the same.

    If the likelihood of a window is NaN or infinite, its index is in `non_finite_windows`, the perplexity is None, and
    `perplexity_without_them` is the perplexity of the other windows.

    Raises:
        ValueError: Model, adapter, tokenizer, text and flags do not fit together.
    """
    config, tokenizer = load_config(load), load_tokenizer(load)
    definition = find_definition(arguments.definition)
    adapter = load.adapter_name_or_path
    virtual = 0 if adapter is None else virtual_tokens_in(adapter)
    length, stride = choose_windows(arguments, config, virtual)
    with state.main_process_first():
        rows, loaded = load_texts(source)
        text = Text(rows, loaded.rows_are_lines, tokenizer, source.is_c4)
        windows = cut_windows(definition, text, length, stride, arguments.max_windows, loaded.origin)
    model = load_base(load, config, state.device)
    adapted = model if adapter is None else load_adapter(model, adapter, load.model_name_or_path)
    check_tokens(windows, model, tokenizer)
    quantisation = quantisation_of(model)
    if quantisation is None and load.device_map is None:
        adapted.to(state.device)
    defined = {  # before measuring, so that an error here does not waste hours
        "definition": definition.name,
        "says": definition.says,
        "text": loaded.origin,
        "config": source.config,
        "split": source.split if source.dataset_name else None,
        "rows": len(rows),
        "token_length": length,
        "stride": stride if definition.takes_stride else None,
        "windows": len(windows),
        "target_tokens": sum(window.targets for window in windows),
        "begun_by": begin_of(windows, tokenizer),
        "model": load.model_name_or_path,
        "adapter": adapter,
        "tokenizer": tokenizer.name_or_path,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantisation": quantisation,
        "nonzero_share": nonzero_shares(model),
        **provenance_of(state.device, state.num_processes),
    }
    start = time.perf_counter()
    try:
        nlls = nlls_over_ranks(adapted, windows, arguments.batch_size, state)
    except IndexError as error:  # tokens were checked, so the model has fewer positions than its configuration says
        raise ValueError(
            f"The model has too few positions for windows of {length} tokens. Give a lower --token_length. "
            f"{one_line(error)}"
        ) from error
    seconds = time.perf_counter() - start
    numbers, non_finite = numbers_of(definition, text, windows, nlls)
    return {
        **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
        "non_finite_windows": non_finite,
        **defined,
        "seconds": seconds,
    }


def numbers_of(
    definition: Definition, text: Text, windows: Sequence[Window], nlls: Sequence[float]
) -> tuple[dict[str, float], list[int]]:
    """Return the numbers of a definition, and the indices of windows whose likelihood is NaN or infinite.

    If there are any, the perplexity is NaN, and `perplexity_without_them` leaves out these windows and all other
    windows of the same documents.
    """
    non_finite = [index for index, nll in enumerate(nlls) if not math.isfinite(nll)]
    lost = {windows[index].document for index in non_finite} - {None}
    kept = [
        (window, nll)
        for window, nll in zip(windows, nlls, strict=True)
        if math.isfinite(nll) and window.document not in lost
    ]
    numbers = definition.numbers(text, *zip(*kept, strict=True)) if kept else {"perplexity": math.nan}
    if non_finite:
        numbers = {"perplexity": math.nan, "perplexity_without_them": numbers["perplexity"]}
    return numbers, non_finite


def quantisation_of(model: PreTrainedModel) -> str | None:
    """Return how the weights are quantised, on loading or in the checkpoint; None if they are not."""
    if not getattr(model, "is_quantized", False):
        return None
    bits = {"is_loaded_in_8bit": "8-bit", "is_loaded_in_4bit": "4-bit"}
    by_bitsandbytes = next((name for flag, name in bits.items() if getattr(model, flag, False)), None)
    return by_bitsandbytes or str(getattr(model, "quantization_method", "quantised"))


def begin_of(windows: Sequence[Window], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the special token at the start of the first window; None if it starts with another token."""
    first = int(windows[0].ids[0])  # the tokenizer does not accept numpy integers
    return str(tokenizer.convert_ids_to_tokens(first)) if first in tokenizer.all_special_ids else None


def nlls_over_ranks(
    model: torch.nn.Module,
    windows: Sequence[Window],
    batch_size: int,
    state: PartialState,
    shows_progress: bool = True,
) -> list[float]:
    """Return the result of `window_nlls`; each rank measures its share of the windows.

    All ranks measure the same number of windows, some of them twice if necessary, because the ranks of a sharded model
    wait for each other at each batch.
    """
    turns = range(state.process_index, math.ceil(len(windows) / state.num_processes) * state.num_processes)
    mine = [index % len(windows) for index in turns[:: state.num_processes]]
    shown = shows_progress and state.is_main_process
    with tqdm(total=len(mine), unit="window", disable=None if shown else True) as bar:
        found = window_nlls(model, [windows[index] for index in mine], batch_size, bar.update)
    pairs = dict(gather_object(list(zip(mine, found, strict=True))))
    return [pairs[index] for index in range(len(windows))]


def describe_measurement(found: dict[str, Any]) -> list[str]:
    """Return lines about the result, the text, the windows, the model and the speed."""
    lines = [f"perplexity  {shown_number(found['perplexity'])} ({found['definition']}): {found['says']}"]
    if "bits_per_byte" in found:
        by_byte, bits = shown_number(found["byte_perplexity"]), shown_number(found["bits_per_byte"])
        lines.append(f"            per byte {by_byte}, bits per byte {bits}")
    if broken := found["non_finite_windows"]:
        which = ", ".join(map(str, broken[:10])) + ", ..." * (len(broken) > 10)
        without = shown_number(found["perplexity_without_them"])
        lines.append(f"not finite  {len(broken)} of {found['windows']} windows: {which}; without them {without}")
    place = " ".join(part for part in (found["text"], found["config"], found["split"]) if part)
    stride = f" every {found['stride']}" if found["stride"] else ""
    cut = f"{found['windows']:,} of {found['token_length']} tokens{stride}, {found['target_tokens']:,} targets"
    begin = f"starting with {found['begun_by']}" if found["begun_by"] else "no token before the first"
    form = ", ".join(part for part in (found["dtype"], found["quantisation"]) if part)
    adapter = f" with {found['adapter']}" if found["adapter"] else ""
    shares = ", ".join(f"{kind} {share:.1%}" for kind, share in found["nonzero_share"].items())
    return [
        *lines,
        f"text        {place}, {found['rows']:,} rows",
        f"windows     {cut}, {begin}",
        f"model       {found['model']}{adapter}, {form}",
        f"not zero    {shares}{' (small values are rounded to zero)' if found['quantisation'] else ''}",
        f"speed       {found['seconds']:.1f} s, {found['target_tokens'] / found['seconds']:,.0f} targets/s",
    ]


def shown_number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def write_measurement(found: dict[str, Any], path: str) -> None:
    write_whole(Path(path), json.dumps(found, indent=1) + "\n")
