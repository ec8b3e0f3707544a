"""Prune by magnitude, and report how sparse a model is and in which pattern."""

from __future__ import annotations

import contextlib
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .adapters import WRAPPED
from .arguments import LoadArguments
from .experts import has_inputs_first, is_router
from .loading import load_base, load_config, load_tokenizer, load_written
from .unwrapping import without_adapter

LAYERS = (nn.Linear, Conv1D)
"""Layers that are pruned; quantised layers are subclasses of these."""


# ---- Matrices of a model ----

Count = tuple[int, int]
"""How many items have a property, and how many there are."""


@dataclass(frozen=True)
class Matrix:
    """A matrix of the base model: a layer, an embedding table, one expert of a stack, or any other parameter.

    Attributes:
        name: Name in the base model, without an adapter's wrappers, with the index of an expert.
        module: The module with the parameter.
        parameter: Name of the parameter in the module.
        is_adapted: Whether an adapter changes it.
        is_replaced: Whether an adapter contains a fully trained copy of its module.
        expert: Its index in a stack of experts.
    """

    name: str
    module: nn.Module
    parameter: str = "weight"
    is_adapted: bool = False
    is_replaced: bool = False
    expert: int | None = None

    @property
    def kind(self) -> str:
        """Its name in a block, e.g. q_proj."""
        return self.name.rpartition(".")[2]

    @property
    def is_layer(self) -> bool:
        """Whether it multiplies inputs: a linear layer or an expert."""
        return self.expert is not None or isinstance(self.module, LAYERS)

    def values(self) -> Tensor:
        """Return the values; for layers the shape is `(outputs, inputs)`.

        4-bit weights are dequantised. 8-bit weights are integers, in which a zero may be a rounded value.
        """
        parameter = getattr(self.module, self.parameter)
        weight: Tensor = parameter.data
        state = getattr(parameter, "quant_state", None)
        if isinstance(self.module, Linear4bit) and state is not None:
            return dequantize_4bit(weight, state)
        if self.expert is not None:
            return weight[self.expert].T if has_inputs_first(self.module) else weight[self.expert]
        return weight.T if isinstance(self.module, Conv1D) else weight


