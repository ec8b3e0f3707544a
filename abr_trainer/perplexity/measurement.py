"""The perplexity of a model on a text, by a named definition, with all that defines the number."""

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
    """By which definition to measure, and where the result goes."""

    definition: str = field(
        default="token",
        metadata={"help": "Which perplexity, see the README: " + ", ".join(DEFINITIONS) + "."},
    )
    token_length: int | None = field(
        default=None,
        metadata={"help": "Tokens in a window. Default: what the model can attend to, at most 2048."},
    )
    stride: int | None = field(
        default=None,
        metadata={
            "help": "Tokens from one window to the next, for 'token' and 'hf-stride'; the less, the more context each "
            "token has, and the longer it takes. Default: --token_length, windows that do not overlap."
        },
    )
    max_windows: int | None = field(default=None, metadata={"help": "Measure on the first so many windows."})
    batch_size: int = field(default=8, metadata={"help": "Windows at a time, on each process."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU where there is a GPU."})
    output_file: str | None = field(default=None, metadata={"help": "Write the number and what defines it, as JSON."})

    def __post_init__(self) -> None:
        definition = find_definition(self.definition)
        refuse_below(self, {"token_length": 2, "stride": 1, "max_windows": 1, "batch_size": 1})
        check_stride(definition, self.stride)
        if self.max_windows is not None and definition.wants_whole_texts:
            raise ValueError(
                f"--max_windows would cut a text, of which --definition {definition.name} needs all: give --max_rows."
            )
        refuse_missing_directory(self, "output_file")


@dataclass
class EvaluationArguments:
    """What else to measure at each evaluation of a run."""

    eval_definition: str | None = field(
        default=None,
        metadata={
            "help": "Also measure perplexity by this definition: " + ", ".join(DEFINITIONS) + ". At each evaluation, "
            "in windows of --block_size; it is followed in the lines, the history and the choice of the best."
        },
    )
    eval_text: str | None = field(
        default=None,
        metadata={
            "help": "What to measure --eval_definition on: a file, or a data set, of which the validation split is "
            "read. Default: the text that is evaluated on."
        },
    )
    eval_stride: int | None = field(
        default=None, metadata={"help": "Tokens from one window of --eval_definition to the next, as --stride."}
    )

    def __post_init__(self) -> None:
        if self.eval_definition is None:
            for flag in ("eval_text", "eval_stride"):
                if getattr(self, flag) is not None:
                    raise ValueError(f"--{flag} means nothing without --eval_definition.")
        else:
            refuse_below(self, {"eval_stride": 1})
            check_stride(find_definition(self.eval_definition, "eval_definition"), self.eval_stride, "eval_")

    @property
    def metric(self) -> str:
        """The perplexity that a run is followed by."""
        chosen = self.eval_definition
        return "perplexity" if chosen is None else f"{find_definition(chosen).metric}_perplexity"

    @staticmethod
    def _first_of_mix(data: DataArguments) -> str | None:
        """Return the data set of a mix that is evaluated on; none if rows of a training file are."""
        first = next(iter(parse_mix(data.dataset_mix))) if data.dataset_mix else None
        return None if first is None or Path(first).is_file() else first

    def text_to_measure(self, data: DataArguments) -> tuple[TextArguments, str]:
        """Return what to read, and the flag that names it.

        Raises:
            ValueError: Nothing does.
        """
        names = {
            "eval_text": self.eval_text,
            "validation_file": data.validation_file,
            "dataset_mix": self._first_of_mix(data),
            "dataset_name": data.dataset_name,
        }
        flag, name = next((item for item in names.items() if item[1] is not None), ("", None))
        if name is None:
            raise ValueError("--eval_definition needs a text: give --eval_text or --validation_file.")
        if Path(name).is_file():
            return TextArguments(text_file=name, text_column=data.text_column), flag
        config = None if flag == "eval_text" else data.dataset_config_name
        return TextArguments(name, config, split="validation", text_column=data.text_column), flag


def refuse_without_text(*arguments: Any) -> None:
    """Refuse flags that say how to measure where nothing says on what: all but defaults, and --use_cpu.

    Args:
        arguments: Dataclasses of such flags.

    Raises:
        ValueError: One of them is given.
    """
    for group in arguments:
        for flag in fields(group):
            if flag.name != "use_cpu" and getattr(group, flag.name) != flag.default:
                raise ValueError(f"--{flag.name} needs a text to measure on: give --dataset_name or --text_file.")


def check_stride(definition: Definition, stride: int | None, prefix: str = "") -> None:
    """Refuse a stride with a definition whose windows cannot overlap."""
    if stride is not None and not definition.takes_stride:
        takers = " and ".join(repr(each.name) for each in DEFINITIONS.values() if each.takes_stride)
        raise ValueError(
            f"--{prefix}stride means nothing to --{prefix}definition {definition.name}; it is for {takers}."
        )


def fit_stride(stride: int | None, length: int, flag: str = "stride", length_flag: str = "token_length") -> int:
    """Return the stride, by default the length of a window, which it must not exceed."""
    if stride is not None and stride > length:
        raise ValueError(
            f"--{flag} {stride} is above --{length_flag} {length}: tokens between windows would be left out."
        )
    return stride or length


def choose_windows(arguments: MeasureArguments, config: PreTrainedConfig, virtual: int = 0) -> tuple[int, int]:
    """Return the length of a window and the stride, or their defaults, checked against the model.

    Args:
        virtual: Tokens that an adapter puts before the others.

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
        origin: The flag that named the text, for messages; `flags` those that named the definition and the length.

    Raises:
        ValueError: The text does not fill one.
    """
    windows = list(itertools.islice(definition.windows(text, length, stride), most))
    if not windows:
        raise ValueError(
            f"{origin} is shorter than a window of --{flags[0]} {definition.name}: --{flags[1]} is {length}. Give a "
            "lower one, or more text."
        )
    return windows


def check_tokens(windows: Sequence[Window], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse tokens that the model has no embedding of.

    Raises:
        ValueError: The tokenizer is of another model.
    """
    known = embeddings_in(model)
    highest = max(max(window.ids) for window in windows)
    if highest >= known:
        raise ValueError(
            f"The tokenizer of {tokenizer.name_or_path} makes token {highest}, but the model has {known} embeddings: "
            "it is of another model. Give --tokenizer_name."
        )


@dataclass(frozen=True)
class Measurement:
    """A text in windows, to be measured as often as one likes, on all ranks.

    Called with a model it returns the numbers of its definition, under its name: `hf_stride_perplexity`. That is what
    `ABRTrainer(eval_measurement=...)` takes.

    Attributes:
        batch_size: Windows at a time, on each rank.
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
    """Load and cut what is measured at each evaluation, if anything is; `--max_eval_samples` windows at most.

    Raises:
        ValueError: The text cannot be read, or does not go with the definition and the flags.
    """
    if arguments.eval_definition is None:
        return None
    definition = find_definition(arguments.eval_definition)
    if definition.wants_whole_texts and data.max_eval_samples is not None:
        raise ValueError(
            f"--max_eval_samples would cut a text, of which --eval_definition {definition.name} needs all."
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
    """Load a model and a text, and return a perplexity with all that defines it. Every rank returns the same.

    Windows whose likelihood is not finite are named in `non_finite_windows`: the perplexity is None, and
    `perplexity_without_them` that of the others.

    Raises:
        ValueError: Model, adapter, tokenizer, text or flags do not fit each other.
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
    defined = {  # before measuring: whatever fails here must not cost hours
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
    except IndexError as error:  # the tokens were checked: there are fewer positions than the configuration says
        raise ValueError(
            f"The model has no positions for windows of {length} tokens: give a lower --token_length. "
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
    """Return the numbers of a definition, and which windows have a likelihood that is not finite.

    If there are such, the perplexity is not a number, and `perplexity_without_them` that of the others: without all of
    a text of which it is one.
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
    """Return how the weights are quantised, whether on loading or in the checkpoint; None if they are not."""
    if not getattr(model, "is_quantized", False):
        return None
    bits = {"is_loaded_in_8bit": "8-bit", "is_loaded_in_4bit": "4-bit"}
    by_bitsandbytes = next((name for flag, name in bits.items() if getattr(model, flag, False)), None)
    return by_bitsandbytes or str(getattr(model, "quantization_method", "quantised"))


def begin_of(windows: Sequence[Window], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the special token that the first window begins with, if it does."""
    first = int(windows[0].ids[0])  # of an array it is no int to the tokenizer
    return str(tokenizer.convert_ids_to_tokens(first)) if first in tokenizer.all_special_ids else None


def nlls_over_ranks(
    model: torch.nn.Module,
    windows: Sequence[Window],
    batch_size: int,
    state: PartialState,
    shows_progress: bool = True,
) -> list[float]:
    """Return what `window_nlls` does, each rank having measured its share of the windows.

    All ranks measure equally many, some of them twice if need be: a sharded model waits for all ranks at each batch.
    """
    turns = range(state.process_index, math.ceil(len(windows) / state.num_processes) * state.num_processes)
    mine = [index % len(windows) for index in turns[:: state.num_processes]]
    shown = shows_progress and state.is_main_process
    with tqdm(total=len(mine), unit="window", disable=None if shown else True) as bar:
        found = window_nlls(model, [windows[index] for index in mine], batch_size, bar.update)
    pairs = dict(gather_object(list(zip(mine, found, strict=True))))
    return [pairs[index] for index in range(len(windows))]


def describe_measurement(found: dict[str, Any]) -> list[str]:
    """Return a line each on the number, and on what it is the perplexity of."""
    lines = [f"perplexity  {shown_number(found['perplexity'])} ({found['definition']}): {found['says']}"]
    if "bits_per_byte" in found:
        by_byte, bits = shown_number(found["byte_perplexity"]), shown_number(found["bits_per_byte"])
        lines.append(f"            by byte {by_byte}, bits by byte {bits}")
    if broken := found["non_finite_windows"]:
        which = ", ".join(map(str, broken[:10])) + ", ..." * (len(broken) > 10)
        without = shown_number(found["perplexity_without_them"])
        lines.append(f"not finite  {len(broken)} of {found['windows']} windows: {which}; without them {without}")
    place = " ".join(part for part in (found["text"], found["config"], found["split"]) if part)
    stride = f" every {found['stride']}" if found["stride"] else ""
    cut = f"{found['windows']:,} of {found['token_length']} tokens{stride}, {found['target_tokens']:,} targets"
    begin = f"begun by {found['begun_by']}" if found["begun_by"] else "no token before the first"
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
