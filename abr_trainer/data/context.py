"""How many tokens a model can attend to, by its configuration."""

from __future__ import annotations

from transformers import PreTrainedConfig

LENGTHS = (
    *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_seq_length", "max_sequence_length"),
    *("seq_length", "seq_len", "context_length", "model_max_length", "max_target_positions"),
)
"""What configurations call it, the usual name first. Models that read tokens one by one have none of them."""

AFTER_PADDING = {
    *("camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet"),
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}
"""Models that count positions from the one after the padding token: so many rows of their table are never used."""


def context_of(config: PreTrainedConfig) -> int | None:
    """Return how many tokens a model can attend to; None if its configuration sets no limit."""
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in LENGTHS)
    length = next((each for each in found if isinstance(each, int) and each > 0), None)
    if length is not None and text.model_type in AFTER_PADDING:
        return length - (text.pad_token_id or 0) - 1
    return length


def fit_context(flag: str, wanted: int | None, default: int, config: PreTrainedConfig, virtual: int = 0) -> int:
    """Return the length that a flag asks for; if it asks for none, the default, at most what the model can attend to.

    Args:
        virtual: Tokens that an adapter puts before the others.

    Raises:
        ValueError: It asks for more than the model's context, or an adapter takes all of it.
    """
    context = context_of(config)
    if context is None:
        return default if wanted is None else wanted
    left = context - virtual
    if left < 2:
        raise ValueError(
            f"The adapter puts {virtual} tokens into a context of {context}: that leaves no room for text."
        )
    if wanted is None:
        return min(left, default)
    if wanted > left:
        taken = f", of which the adapter takes {virtual}: give at most {left}" if virtual else ""
        raise ValueError(f"--{flag} {wanted} exceeds the model's context of {context} tokens{taken}.")
    return wanted
