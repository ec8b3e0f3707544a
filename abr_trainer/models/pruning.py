"""Sparse models: how much of a model is zero and in what pattern, and pruning by magnitude."""

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
"""Layers that are pruned; quantised ones are kinds of these."""


# ---- What there is ----

Count = tuple[int, int]
"""How many have a property, and of how many."""


@dataclass(frozen=True)
class Matrix:
    """A matrix of the base model: a layer, a table of embeddings, one expert of a stack, or any other parameter.

    Attributes:
        name: As in the base model, also inside an adapter; of an expert with its index.
        module: Whose parameter it is.
        parameter: Name of the parameter in the module.
        is_adapted: Whether an adapter changes it.
        is_replaced: Whether an adapter has trained the whole module in the place of this one.
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
        """Its name in a block, q_proj for one."""
        return self.name.rpartition(".")[2]

    @property
    def is_layer(self) -> bool:
        """Whether it multiplies inputs: a linear layer or an expert."""
        return self.expert is not None or isinstance(self.module, LAYERS)

    def values(self) -> Tensor:
        """Return the values, of layers `(outputs, inputs)`: of 4-bit weights those that they stand for, of 8-bit ones
        integers, of which a zero may be a rounded value.
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
    """Yield the parameters of at least two dimensions, tied ones once, each expert of a stack by itself; those of an
    adapter are left out, also where it has trained a layer in the place of the base's.
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
    """Return the linear layers of the blocks and their experts: all but the head, and what chooses experts, which is
    small and sends tokens to other experts when it is pruned.
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
    """Return the share of weights that are not zero for each kind of layer, by its name in a block, and for `all`.

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
    """Return, for each kind of linear layer and for `all`, the share of zeros, and how much has each pattern.

    Of a pattern n:m it is the share of groups of m inputs with at most n values that are not zero; of a block pattern
    that of blocks that are all zero. A matrix whose inputs do not divide into groups has none.
    """
    parsed = {pattern: parse_pattern(pattern) for pattern in patterns}

    def count(values: Tensor) -> dict[str, Count]:
        zeros = int((values == 0).sum()), values.numel()
        return {"zeros": zeros} | {pattern: each.having(values) for pattern, each in parsed.items()}

    return _shares(layers(model), count)


def _shares(counted: Iterable[Matrix], count: Callable[[Tensor], dict[str, Count]]) -> dict[str, dict[str, float]]:
    """Return the shares of what is counted in matrices, for each kind of them and then for `all`."""
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
        """Return a mask that leaves out the lowest magnitudes: exactly this share, rounded down."""
        lowest = values.abs().flatten().argsort(stable=True)[: int(sparsity * values.numel())]
        mask = torch.ones(values.numel(), dtype=torch.bool, device=values.device)
        mask[lowest] = False
        return mask.view_as(values)

    def having(self, values: Tensor) -> tuple[int, int]:
        """Return how many weights have this pattern, and of how many: all have."""
        return values.numel(), values.numel()


@dataclass(frozen=True)
class Grouped:
    """At most `n` of each `m` successive inputs, the pattern that sparse tensor cores want (2:4)."""

    n: int
    m: int

    def keep(self, values: Tensor, sparsity: float) -> Tensor:
        """Return a mask that keeps the `n` highest magnitudes of each group.

        Raises:
            ValueError: The inputs do not divide into groups.
        """
        if values.shape[1] % self.m:
            raise ValueError(f"{values.shape[1]} inputs do not divide into groups of {self.m}")
        groups = values.abs().reshape(-1, self.m)
        kept = groups.argsort(dim=1, stable=True)[:, self.m - self.n :]
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, kept, True).view_as(values)

    def having(self, values: Tensor) -> tuple[int, int]:
        """Return how many groups have this pattern, and of how many; none where inputs do not divide into groups."""
        if values.shape[1] % self.m:
            return 0, math.ceil(values.numel() / self.m)
        counts = (values.reshape(-1, self.m) != 0).sum(dim=1)
        return int((counts <= self.n).sum()), len(counts)


@dataclass(frozen=True)
class Blocks:
    """Whole blocks; those at the lower and right edge may be smaller."""

    rows: int
    columns: int

    def _cut(self, values: Tensor) -> Tensor:
        """Return `(blocks down, blocks across, rows, columns)`, filled up with zeros."""
        missing = (-values.shape[1] % self.columns, -values.shape[0] % self.rows)
        filled = nn.functional.pad(values, (0, missing[0], 0, missing[1]))
        down, across = filled.shape[0] // self.rows, filled.shape[1] // self.columns
        return filled.reshape(down, self.rows, across, self.columns).transpose(1, 2)

    def keep(self, values: Tensor, sparsity: float) -> Tensor:
        """Return a mask that leaves out the blocks of the lowest norm: this share of blocks, rounded down."""
        norms = self._cut(values.float()).square().sum(dim=(2, 3))
        kept = Unstructured().keep(norms, sparsity)
        mask = kept.repeat_interleave(self.rows, dim=0).repeat_interleave(self.columns, dim=1)
        return mask[: values.shape[0], : values.shape[1]]

    def having(self, values: Tensor) -> tuple[int, int]:
        """Return how many blocks are all zero, and of how many."""
        is_zero = (self._cut(values) == 0).all(dim=3).all(dim=2)
        return int(is_zero.sum()), is_zero.numel()


def parse_pattern(pattern: str) -> Unstructured | Grouped | Blocks:
    """Return what `unstructured`, `2:4` or `16x16` stands for.

    Raises:
        ValueError: It is none of these forms.
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
        f"--pattern must be 'unstructured', n:m with n below m, or rows x columns as 16x16, got {pattern!r}."
    )


