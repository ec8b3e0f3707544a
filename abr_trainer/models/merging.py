"""Merge an adapter into its base model, and keep the zeros of a sparse base model if wanted."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel, PeftType
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..records.files import write_whole
from .adapters import FLAG, embeddings_in, load_adapter, read_adapter, unwrapped
from .arguments import AdaptedArguments
from .loading import heads_in, load_base, load_config, load_tokenizer, load_written
from .pruning import (
    Matrix,
    matrices,
    refuse_in_use,
    refuse_lost_zeros,
    refuse_quantised,
    sparsity_report,
    written_whole,
    zeros_in,
)

SPARSE = 0.05
"""A base model counts as sparse if the adapter changes a matrix with more than this share of zeros."""

LOST = 0.5
"""Warn if merging changes the logits by more than this share of the change that the adapter makes."""

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Allowed change of the logits, relative to their norm. In half precision, merging rounds every changed weight."""


@dataclass
class MergeArguments:
    """How to merge, and where to write the merged model."""

    output_dir: str = field(metadata={"help": "A new directory for the merged model and its tokenizer."})
    keep_mask: bool | None = field(
        default=None,
        metadata={
            "nargs": "?",  # so that it may be given without a value, like other boolean flags
            "const": True,
            "help": "Keep the zeros of the base model; false: a plain merge. Default: true if the base model is "
            "sparse, i.e. if the adapter changes a matrix with more than 5%% zeros.",
        },
    )

    def __post_init__(self) -> None:
        refuse_in_use(self.output_dir)


@dataclass(frozen=True)
class Merged:
    """Results of a merge. Changes of logits are relative to the norm of the logits before the merge.

    Attributes:
        keep_mask: Whether the zeros of the base model were kept.
        highest_zeros: The highest share of zeros in a matrix of the base model that the adapter changes.
        zeros_kept: Number of zeros that were kept, counted in the written model, and number of matrices with them.
        by_adapter: Change of the logits by the adapter.
        by_merging: Change of the logits by merging, from rounding and from the mask.
        by_writing: Change of the logits by writing and reading the model.
        dtype: Of the weights.
        sparsity: The `sparsity_report` of the written model.
    """

    keep_mask: bool
    highest_zeros: float
    zeros_kept: tuple[int, int]
    by_adapter: float
    by_merging: float
    by_writing: float
    dtype: str
    sparsity: dict[str, dict[str, float]]


def _keeping_zeros(model: PeftModel) -> list[Matrix]:
    """Return the matrices of the base model whose zeros the mask keeps.

    Fully trained embeddings or heads are not among them. Their rows of zeros are often added tokens, for which the
    adapter has trained values.
    """
    base: Any = model.get_base_model()
    embeddings, inside = unwrapped(base.get_input_embeddings()), f"{base.base_model_prefix}."
    return [
        each
        for each in matrices(model)
        if not each.is_replaced or (each.name.startswith(inside) and each.module is not embeddings)
    ]


def _changed(model: PeftModel) -> list[Matrix]:
    """Return those matrices of `_keeping_zeros` that the adapter changes."""
    return [each for each in _keeping_zeros(model) if each.is_adapted or each.is_replaced]


@torch.no_grad()
def zeros_under(model: PeftModel) -> float:
    """Return the highest share of zeros in a matrix of the base model that the adapter changes."""
    shares = [float((each.values() == 0).float().mean()) for each in _changed(model)]
    return max(shares, default=0.0)


@torch.no_grad()
def merge_adapter(model: PeftModel, keep_mask: bool = True) -> PreTrainedModel:
    """Return the base model with the adapter merged into it. By default, zeros stay zero.

    A plain merge fills the zeros that pruning made. With `keep_mask` the adapter changes only the other weights. The
    result differs from the base model with the adapter, so measure both. Tied embeddings stay tied, unless the adapter
    has changed embeddings and head differently.

    Raises:
        ValueError: The base model is quantised.
        RuntimeError: The merged model is less sparse than the base model.
    """
    for matrix in matrices(model):
        refuse_quantised(matrix)
    zeros = {matrix.name: matrix.values() == 0 for matrix in _changed(model)} if keep_mask else {}
    were_tied = _untie(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        merged: PreTrainedModel = model.merge_and_unload(safe_merge=True)
    if were_tied:
        _tie_if_equal(merged)
    for matrix in matrices(merged):
        if matrix.name in zeros:
            matrix.values().masked_fill_(zeros[matrix.name], 0)
    refuse_lost_zeros({name: int(mask.sum()) for name, mask in zeros.items()}, zeros_in(matrices(merged)))
    return merged


def _tables(base: Any) -> list[Any]:
    """Return the base model's modules for embeddings and head, without an adapter's wrappers."""
    found = (base.get_input_embeddings(), base.get_output_embeddings())
    return [unwrapped(module) for module in found if module is not None]


def _untie(model: PeftModel) -> bool:
    """Untie head and embeddings, so that merging changes only one of them. Return whether they were tied."""
    embeddings, *heads = _tables(model.get_base_model())
    if not heads or heads[0].weight is not embeddings.weight:
        return False
    heads[0].weight = nn.Parameter(embeddings.weight.detach().clone(), requires_grad=False)
    return True


def _tie_if_equal(model: PreTrainedModel) -> None:
    embeddings, head = _tables(model)
    if is_tied := torch.equal(embeddings.weight, head.weight):
        head.weight = embeddings.weight
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = is_tied


def check_mergeable(load: AdaptedArguments, **labels: Any) -> tuple[str, PreTrainedConfig]:
    """Return the adapter and the configuration of its base model, if they can be merged.

    Args:
        labels: Settings for the labels in the configuration of a classifier.

    Raises:
        ValueError: There is no adapter, it changes no weights, or the base model is quantised.
    """
    adapter = load.adapter_name_or_path
    if adapter is None:
        raise ValueError(f"{FLAG} is missing. Give the adapter to merge.")
    kind = read_adapter(adapter, load.task)
    if kind.is_prompt_learning:
        raise ValueError(
            f"{FLAG} {adapter} is of the kind {PeftType(kind.peft_type).value}, which changes no weights and cannot "
            "be merged."
        )
    if load.is_quantised:
        raise ValueError(
            "An adapter cannot be merged into quantised weights. Leave out --load_in_8bit and --load_in_4bit."
        )
    config = load_config(load, **labels)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"The weights of --model_name_or_path {load.model_name_or_path} are quantised. Give the model before "
            "quantisation."
        )
    return adapter, config


