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
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .adapters import WRAPPED
from .modeling import LoadArguments, load_base, load_config, load_tokenizer
from .perplexity import without_adapter

LAYERS = (nn.Linear, Conv1D)
"""Layers that are pruned; quantised ones are kinds of these."""

ADAPTER = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "modules_to_save", "token_adapter")
"""Names of modules that belong to an adapter."""


# ---- What there is ----

Count = tuple[int, int]
"""How many have a property, and of how many."""


@dataclass(frozen=True)
class Matrix:
    """A matrix of the base model.

    Attributes:
        name: As in the base model, also inside an adapter.
        module: Whose weight it is.
        is_adapted: Whether an adapter stands beside it.
    """

    name: str
    module: nn.Module
    is_adapted: bool

    @property
    def kind(self) -> str:
        """Its name in a block, q_proj for one."""
        return self.name.rpartition(".")[2]

    def values(self) -> Tensor:
        """Return the values, `(outputs, inputs)`: of 4-bit weights those that they stand for, of 8-bit ones integers,
        of which a zero may be a rounded value.
        """
        weight: Tensor = self.module.weight.data  # type: ignore[assignment]
        state = getattr(self.module.weight, "quant_state", None)
        if isinstance(self.module, Linear4bit) and state is not None:
            return dequantize_4bit(weight, state)
        return weight.T if isinstance(self.module, Conv1D) else weight


def matrices(model: nn.Module) -> Iterator[Matrix]:
    """Yield the matrices of linear layers and embeddings, tied ones once; those of an adapter are left out, also
    where it has trained a layer in the place of the base's.
    """
    seen: set[int] = set()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, (*LAYERS, nn.Embedding)) or weight is None or id(weight) in seen:
            continue
        parts = [part for part in name.removeprefix("base_model.model.").split(".") if part not in WRAPPED]
        if not set(parts) & set(ADAPTER):
            seen.add(id(weight))
            yield Matrix(".".join(parts), module, is_adapted=name.endswith(".base_layer"))


def layers(model: nn.Module) -> list[Matrix]:
    """Return the linear layers of the blocks: all but the head."""
    base = without_adapter(model)
    head = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None  # type: ignore[no-untyped-call]
    return [each for each in matrices(model) if isinstance(each.module, LAYERS) and each.module is not head]


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
    """Set the weights of the lowest magnitude to zero, in each linear layer but the head, in place.

    Args:
        sparsity: Share of zeros in each matrix; a pattern n:m has its own, `1 - n / m`.
        pattern: See `parse_pattern`.

    Raises:
        ValueError: The share is none, a matrix does not have that pattern, or the weights are quantised.
    """
    check_sparsity(sparsity)
    parsed = parse_pattern(pattern)
    pruned = layers(model)
    if not pruned:
        raise ValueError("The model has no linear layers that could be pruned.")
    for matrix in pruned:
        refuse_quantised(matrix)
        try:
            parsed.keep(matrix.values()[:1], sparsity)  # a row tells, before anything is changed
        except ValueError as error:
            raise ValueError(f"--pattern {pattern} does not fit {matrix.name}: {error}.") from error
    for matrix in pruned:
        values = matrix.values()
        values *= parsed.keep(values, sparsity)


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


def prune_to(load: LoadArguments, arguments: PruneArguments) -> dict[str, dict[str, float]]:
    """Prune a model into a directory, and return its `sparsity_report`."""
    model = load_base(load, load_config(load), "cpu")
    prune(model, arguments.sparsity or 0.5, arguments.pattern)
    with written_whole(arguments.output_dir) as unfinished:
        model.save_pretrained(unfinished)
        load_tokenizer(load).save_pretrained(unfinished)
    return sparsity_report(model)


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
