"""How many tokens a model takes, by what its configuration calls it, beside the model itself."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    FalconMambaConfig,
    LlamaConfig,
    MambaConfig,
    XLNetConfig,
)

from abr_trainer.data.context import context_of, fit_context

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
GPT = {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
LIMITED = {
    "gpt2": GPT,
    "gptj": {**GPT, "rotary_dim": 4},
    "openai-gpt": GPT,
    "ctrl": {**GPT, "dff": 32},
    "opt": {**SMALL, "ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
    "gpt_neo": {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_layers": 1,
        "num_heads": 2,
        "window_size": 8,
        "attention_types": [[["global"], 1]],
        "max_position_embeddings": 32,
    },
    "mpt": {"vocab_size": 64, "d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": 32},
    "roberta": {
        **SMALL,
        "intermediate_size": 32,
        "is_decoder": True,
        "pad_token_id": 1,
        "max_position_embeddings": 34,
    },
}
"""Models that cannot take a token more than 32, each saying so in its own way."""


@pytest.mark.parametrize("kind", LIMITED)
def test_the_context_is_what_the_model_takes_and_no_more(kind):
    config = AutoConfig.for_model(kind, **LIMITED[kind])
    model = AutoModelForCausalLM.from_config(config).eval()
    context = context_of(config)
    assert context == 32
    with torch.no_grad():
        assert model(torch.full((1, context), 5), use_cache=False).logits.shape == (1, context, 64)
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, context + 1), 5), use_cache=False)


@pytest.mark.parametrize("config", [MambaConfig(), FalconMambaConfig(), BloomConfig(), XLNetConfig()])
def test_models_without_a_limit_take_what_is_asked_for(config):
    assert context_of(config) is None
    assert fit_context("block_size", None, 1024, config) == 1024
    assert fit_context("block_size", 5000, 1024, config) == 5000


@pytest.mark.parametrize("name", ["seq_length", "max_sequence_length", "context_length", "max_target_positions"])
def test_a_length_of_another_name_counts(name):
    config = BloomConfig(**{name: 48})
    assert fit_context("block_size", None, 1024, config) == 48
    with pytest.raises(ValueError, match="--block_size 49 exceeds the model's context of 48 tokens."):
        fit_context("block_size", 49, 1024, config)


def test_an_adapter_with_virtual_tokens_leaves_less():
    config = LlamaConfig(max_position_embeddings=32)
    assert fit_context("token_length", None, 1024, config, virtual=10) == 22
    message = (
        "--token_length 23 exceeds the model's context of 32 tokens, of which the adapter uses 10: give at most 22."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        fit_context("token_length", 23, 1024, config, virtual=10)
    with pytest.raises(ValueError, match="uses 31 of the 32 tokens"):
        fit_context("token_length", None, 1024, config, virtual=31)