def matrices(model: nn.Module) -> Iterator[Matrix]:
    """Yield the base model's parameters with at least two dimensions.

    Tied parameters are yielded once, and each expert of a stack separately. An adapter's parameters are left out, also
    those of layers that it has fully trained.
    """
    base = without_adapter(model)
    tuners = [each for each in base.modules() if isinstance(each, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    of_adapter = {name for tuner in tuners for name in tuner.adapter_layer_names}
    targets = {(id(each.get_base_layer()), each.parameter_name) for each in tuners if isinstance(each, ParamWrapper)}
    seen: set[int] = set()
    for path, module in base.named_modules():
        inside = path.split(".")
        parts = [part for part in inside if part and part not in WRAPPED]
        if of_adapter.intersection(parts):
            continue
        is_replaced = "original_module" in inside
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2 or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            is_adapted = (id(module), name) in targets or (name == "weight" and inside[-1] == "base_layer")
            of_parameter = [] if name == "weight" and parts else [name]
            if parameter.dim() == 3 and has_inputs_first(module) is not None:
                *before, last = [*parts, *of_parameter]
                for expert in range(len(parameter)):
                    numbered = ".".join([*before, str(expert), last])
                    yield Matrix(numbered, module, name, is_adapted, is_replaced, expert)
            else:
                yield Matrix(".".join([*parts, *of_parameter]), module, name, is_adapted, is_replaced)


def layers(model: nn.Module) -> list[Matrix]:
    """Return the linear layers and the experts, without the head and the routers.

    Routers are small, and a pruned router sends tokens to other experts.
    """
    base = without_adapter(model)
    head = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None  # type: ignore[no-untyped-call]
    found = list(matrices(model))
    has_experts = any(each.expert is not None or "experts" in each.name.split(".") for each in found)
    return [
        each
        for each in found
        if each.is_layer and each.module is not head and not (has_experts and is_router(each.name))
    ]


@torch.no_grad()
def nonzero_shares(model: nn.Module) -> dict[str, float]:
    """Return the share of nonzero weights for each kind of layer, by its name in a block, and for `all`.

    >>> model = nn.ModuleDict({"q_proj": nn.Linear(2, 2), "v_proj": nn.Linear(2, 2)})
    >>> _ = nn.init.constant_(model["q_proj"].weight, 1.0), nn.init.eye_(model["v_proj"].weight)
    >>> nonzero_shares(model)
    {'q_proj': 1.0, 'v_proj': 0.5, 'all': 0.75}
    """

    def count(values: Tensor) -> dict[str, Count]:
        return {"nonzero": (int(torch.count_nonzero(values)), values.numel())}

    shares = _shares(matrices(model), count)
    return {kind: share["nonzero"] for kind, share in shares.items()} or {"all": 0.0}


@torch.no_grad()
def sparsity_report(
    model: nn.Module, patterns: tuple[str, ...] = ("2:4", "4:8", "16x16")
) -> dict[str, dict[str, float]]:
    """Return, for each kind of linear layer and for `all`, the share of zeros and the share that has each pattern.

    For a pattern n:m this is the share of groups of m inputs with at most n nonzero values, for a block pattern the
    share of blocks that are all zero. It is 0 for a matrix whose inputs cannot be divided into groups of m.
    """
    parsed = {pattern: parse_pattern(pattern) for pattern in patterns}

    def count(values: Tensor) -> dict[str, Count]:
        zeros = int((values == 0).sum()), values.numel()
        return {"zeros": zeros} | {pattern: each.having(values) for pattern, each in parsed.items()}

    return _shares(layers(model), count)


def _shares(counted: Iterable[Matrix], count: Callable[[Tensor], dict[str, Count]]) -> dict[str, dict[str, float]]:
    """Return the shares of the counts, summed over the matrices of each kind and then over `all`."""
    sums: dict[str, dict[str, Count]] = {}
    for matrix in counted:
        for name, (part, whole) in count(matrix.values()).items():
            for kind in (matrix.kind, "all"):
                of_kind = sums.setdefault(kind, {})
                before = of_kind.get(name, (0, 0))
                of_kind[name] = before[0] + part, before[1] + whole
    kinds = sorted(sums, key=lambda kind: kind == "all")
    return {kind: {name: part / whole for name, (part, whole) in sums[kind].items()} for kind in kinds}


# ---- Patterns, and pruning ----


@dataclass(frozen=True)
class Unstructured:
    """Any weights."""

    def keep(self, values: Tensor, sparsity: float) -> Tensor:
        """Return a mask without the lowest magnitudes: exactly this share of weights, rounded down."""
        lowest = values.abs().flatten().argsort(stable=True)[: int(sparsity * values.numel())]
        mask = torch.ones(values.numel(), dtype=torch.bool, device=values.device)
        mask[lowest] = False
        return mask.view_as(values)

    def having(self, values: Tensor) -> tuple[int, int]:
        """Return the number of weights with this pattern, which all have, and the number of weights."""
        return values.numel(), values.numel()


@dataclass(frozen=True)
class Grouped:
    """At most `n` of each `m` successive inputs. Sparse tensor cores need 2:4."""

    n: int
    m: int

    def keep(self, values: Tensor, sparsity: float) -> Tensor:
        """Return a mask that keeps the `n` highest magnitudes of each group.

        Raises:
            ValueError: The inputs cannot be divided into groups of `m`.
        """
        if values.shape[1] % self.m:
            raise ValueError(f"its {values.shape[1]} inputs cannot be divided into groups of {self.m}")
        groups = values.abs().reshape(-1, self.m)
        kept = groups.argsort(dim=1, stable=True)[:, self.m - self.n :]
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, kept, True).view_as(values)

    def having(self, values: Tensor) -> tuple[int, int]:
        """Return the number of groups with this pattern, 0 if inputs cannot be divided, and the number of groups."""
        if values.shape[1] % self.m:
            return 0, math.ceil(values.numel() / self.m)
        counts = (values.reshape(-1, self.m) != 0).sum(dim=1)
        return int((counts <= self.n).sum()), len(counts)


@dataclass(frozen=True)
class Blocks:
    """Blocks of weights; those at the lower and right edge may be smaller."""

    rows: int
    columns: int

    def _cut(self, values: Tensor) -> Tensor:
        """Return the values as `(blocks down, blocks across, rows, columns)`, padded with zeros."""
        missing = (-values.shape[1] % self.columns, -values.shape[0] % self.rows)
        filled = nn.functional.pad(values, (0, missing[0], 0, missing[1]))
        down, across = filled.shape[0] // self.rows, filled.shape[1] // self.columns
        return filled.reshape(down, self.rows, across, self.columns).transpose(1, 2)

    def keep(self, values: Tensor, sparsity: float) -> Tensor:
        """Return a mask without the blocks of the lowest norm: this share of blocks, rounded down."""
        norms = self._cut(values.float()).square().sum(dim=(2, 3))
        kept = Unstructured().keep(norms, sparsity)
        mask = kept.repeat_interleave(self.rows, dim=0).repeat_interleave(self.columns, dim=1)
        return mask[: values.shape[0], : values.shape[1]]

    def having(self, values: Tensor) -> tuple[int, int]:
        """Return the number of blocks that are all zero, and the number of blocks."""
        is_zero = (self._cut(values) == 0).all(dim=3).all(dim=2)
        return int(is_zero.sum()), is_zero.numel()


def parse_pattern(pattern: str) -> Unstructured | Grouped | Blocks:
    """Parse a pattern such as `unstructured`, `2:4` or `16x16`.

    Raises:
        ValueError: It has none of these forms.
    """
    if pattern == "unstructured":
        return Unstructured()
    if found := re.fullmatch(r"([1-9]\d*):([1-9]\d*)", pattern):
        n, m = map(int, found.groups())
        if n < m:
            return Grouped(n, m)
    if found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", pattern):
        return Blocks(*map(int, found.groups()))
    raise ValueError(
        f"--pattern must be 'unstructured', n:m with n below m, or a block size such as 16x16, got {pattern!r}."
    )


def check_sparsity(sparsity: float) -> None:
    if not 0 < sparsity < 1:
        raise ValueError(f"--sparsity must be between 0 and 1, got {sparsity}.")


@torch.no_grad()
def prune(model: nn.Module, sparsity: float = 0.5, pattern: str = "unstructured") -> None:
    """Set the weights of the lowest magnitude to zero in each of the `layers`, in place.

    Args:
        sparsity: Share of zeros in each matrix and each expert, in (0, 1). A pattern n:m ignores it: its sparsity is
            `1 - n / m`.
        pattern: See `parse_pattern`.

    Raises:
        ValueError: The sparsity is out of range, a matrix cannot have the pattern, the weights are quantised, or it is
            not known how experts are stored.
    """
    check_sparsity(sparsity)
    parsed = parse_pattern(pattern)
    pruned = layers(model)
    if not pruned:
        raise ValueError("The model has no linear layers to prune.")
    for matrix in matrices(model):
        refuse_unknown_layout(matrix)
    for matrix in pruned:
        refuse_quantised(matrix)
        try:
            parsed.keep(matrix.values()[:1], sparsity)  # check one row of each before changing any
        except ValueError as error:
            raise ValueError(f"--pattern {pattern} does not fit {matrix.name}: {error}.") from error
    for matrix in pruned:
        values = matrix.values()
        values *= parsed.keep(values, sparsity)


def refuse_unknown_layout(matrix: Matrix) -> None:
    """Refuse a matrix that may hold experts if it is not known which dimension is their input.

    Raises:
        ValueError: It is a stack of matrices, or part of the experts.
    """
    module = type(matrix.module)
    if matrix.is_layer or module.__module__.startswith("torch.nn.") or matrix.kind.endswith("bias"):
        return
    shape = tuple(getattr(matrix.module, matrix.parameter).shape)
    is_stack = len(shape) > 2 and min(shape) > 1
    if is_stack or ("experts" in matrix.name.split(".") and not is_router(matrix.name)):
        raise ValueError(
            f"The model cannot be pruned: {matrix.name} of {module.__name__}, of shape {shape}, may hold experts, but "
            "it is not known which dimension is their input."
        )


def refuse_quantised(matrix: Matrix) -> None:
    if isinstance(matrix.module, Linear4bit | Linear8bitLt):
        raise ValueError(
            f"The weights of {matrix.name} are quantised. Load the model without --load_in_8bit and --load_in_4bit."
        )


# ---- Directories ----


@dataclass
class PruneArguments:
    """How to prune, and where to write the pruned model."""

    output_dir: str = field(metadata={"help": "A new directory for the pruned model and its tokenizer."})
    sparsity: float | None = field(
        default=None,
        metadata={"help": "Share of each matrix to set to zero. Default: 0.5; a pattern n:m sets its own."},
    )
    pattern: str = field(
        default="unstructured",
        metadata={"help": "unstructured; n:m (e.g. 2:4: at most 2 of 4 successive inputs); or blocks (e.g. 16x16)."},
    )

    def __post_init__(self) -> None:
        if isinstance(parse_pattern(self.pattern), Grouped) and self.sparsity is not None:
            raise ValueError(f"--sparsity cannot be used with --pattern {self.pattern}, which sets the sparsity.")
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
        refuse_in_use(self.output_dir)


def refuse_in_use(directory: str) -> None:
    path = Path(directory)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"--output_dir {directory} is not an empty directory. Give a new one.")


