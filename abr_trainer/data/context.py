"""Find the context length of a model in its configuration."""

from __future__ import annotations

from transformers import PreTrainedConfig

LENGTHS = (
    *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_seq_length", "max_sequence_length"),
    *("seq_length", "seq_len", "context_length", "model_max_length", "max_target_positions"),
)
"""Names of the context length in configurations, the usual name first. Recurrent models have none."""

AFTER_PADDING = {
    *("camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet"),
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}
"""Models whose positions start after the padding token's id, so that the first rows of their table are not used."""


def context_of(config: PreTrainedConfig) -> int | None:
    """Return the context length of a model in tokens; None if its configuration sets no limit."""
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in LENGTHS)
    length = next((each for each in found if isinstance(each, int) and each > 0), None)
    if length is not None and text.model_type in AFTER_PADDING:
        return length - (text.pad_token_id or 0) - 1
    return length


def fit_context(flag: str, wanted: int | None, default: int, config: PreTrainedConfig, virtual: int = 0) -> int:
    """Return the length that a flag gives, or the default, limited to the model's context length.

    Args:
        virtual: Number of virtual tokens that an adapter puts before the text.

    Raises:
        ValueError: The flag exceeds the model's context length, or an adapter takes all of it.
    """
    context = context_of(config)
    if context is None:
        return default if wanted is None else wanted
    left = context - virtual
    if left < 2:
        raise ValueError(
            f"The adapter uses {virtual} of the {context} tokens of the model's context, which leaves none for text."
        )
    if wanted is None:
        return min(left, default)
    if wanted > left:
        taken = f", of which the adapter uses {virtual}: give at most {left}" if virtual else ""
        raise ValueError(f"--{flag} {wanted} exceeds the model's context of {context} tokens{taken}.")
    return wanted
