"""An adapter becomes part of its base, plainly or under the mask of a sparse one, in a model that anybody can load."""

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
"""A base counts as sparse where an adapter changes a matrix with more than this share of zeros."""

LOST = 0.5
"""An adapter counts as lost where merging moves the logits by more than this share of what the adapter does."""

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far logits may move, as a share of their norm: in half precision a merge rounds every weight that it changes."""


@dataclass
class MergeArguments:
    """How to merge, and where the merged model goes."""

    output_dir: str = field(metadata={"help": "A new directory for the merged model and its tokenizer."})
    keep_mask: bool | None = field(
        default=None,
        metadata={
            "nargs": "?",  # so that it may stand alone, as other flags that are true or false
            "const": True,
            "help": "Leave at zero what is zero in the base; false: a plain merge. Default: true where the base is "
            "sparse, that is where the adapter changes a matrix of which more than a twentieth is zero.",
        },
    )

    def __post_init__(self) -> None:
        refuse_in_use(self.output_dir)


@dataclass(frozen=True)
class Merged:
    """What a merge has done. Differences of logits are shares of the norm of those with the adapter beside the base.

    Attributes:
        keep_mask: Whether zeros of the base were kept.
        highest_zeros: The highest share of zeros in a matrix of the base that the adapter changes.
        zeros_kept: How many zeros of the base were kept, as counted in what was written, and in how many matrices.
        by_adapter: How far the adapter moves the logits.
        by_merging: How far merging does: rounding, and what the mask takes away.
        by_writing: How far writing and reading does.
        dtype: Of the weights.
        sparsity: The `sparsity_report` of what was written.
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
    """Return the matrices of the base of which zeros stay zero under the mask.

    Embeddings or a head that were trained as a whole are not among them: their rows of zeros are often tokens that
    were added, which the adapter has given values.
    """
    base: Any = model.get_base_model()
    embeddings, inside = unwrapped(base.get_input_embeddings()), f"{base.base_model_prefix}."
    return [
        each
        for each in matrices(model)
        if not each.is_replaced or (each.name.startswith(inside) and each.module is not embeddings)
    ]


def _changed(model: PeftModel) -> list[Matrix]:
    """Return those of them that the adapter changes."""
    return [each for each in _keeping_zeros(model) if each.is_adapted or each.is_replaced]


@torch.no_grad()
def zeros_under(model: PeftModel) -> float:
    """Return the highest share of zeros in a matrix of the base that the adapter changes."""
    shares = [float((each.values() == 0).float().mean()) for each in _changed(model)]
    return max(shares, default=0.0)