@dataclass(frozen=True)
class Pruned:
    """Results of pruning, counted on the written model.

    Attributes:
        sparsity: The `sparsity_report` of the pruned layers.
        left: Kinds of parameters that are not pruned.
        zeros: Number of zeros in the whole model, and number of its weights.
    """

    sparsity: dict[str, dict[str, float]]
    left: list[str]
    zeros: Count


def prune_to(load: LoadArguments, arguments: PruneArguments) -> Pruned:
    """Prune a model, write it to a directory, load it again, and return its sparsity.

    Raises:
        ValueError: It cannot be pruned with these arguments.
        RuntimeError: The written model has fewer zeros than the pruned one.
    """
    model = load_base(load, load_config(load), "cpu")
    prune(model, arguments.sparsity or 0.5, arguments.pattern)
    expected = zeros_in(layers(model))
    with written_whole(arguments.output_dir) as unfinished:
        model.save_pretrained(unfinished)
        load_tokenizer(load).save_pretrained(unfinished)
        del model
        written = load_written(load, unfinished)
        refuse_lost_zeros(expected, zeros_in(layers(written)))
        parameters = list(written.parameters())
        zeros = sum(int((each == 0).sum()) for each in parameters), sum(each.numel() for each in parameters)
        return Pruned(sparsity_report(written), left_in(written), zeros)


