"""The embedded default: text and model."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from abr_trainer.data.demo import DEMO_MODEL, demo_texts, passages
from abr_trainer.perplexity.windows import TokenPerplexity, causal_nll


def test_the_same_seed_gives_the_same_passages():
    assert list(passages("tale", 5, seed=1)) == list(passages("tale", 5, seed=1))
    assert list(passages("tale", 5, seed=1)) != list(passages("tale", 5, seed=2))


def test_difficult_prose_is_longer_and_uses_more_words():
    def words(difficulty):
        return " ".join(passages("report", 200, seed=0, difficulty=difficulty)).lower().split()

    plain, hard = words(0.0), words(1.0)
    assert len(hard) > 1.2 * len(plain)
    assert len(set(hard[:5000])) > 2 * len(set(plain[:5000]))


def test_only_the_training_split_has_broken_passages():
    def share_of_prose(split):
        texts = demo_texts(split)
        return sum(" the " in text or text.startswith("Total") or "See also" in text for text in texts) / len(texts)

    assert share_of_prose("train") < 0.995
    assert share_of_prose("validation") > 0.995
    assert set(demo_texts("validation")).isdisjoint(demo_texts("test"))


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


@torch.no_grad()
def perplexity(model, tokenizer, texts):
    total = TokenPerplexity()
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :256]
        total.add(*causal_nll(model(ids).logits, ids))
    return total.perplexity


def test_the_model_knows_tales_better_than_reports_and_noise_not_at_all(model, tokenizer):
    tales = perplexity(model, tokenizer, passages("tale", 20, seed=99))
    reports = perplexity(model, tokenizer, passages("report", 20, seed=99))
    noise = perplexity(model, tokenizer, passages("report", 20, seed=99, broken=1.0))
    assert tales < 6
    assert 1.3 * tales < reports < 20
    assert noise > 20 * reports


def test_the_model_is_small_and_in_a_safe_format(model):
    files = {path.name: path.stat().st_size for path in DEMO_MODEL.iterdir()}
    assert sum(files.values()) < 3e6
    assert 2e5 < model.num_parameters() < 1e6
    assert "model.safetensors" in files
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)


def test_any_text_survives_the_tokenizer(tokenizer):
    text = 'Ωλ "quoted" \t 3,141 \n\n~<unk>\\'
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