def merge_to(
    load: AdaptedArguments,
    arguments: MergeArguments,
    labels: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
) -> Merged:
    """Merge an adapter into its base model, write the result to a directory, and check it.

    The written model is loaded with plain transformers. Its logits on 64 tokens, spread over the vocabulary, must be
    those of the base model with the adapter, up to `TOLERANCE`. With a mask they are compared with the merged model in
    memory, and no matrix may have fewer zeros than in the base model. If a check fails, no directory is left.

    Args:
        labels: Settings for the labels in the configuration of a classifier.
        files: Contents of other files to write, by name.

    Raises:
        ValueError: They cannot be merged.
        RuntimeError: The written model fails a check.
    """
    adapter, config = check_mergeable(load, **(labels or {}))
    tokenizer = load_tokenizer(load)
    base = load_base(load, config, "cpu")
    if heads := heads_in(base, load.task):
        base.config.pad_token_id = tokenizer.pad_token_id  # a classifier needs it to find the end of a row
    model = load_adapter(base, adapter, load.model_name_or_path, task=load.task)
    zeros = zeros_under(model)
    keep_mask = zeros > SPARSE if arguments.keep_mask is None else arguments.keep_mask
    expected_zeros = zeros_in(_keeping_zeros(model)) if keep_mask else {}
    ids = _spread_tokens(model)
    if heads:
        ids = ids.view(8, 8)  # a classifier returns one result per row
    beside = _logits(model, ids)
    with model.disable_adapter():
        by_adapter = _distance(_logits(model, ids), beside)
    merged = merge_adapter(model, keep_mask)
    expected = _logits(merged, ids)
    by_merging, dtype = _distance(expected, beside), merged.dtype
    with written_whole(arguments.output_dir) as unfinished:
        merged.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        for name, content in (files or {}).items():
            write_whole(unfinished / name, content)
        del model, base, merged
        written = load_written(load, unfinished)
        refuse_lost_zeros(expected_zeros, zeros_in(matrices(written)))
        by_writing = _distance(_logits(written, ids), expected)
        moved, tolerance = by_writing + (0 if keep_mask else by_merging), TOLERANCE.get(dtype, 1e-5)
        if not moved <= tolerance:  # also if it is NaN
            raise RuntimeError(
                f"The merged model differs from {adapter} on {load.model_name_or_path}: its logits differ by "
                f"{moved:.1e} of their norm, more than {tolerance:.0e}. Try --torch_dtype float32, which rounds less. "
                "If that does not help, this adapter cannot be merged."
            )
        return Merged(
            keep_mask=keep_mask,
            highest_zeros=zeros,
            zeros_kept=(sum(expected_zeros.values()), sum(count > 0 for count in expected_zeros.values())),
            by_adapter=by_adapter,
            by_merging=by_merging,
            by_writing=by_writing,
            dtype=str(dtype).removeprefix("torch."),
            sparsity=sparsity_report(written),
        )


def _spread_tokens(model: PeftModel) -> Tensor:
    """Return shuffled tokens `(1, 64)` at even distances in the vocabulary, including the first and the last."""
    ids = torch.linspace(0, embeddings_in(model.get_base_model()) - 1, 64).long()
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))][None]


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = model.eval()(ids).logits
    return logits.float()


def _distance(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).norm() / expected.norm())


def describe_merge(merged: Merged) -> list[str]:
    """Return one line each about the mask and the results of the checks."""
    share = f"up to {merged.highest_zeros:.1%} of a matrix that the adapter changes is zero in the base model"
    how = "the merged model in memory" if merged.keep_mask else "the base model with the adapter"
    zeros, matrices_with_zeros = merged.zeros_kept
    counted = f"; the written model has all {zeros:,} zeros in {matrices_with_zeros:,} matrices"
    lines = [
        f"mask        {'kept' if merged.keep_mask else 'not kept'}: {share}{counted if merged.keep_mask else ''}",
        f"logits      merging changed them by {merged.by_merging:.1e} of their norm, the adapter by "
        f"{merged.by_adapter:.1e}",
        f"written     {merged.dtype}; its logits differ from {how} by {merged.by_writing:.1e}",
    ]
    if merged.by_merging > LOST * merged.by_adapter:
        lines.append(f"warning     {_describe_loss(merged)}")
    return lines


def _describe_loss(merged: Merged) -> str:
    share = f"{merged.by_merging / merged.by_adapter:.0%} of" if merged.by_adapter else "more than"
    if merged.keep_mask:
        return (
            f"mask and rounding change the logits by {share} the adapter's change. Measure both models, or merge with "
            "--keep_mask false, which fills the zeros"
        )
    if merged.dtype == "float32":
        return f"the adapter changes the logits so little that rounding is {share} its change"
    return (
        f"rounding to {merged.dtype} changes the logits by {share} the adapter's change. Merge with "
        "--torch_dtype float32"
    )