def zeros_in(counted: Iterable[Matrix]) -> dict[str, int]:
    """Return the number of zeros in each matrix, by its name."""
    return {matrix.name: int((matrix.values() == 0).sum()) for matrix in counted}


def refuse_lost_zeros(expected: dict[str, int], found: dict[str, int]) -> None:
    """Check that no matrix has fewer zeros than expected.

    Raises:
        RuntimeError: One has.
    """
    denser = [name for name, zeros in expected.items() if found.get(name, 0) < zeros]
    if denser:
        shown = ", ".join(denser[:3]) + ", ..." * (len(denser) > 3)
        raise RuntimeError(f"{len(denser)} matrices have fewer zeros than expected: {shown}.")


def left_in(model: nn.Module) -> list[str]:
    """Return the kinds of parameters that are not among the `layers`.

    >>> left_in(nn.ModuleDict({"embed_tokens": nn.Embedding(2, 2), "q_proj": nn.Linear(2, 2)}))
    ['embed_tokens', 'biases']
    """
    pruned = {(id(each.module), each.parameter) for each in layers(model)}
    kinds: dict[str, None] = {}
    for path, module in model.named_modules():
        named = [part for part in path.split(".") if part and not part.isdecimal()]
        of_router = [part for part in named if is_router(part)]
        for name, _ in module.named_parameters(recurse=False):
            if (id(module), name) not in pruned and not name.endswith("bias"):
                kinds[of_router[0] if of_router else named[-1] if name == "weight" and named else name] = None
    has_biases = any(name.endswith("bias") for name, _ in model.named_parameters())
    return [*kinds, *["biases"] * has_biases]


@contextlib.contextmanager
def written_whole(directory: str) -> Iterator[Path]:
    """Yield a temporary directory, which is renamed to `directory` at the end, or removed after an error."""
    path = Path(directory)
    unfinished = path.with_name(f"{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed
    try:
        yield unfinished
        if path.exists():
            path.rmdir()
        unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def describe_pruned(pruned: Pruned) -> list[str]:
    """Return one line per kind of layer, one about the parameters that are not pruned, and one about the model."""
    zeros, weights = pruned.zeros
    return [
        *describe_sparsity(pruned.sparsity),
        f"not pruned: {', '.join(pruned.left)}",
        f"whole model: {zeros / weights:.1%} of {weights:,} weights are zero",
    ]


def describe_sparsity(report: dict[str, dict[str, float]]) -> list[str]:
    """Return one line per kind of layer.

    >>> print(*describe_sparsity({"q_proj": {"zeros": 0.5, "2:4": 1.0}, "all": {"zeros": 0.5, "2:4": 1.0}}), sep="\\n")
    layer    zeros    2:4
    q_proj   50.0%   100%
    all      50.0%   100%
    """
    patterns = [name for name in next(iter(report.values())) if name != "zeros"]
    width = max(len("layer"), *map(len, report)) + 2
    lines = [f"{'layer':{width}}{'zeros':>6}" + "".join(f"{pattern:>7}" for pattern in patterns)]
    for kind, shares in report.items():
        lines.append(f"{kind:{width}}{shares['zeros']:6.1%}" + "".join(f"{shares[name]:7.0%}" for name in patterns))
    return lines