def check_sparsity(sparsity: float) -> None:
    if not 0 < sparsity < 1:
        raise ValueError(f"--sparsity must lie between 0 and 1, got {sparsity}.")


@torch.no_grad()
def prune(model: nn.Module, sparsity: float = 0.5, pattern: str = "unstructured") -> None:
    """Set the weights of the lowest magnitude to zero, in each of the `layers`, in place.

    Args:
        sparsity: Share of zeros in each matrix, of experts in each expert; a pattern n:m has its own, `1 - n / m`.
        pattern: See `parse_pattern`.

    Raises:
        ValueError: The share is none, a matrix does not have that pattern, the weights are quantised, or it cannot be
            known how experts are stored.
    """
    check_sparsity(sparsity)
    parsed = parse_pattern(pattern)
    pruned = layers(model)
    if not pruned:
        raise ValueError("The model has no linear layers that could be pruned.")
    for matrix in matrices(model):
        refuse_unknown_layout(matrix)
    for matrix in pruned:
        refuse_quantised(matrix)
        try:
            parsed.keep(matrix.values()[:1], sparsity)  # a row tells, before anything is changed
        except ValueError as error:
            raise ValueError(f"--pattern {pattern} does not fit {matrix.name}: {error}.") from error
    for matrix in pruned:
        values = matrix.values()
        values *= parsed.keep(values, sparsity)


def refuse_unknown_layout(matrix: Matrix) -> None:
    """Refuse what may hold experts, but does not say along which dimension their inputs lie.

    Raises:
        ValueError: It is a stack of matrices, or among the experts.
    """
    module = type(matrix.module)
    if matrix.is_layer or module.__module__.startswith("torch.nn.") or matrix.kind.endswith("bias"):
        return
    shape = tuple(getattr(matrix.module, matrix.parameter).shape)
    is_stack = len(shape) > 2 and min(shape) > 1
    if is_stack or ("experts" in matrix.name.split(".") and not is_router(matrix.name)):
        raise ValueError(
            f"{matrix.name} of {module.__name__}, of shape {shape}, may hold experts, but it is not known which "
            "dimension has the inputs: such a model cannot be pruned here."
        )


def refuse_quantised(matrix: Matrix) -> None:
    if isinstance(matrix.module, Linear4bit | Linear8bitLt):
        raise ValueError(
            f"The weights of {matrix.name} are quantised: load the model without --load_in_8bit and --load_in_4bit."
        )


# ---- Directories ----


@dataclass
class PruneArguments:
    """How to prune, and where the pruned model goes."""

    output_dir: str = field(metadata={"help": "A new directory for the pruned model and its tokenizer."})
    sparsity: float | None = field(
        default=None,
        metadata={"help": "Share of each matrix that is set to zero. Default: 0.5; a pattern n:m has its own."},
    )
    pattern: str = field(
        default="unstructured",
        metadata={"help": "unstructured; n:m, at most n of m successive inputs (2:4); or blocks, 16x16."},
    )

    def __post_init__(self) -> None:
        if isinstance(parse_pattern(self.pattern), Grouped) and self.sparsity is not None:
            raise ValueError(f"--sparsity means nothing to --pattern {self.pattern}, which has its own.")
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
        refuse_in_use(self.output_dir)


def refuse_in_use(directory: str) -> None:
    path = Path(directory)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"--output_dir {directory} is in use. Give a new one.")


@dataclass(frozen=True)
class Pruned:
    """What was written, counted on the model as it is loaded again.

    Attributes:
        sparsity: The `sparsity_report`, which is of the layers that are pruned.
        left: Kinds of other parameters, which are left as they are.
        zeros: How many weights of the whole model are zero, and of how many.
    """

    sparsity: dict[str, dict[str, float]]
    left: list[str]
    zeros: Count


def prune_to(load: LoadArguments, arguments: PruneArguments) -> Pruned:
    """Prune a model into a directory, load it again, and say how sparse it is.

    Raises:
        ValueError: It cannot be pruned so.
        RuntimeError: What was written has fewer zeros than what was pruned.
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
    """Return how many weights of each matrix are zero, by its name."""
    return {matrix.name: int((matrix.values() == 0).sum()) for matrix in counted}


def refuse_lost_zeros(expected: dict[str, int], found: dict[str, int]) -> None:
    """Raise if a matrix has fewer zeros than are expected.

    Raises:
        RuntimeError: One has.
    """
    denser = [name for name, zeros in expected.items() if found.get(name, 0) < zeros]
    if denser:
        shown = ", ".join(denser[:3]) + ", ..." * (len(denser) > 3)
        raise RuntimeError(f"{len(denser)} matrices have fewer zeros than they should have: {shown}.")


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
    """Yield a directory to write to that becomes this one at the end, and is gone after an error."""
    path = Path(directory)
    unfinished = path.with_name(f"{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # what a kill has left
    try:
        yield unfinished
        if path.exists():
            path.rmdir()
        unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def describe_pruned(pruned: Pruned) -> list[str]:
    """Return a line a kind of layer, and one each on the layers that are left and on the whole model."""
    zeros, weights = pruned.zeros
    return [
        *describe_sparsity(pruned.sparsity),
        f"left as they are: {', '.join(pruned.left)}",
        f"whole model: {zeros / weights:.1%} of {weights:,} weights are zero",
    ]


def describe_sparsity(report: dict[str, dict[str, float]]) -> list[str]:
    """Return a line a kind of layer.

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