@torch.no_grad()
def merge_adapter(model: PeftModel, keep_mask: bool = True) -> PreTrainedModel:
    """Return the base model with the adapter merged into it; what was zero stays zero, unless told otherwise.

    A plain merge fills the zeros that pruning made. Under the mask the adapter's change is applied to the weights that
    are left: another model than the one with the adapter beside it, so measure both. Embeddings and a head that were
    one matrix stay so, unless the adapter has changed them apart.

    Raises:
        ValueError: The base is quantised.
        RuntimeError: The merged model is not as sparse as the base was.
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
    """Return the modules of the base that hold embeddings and head, out of what an adapter wraps them in."""
    found = (base.get_input_embeddings(), base.get_output_embeddings())
    return [unwrapped(module) for module in found if module is not None]


def _untie(model: PeftModel) -> bool:
    """Give the head a matrix of its own if it shares that of the embeddings: merged into one, a change of either would
    be one of both. Tell whether it did.
    """
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
    """Return the adapter and the configuration of its base, if that can become one model.

    Args:
        labels: What the configuration of a classifier says of its labels.

    Raises:
        ValueError: There is no adapter, it changes no weights, or the base is quantised.
    """
    adapter = load.adapter_name_or_path
    if adapter is None:
        raise ValueError(f"{FLAG} is missing: what to merge.")
    kind = read_adapter(adapter, load.task)
    if kind.is_prompt_learning:
        raise ValueError(f"{FLAG} {adapter} is of the kind {PeftType(kind.peft_type).value}: it changes no weights.")
    if load.is_quantised:
        raise ValueError("An adapter is merged into weights as they are: without --load_in_8bit, --load_in_4bit.")
    config = load_config(load, **labels)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"The weights of --model_name_or_path {load.model_name_or_path} are quantised: give the model that they "
            "were made from."
        )
    return adapter, config


def merge_to(
    load: AdaptedArguments,
    arguments: MergeArguments,
    labels: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
) -> Merged:
    """Merge an adapter into its base, into a directory, all or nothing, and make sure of what was written.

    It is loaded again as anybody would. Its logits must be those of the base with the adapter beside it, under a mask
    those of the merged model in memory: up to `TOLERANCE`, on 64 tokens from all over the vocabulary. Under a mask
    no matrix may have fewer zeros than in the base.

    Args:
        labels: What the configuration of a classifier says of its labels.
        files: What else to write there, by name.

    Raises:
        ValueError: They cannot be merged.
        RuntimeError: What was written is another model.
    """
    adapter, config = check_mergeable(load, **(labels or {}))
    tokenizer = load_tokenizer(load)
    base = load_base(load, config, "cpu")
    if heads := heads_in(base, load.task):
        base.config.pad_token_id = tokenizer.pad_token_id  # or it cannot tell where a row ends
    model = load_adapter(base, adapter, load.model_name_or_path, task=load.task)
    zeros = zeros_under(model)
    keep_mask = zeros > SPARSE if arguments.keep_mask is None else arguments.keep_mask
    expected_zeros = zeros_in(_keeping_zeros(model)) if keep_mask else {}
    ids = _tokens_from_all_over(model)
    if heads:
        ids = ids.view(8, 8)  # a classifier says one thing of each row
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
        if not moved <= tolerance:  # nor if it is not a number
            raise RuntimeError(
                f"What would be written says something else than {adapter} on {load.model_name_or_path}: its logits "
                f"differ by {moved:.1e} of their norm, above {tolerance:.0e}. --torch_dtype float32 rounds less; if "
                "that does not help, this adapter cannot be merged."
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


def _tokens_from_all_over(model: PeftModel) -> Tensor:
    """Return tokens `(1, 64)` at even distances in the vocabulary, the first and the last included, shuffled."""
    ids = torch.linspace(0, embeddings_in(model.get_base_model()) - 1, 64).long()
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))][None]


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = model.eval()(ids).logits
    return logits.float()


def _distance(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).norm() / expected.norm())


def describe_merge(merged: Merged) -> list[str]:
    """Return a line each on the mask, and on what was made sure of."""
    share = f"up to {merged.highest_zeros:.1%} of a matrix that the adapter changes is zero in the base"
    how = "merged under the mask" if merged.keep_mask else "the base with the adapter"
    zeros, matrices_with_zeros = merged.zeros_kept
    counted = f"; all {zeros:,} zeros in {matrices_with_zeros:,} matrices were counted in what was written"
    lines = [
        f"mask        {'kept' if merged.keep_mask else 'not kept'}: {share}{counted if merged.keep_mask else ''}",
        f"logits      merging moved them by {merged.by_merging:.1e} of their norm, the adapter by "
        f"{merged.by_adapter:.1e}",
        f"written     {merged.dtype}, loads as {how}, to {merged.by_writing:.1e}",
    ]
    if merged.by_merging > LOST * merged.by_adapter:
        lines.append(f"warning     {_describe_loss(merged)}")
    return lines


def _describe_loss(merged: Merged) -> str:
    share = f"{merged.by_merging / merged.by_adapter:.0%} of" if merged.by_adapter else "more than"
    if merged.keep_mask:
        return (
            f"mask and rounding take away {share} what the adapter does: measure both, or merge with "
            "--keep_mask false, which fills the zeros"
        )
    if merged.dtype == "float32":
        return f"the adapter does so little that rounding is {share} it"
    return (
        f"the adapter is lost in rounding: that to {merged.dtype} moves the logits by {share} what the adapter does. "
        "Merge with --torch_dtype float32"
    )
