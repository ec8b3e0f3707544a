"""Let a model continue prompts greedily, without a trace of it in the training that goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, gather_object
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..data.context import context_of
from ..data.prompts import Prompt, written
from ..models.loading import shards_weights
from ..models.unwrapping import without_adapter
from .evaluation import same_random_numbers

Settings: Any = GenerationConfig  # it has no types


def why_not(model: Any) -> str | None:
    """Return why a model cannot continue text here; None if it can."""
    if shards_weights():
        return (
            "FSDP and ZeRO-3 split the weights over ranks, so each token would gather all of them. Use DDP or ZeRO-2"
        )
    inner = without_adapter(model)
    can_generate = getattr(inner, "can_generate", None)
    if can_generate is None or not can_generate() or inner.config.is_encoder_decoder:
        return f"{type(inner).__name__} is no causal language model that generates"
    return None


@contextlib.contextmanager
def _writing(model: Any) -> Iterator[None]:
    """Switch dropout off and set the model's own settings of generation aside; put back all that may have changed.

    These settings, such as a penalty for repetitions, would else fill what a call leaves open.
    """
    inner = without_adapter(model)
    modes, settings = {module: module.training for module in model.modules()}, inner.generation_config
    with same_random_numbers():
        try:
            model.eval()
            inner.generation_config = Settings()
            yield
        finally:
            inner.generation_config = settings
            for module, is_training in modes.items():
                module.training = is_training


def continue_prompts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    batch_size: int,
    most: int | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> dict[int, str]:
    """Return greedy continuations by the indices of their prompts: those of each `ranks`-th batch, from `rank` on.

    The batches are the same however many ranks share them, and so is what is written to the last letter. All prompts
    of a batch are continued equally far, so none stands beside others that would take it past the model's context.

    Args:
        model: Not wrapped by DDP.
        batch_size: Prompts at a time. The shortest come first, so that little is padding.
        most: Tokens that are added at most, beside what each prompt allows.
    """
    allowed = [min(prompt.most, most or prompt.most) for prompt in prompts]
    batches = _batches(
        [len(prompt.ids) for prompt in prompts], allowed, batch_size, context_of(without_adapter(model).config)
    )
    ends = _ends(model, tokenizer)
    found: dict[int, str] = {}
    with _writing(model):
        for batch in batches[rank::ranks]:
            furthest = max(allowed[index] for index in batch)
            added = _generate(model, tokenizer, [prompts[index].ids for index in batch], furthest, ends)
            for index, ids in zip(batch, added, strict=True):
                end = next((place for place, token in enumerate(ids) if token in ends), len(ids))
                found[index] = written(tokenizer, prompts[index].ids, ids[: min(end, allowed[index])])
    return found


def _batches(lengths: Sequence[int], allowed: Sequence[int], size: int, context: int | None) -> list[list[int]]:
    """Return indices of prompts in batches, the shortest first.

    >>> _batches([9, 2, 3], allowed=[3, 8, 8], size=8, context=12)
    [[1, 2], [0]]
    """
    batches: list[list[int]] = []
    furthest = 0
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        furthest = max(furthest, allowed[index])
        is_too_long = context is not None and lengths[index] + furthest > context
        if not batches or len(batches[-1]) == size or is_too_long:
            batches.append([])
            furthest = allowed[index]
        batches[-1].append(index)
    return batches


def continue_over_ranks(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], batch_size: int, state: Any
) -> list[str]:
    """Return a continuation of each prompt, on all ranks; each rank writes its share of the batches."""
    alone = extract_model_from_parallel(model)
    mine = continue_prompts(alone, tokenizer, prompts, batch_size, rank=state.process_index, ranks=state.num_processes)
    found = dict(gather_object(list(mine.items())))
    return [found[index] for index in range(len(prompts))]


def _ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that end a text: that of the tokenizer, and those of the model, which may have several."""
    of_model = getattr(without_adapter(model).generation_config, "eos_token_id", None)
    listed = of_model if isinstance(of_model, list) else [of_model]
    return {int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None}


def _generate(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], most: int, ends: set[int]
) -> list[list[int]]:
    """Return the tokens that come after each prompt, padding included."""
    width = max(map(len, prompts))
    padding = next((token for token in (tokenizer.pad_token_id, *sorted(ends)) if token is not None), 0)
    device = next(model.parameters()).device
    ids = torch.tensor([[padding] * (width - len(row)) + list(row) for row in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
    settings = Settings(
        do_sample=False,
        max_new_tokens=most,
        use_cache=True,  # training may have switched it off in the model's configuration
        pad_token_id=padding,
        eos_token_id=sorted(ends) or None,
    )
    with torch.no_grad():
        made = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    rows: list[list[int]] = made[:, width:].tolist()
    return rows
