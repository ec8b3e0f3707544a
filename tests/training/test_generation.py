"""What a model writes after prompts: greedy to the letter, and without a trace in its training."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    set_seed,
)

from abr_trainer.data.demo import DEMO_MODEL, demo_texts
from abr_trainer.data.prompts import Prompt, prompts_in, written
from abr_trainer.models.arguments import ModelArguments
from abr_trainer.models.loading import load_config, load_model, load_tokenizer
from abr_trainer.training.generation import continue_prompts, why_not
from tests.conftest import Stream, token_rows

pytestmark = pytest.mark.slow

TOKENIZER = AutoTokenizer.from_pretrained(DEMO_MODEL)
SOME = 10


def prompts_of(lengths=(3, 11, 7, 7, 2), most=SOME):
    ids = TOKENIZER(" ".join(demo_texts("validation")[:20]), add_special_tokens=False)["input_ids"]
    return [Prompt(ids[40 * i :][:length], "", "", most) for i, length in enumerate(lengths)]


def gpt2():
    """A model whose positions are absolute: padding that moves them would change what it writes."""
    set_seed(0)
    options = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.5}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(TOKENIZER), eos_token_id=None, bos_token_id=None, **options))


def demo():
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL)


def adapted():
    model = demo()
    model.enable_input_require_grads()
    set_seed(1)
    config = LoraConfig(r=4, task_type="CAUSAL_LM", lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(model, config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    return model


def halves():
    return demo().to(torch.bfloat16)


def of_few_bits(bits):
    arguments = ModelArguments(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    return load_model(arguments, load_config(arguments), load_tokenizer(arguments), "cpu", True)


def by_hand(model, prompt):
    """The most likely token, one after the other, of one prompt without padding and without a cache."""
    model.eval()
    ids = torch.tensor([list(prompt.ids)])
    with torch.no_grad():
        for _ in range(prompt.most):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].float().argmax(-1)], 1)
            if ids[0, -1] == TOKENIZER.eos_token_id:
                break
    kept = [token for token in ids[0].tolist() if token != TOKENIZER.eos_token_id]
    return TOKENIZER.decode(kept)[len(TOKENIZER.decode(list(prompt.ids))) :]


@pytest.mark.parametrize("make", [demo, gpt2, adapted])
def test_a_batch_with_padding_is_continued_as_each_prompt_alone(make):
    model, prompts = make(), prompts_of()
    found = continue_prompts(model, TOKENIZER, prompts, batch_size=3)
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert found == {index: by_hand(model, prompt) for index, prompt in enumerate(prompts)}
    assert len(set(found.values())) > 2, "they must differ, or the test shows nothing"


@pytest.mark.parametrize("make", [halves, lambda: of_few_bits(8), lambda: of_few_bits(4)])
def test_halves_and_few_bits_are_continued(make):
    model, prompts = make().train(), prompts_of(lengths=(7, 7))
    found = continue_prompts(model, TOKENIZER, prompts, batch_size=2)
    assert found == continue_prompts(model, TOKENIZER, prompts, batch_size=2)
    assert all(found.values())
    assert model.training


def test_neither_weights_nor_random_numbers_nor_modes_nor_settings_change():
    model = adapted().train()
    frozen = next(module for module in model.modules() if isinstance(module, torch.nn.Dropout))
    frozen.eval()  # as somebody may have left it
    model.generation_config.repetition_penalty = 1.5
    kept, settings = [p.clone() for p in model.parameters()], model.generation_config
    modes = [module.training for module in model.modules()]
    states = [torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()]
    continue_prompts(model, TOKENIZER, prompts_of(), batch_size=2)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(now, before) for now, before in zip(model.parameters(), kept, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.generation_config is settings
    assert model.config.use_cache is False


def test_what_a_model_says_of_generation_does_not_make_it_less_greedy(recwarn):
    model = demo()
    greedy = continue_prompts(model, TOKENIZER, prompts_of(), batch_size=2)
    changes = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 3.0, "no_repeat_ngram_size": 1}
    model.generation_config.update(**changes, min_new_tokens=9, max_length=4, num_beams=3)
    assert continue_prompts(model, TOKENIZER, prompts_of(), batch_size=2) == greedy
    assert not [str(each.message) for each in recwarn if "generat" in str(each.message)]


def test_a_text_ends_with_each_token_that_ends_texts_and_at_its_limit():
    model, prompts = demo(), prompts_of(lengths=(7,))
    [whole] = continue_prompts(model, TOKENIZER, prompts, 1).values()
    ids = TOKENIZER(whole, add_special_tokens=False)["input_ids"]
    assert len(ids) > 5
    with torch.no_grad():
        made = model.generate(torch.tensor([list(prompts[0].ids)]), max_new_tokens=3, do_sample=False)[0, 7:].tolist()
    assert made[2] not in made[:2], "the third token is to be the end"
    model.generation_config.eos_token_id = [10**6, made[2]]
    [ended] = continue_prompts(model, TOKENIZER, prompts, 1).values()
    assert ended == TOKENIZER.decode([*prompts[0].ids, *made[:2]])[len(TOKENIZER.decode(list(prompts[0].ids))) :]
    [short] = continue_prompts(model, TOKENIZER, prompts_of(lengths=(7,), most=1), 1).values()
    assert whole.startswith(short)
    assert len(short) < len(ended)


def opt():
    set_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16}
    options = {"vocab_size": len(TOKENIZER), "eos_token_id": TOKENIZER.eos_token_id, "word_embed_proj_dim": 16}
    return OPTForCausalLM(OPTConfig(max_position_embeddings=64, init_std=0.5, **sizes, **options))


@pytest.mark.parametrize("make", [gpt2, opt])
def test_a_long_prompt_is_not_taken_past_the_context_by_a_short_one(make):
    model = make()
    ends = [Prompt([5 + length] * length, "", "", most) for length, most in ((60, 4), (8, 32), (50, 14), (9, 32))]
    found = continue_prompts(model, TOKENIZER, ends, batch_size=8)
    assert found == {index: by_hand(model, prompt) for index, prompt in enumerate(ends)}
    shares = [continue_prompts(model, TOKENIZER, ends, 8, rank=rank, ranks=2) for rank in range(2)]
    assert {index: text for share in shares for index, text in share.items()} == found


@pytest.mark.parametrize("ranks", [2, 3, 9])
def test_ranks_share_the_batches_and_write_what_one_writes(ranks):
    model, prompts = demo(), prompts_of()
    alone = continue_prompts(model, TOKENIZER, prompts, batch_size=2)
    shares = [continue_prompts(model, TOKENIZER, prompts, 2, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert sum(map(len, shares)) == len(prompts), "each is written once"
    assert {index: text for share in shares for index, text in share.items()} == alone


def test_sharded_weights_and_models_that_do_not_generate_are_refused(monkeypatch):
    assert why_not(demo()) is None
    assert "generates" in why_not(torch.nn.Linear(2, 2))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert why_not(demo()).startswith("FSDP and ZeRO-3 split the weights over ranks")


# ---- Prompts ----


def test_the_prompt_of_a_text_is_its_beginning_and_the_reference_what_follows():
    rows = [{"input_ids": torch.arange(length) % 60 + 4} for length in (100, 20, 1)]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    long, short = prompts_in(rows, TOKENIZER)
    assert (list(long.ids), long.most) == (rows[0]["input_ids"][:32].tolist(), 32)
    assert (list(short.ids), short.most) == (rows[1]["input_ids"][:10].tolist(), 10)
    assert long.text + long.reference == TOKENIZER.decode(rows[0]["input_ids"][:64].tolist())


def test_the_prompt_of_an_answer_is_all_before_the_last_answer():
    ids, other = list(range(10, 24)), -100
    labels = [other] * 3 + ids[3:5] + [other] * 4 + ids[9:12] + [other] * 2
    masked = {"input_ids": [0, 0, *ids], "labels": [other, other, *labels], "attention_mask": [0, 0] + [1] * 14}
    of_trl = {"input_ids": ids[:12], "assistant_masks": [int(label != other) for label in labels[:12]]}
    for row in (masked, of_trl):
        [prompt] = prompts_in([row], TOKENIZER)
        assert list(prompt.ids) == ids[:9]
        assert prompt.text + prompt.reference == TOKENIZER.decode(ids[:12])
    assert prompts_in([masked], TOKENIZER, context=10) == [], "no room for an answer"
    assert prompts_in([{**masked, "labels": [other] * 16}], TOKENIZER) == []


class SizedStream(Stream):
    """Rows that are counted, and still read one after the other."""

    def __len__(self):
        return len(self.rows)


def test_prompts_are_spread_over_a_data_set_and_are_the_first_of_a_stream():
    rows = [{key: value.tolist() for key, value in row.items()} for row in token_rows(9)]
    firsts = [prompt.ids[0] for prompt in prompts_in(rows, TOKENIZER, 3)]
    assert firsts == [rows[index]["input_ids"][0] for index in (0, 3, 6)]
    assert [prompt.ids[0] for prompt in prompts_in(iter(rows), TOKENIZER, 3)] == [
        row["input_ids"][0] for row in rows[:3]
    ]
    assert len(prompts_in(rows, TOKENIZER, 99)) == 9
    stream = SizedStream(rows)
    assert [list(prompt.ids) for prompt in prompts_in(stream, TOKENIZER, 3)] == [
        list(prompt.ids) for prompt in prompts_in(iter(rows), TOKENIZER, 3)
    ]


def test_a_continuation_keeps_the_blank_it_begins_with_and_survives_half_a_letter():
    def decode(ids, skip_special_tokens):
        return bytes(ids).decode(errors="replace")

    pieces = SimpleNamespace(decode=decode)
    assert written(pieces, list(b"Once"), list(b" upon")) == " upon"
    snow = "\u2603".encode()
    assert written(pieces, list(snow[:2]), list(snow[2:] + b" x")).endswith(" x")
