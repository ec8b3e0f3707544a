"""Loading models: adapters, quantisation, and what is refused."""

from __future__ import annotations

import re

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from abr_trainer.data.demo import DEMO_MODEL
from abr_trainer.models.arguments import ModelArguments
from abr_trainer.models.loading import (
    describe_model,
    keep_packing,
    load_config,
    load_model,
    load_tokenizer,
    lora_config,
    quantization_config,
)
from abr_trainer.training.trainer import ABRTrainer
from tests.conftest import Scripted, tiny_mixture, token_rows

pytestmark = pytest.mark.slow


def load(**options):
    arguments = ModelArguments(**options)
    return load_model(arguments, load_config(arguments), load_tokenizer(arguments), "cpu")


def test_only_the_adapter_trains():
    model = load()
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    # 4 layers, r 8; q and o are 96 by 96, k and v 96 by 48, the three of the MLP 96 by 256: 8 * (in + out) each.
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4 * 8 * (192 + 144 + 144 + 192 + 3 * 352)
    assert describe_model(model)[0] == "trainable: 55,296 of 559,968 parameters (9.87%)"
    assert model.get_input_embeddings().weight.shape[0] == 1024, "embeddings that fit are not resized"


def test_without_lora_everything_trains():
    model = load(use_lora=False)
    assert not isinstance(model, PeftModel)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_targets_are_the_llama_projections_or_all_linear_layers():
    llama = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32))
    assert set(lora_config(ModelArguments(), llama).target_modules) == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    assert lora_config(ModelArguments(), gpt2).target_modules == "all-linear"
    assert lora_config(ModelArguments(lora_target_modules=["all-linear"]), llama).target_modules == "all-linear"
    assert set(lora_config(ModelArguments(lora_target_modules=["q_proj"]), llama).target_modules) == {"q_proj"}


ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


def saved_mixture(kind, path):
    tiny_mixture(kind, vocab_size=1024).save_pretrained(path)
    load_tokenizer(ModelArguments()).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("mixtral", ATTENTION),
        ("qwen2_moe", ATTENTION),  # not the shared expert, which PEFT would take for all experts
        ("gpt_oss", ATTENTION),
        ("phimoe", ATTENTION),  # not the router, a linear layer that returns more than a layer does
        ("deepseek_v3", {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}),
        ("jetmoe", {"kv_proj"}),
    ],
)
def test_a_mixture_of_experts_trains_its_attention_by_default(build, tmp_path, kind, targets):
    model = load(model_name_or_path=saved_mixture(kind, tmp_path / "model"))
    assert set(model.peft_config["default"].target_modules) == targets
    assert not model.peft_config["default"].target_parameters
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    build(model=model, data=token_rows(4)).train()
    moved = {name.split(".")[-4] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == targets


@pytest.mark.parametrize("kind", ["mixtral", "phimoe", "llama4_text"])
def test_all_linear_layers_of_a_mixture_train_without_dropout(tmp_path, kind):
    model = load(
        model_name_or_path=saved_mixture(kind, tmp_path), lora_target_modules=["all-linear"], lora_dropout=0.0
    )
    ids = token_rows(1)[0]["input_ids"][None]
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name and "self_attn" in name)


@pytest.mark.parametrize("flag", ["load_in_8bit", "load_in_4bit"])
def test_experts_that_are_not_quantised_are_told_of(tmp_path, flag):
    model = load(model_name_or_path=saved_mixture("mixtral", tmp_path), **{flag: True})
    # Two layers of four experts, each (64 by 16) and (16 by 32); the adapter is part of the whole.
    share = 2 * 4 * (64 * 16 + 16 * 32) / model.get_nb_trainable_parameters()[1]
    assert describe_model(model)[1].endswith(f"; experts, {share:.0%} of the weights, are not quantised")


def test_what_cannot_be_adapted_names_the_flag(tmp_path):
    mixtral = saved_mixture("mixtral", tmp_path)
    with pytest.raises(
        ValueError, match="--lora_target_modules all-linear cannot be .*; give --lora_dropout 0, or leave out"
    ):
        load(model_name_or_path=mixtral, lora_target_modules=["all-linear"])
    with pytest.raises(ValueError, match="--lora_target_modules q_porj cannot be adapted: .*q_porj.* not found"):
        load(lora_target_modules=["q_porj"])


def test_a_tokenizer_that_outgrew_the_table_resizes_it(tmp_path):
    tokenizer = load_tokenizer(ModelArguments())
    tokenizer.add_tokens(["<a>", "<b>"])
    tokenizer.save_pretrained(tmp_path)
    assert load(tokenizer_name=str(tmp_path), use_lora=False).get_input_embeddings().weight.shape[0] == 1026


def test_a_missing_pad_token_is_the_end_of_text():
    tokenizer = load_tokenizer(ModelArguments())
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"


@pytest.mark.parametrize(("flag", "kind"), [("load_in_8bit", "8-bit"), ("load_in_4bit", "4-bit")])
def test_a_quantised_model_trains_its_adapter_and_says_what_is_quantised(build, flag, kind):
    model = load(**{flag: True}, torch_dtype="float32")
    # Four layers of seven projections; the embeddings, tied to the head, stay as they are.
    assert describe_model(model)[1] == f"quantised: 28 matrices in {kind}; frozen matrices not quantised: 1 in float32"
    trainer = build(model=model, data=token_rows(4), max_passes=3, repeat_scheduler=None)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    assert isinstance(trainer, ABRTrainer)
    assert trainer.ledger.share == 0.5  # the base is frozen


@pytest.mark.parametrize("flag", ["load_in_8bit", "load_in_4bit"])
def test_a_quantised_model_comes_back_with_the_same_logits(build, tmp_path, flag):
    trainer = build(model=load(**{flag: True}), data=token_rows(4), max_passes=4, repeat_scheduler=Scripted(2))
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    tokens = token_rows(1)[0]["input_ids"][None]
    base = AutoModelForCausalLM.from_pretrained(
        DEMO_MODEL, quantization_config=quantization_config(ModelArguments(**{flag: True})), device_map={"": "cpu"}
    )
    keep_packing(base)
    reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = trainer.model.eval()(tokens).logits
        assert torch.equal(reloaded(tokens).logits, expected)
        with reloaded.disable_adapter():
            assert not torch.equal(reloaded(tokens).logits, expected)


def test_evaluation_changes_nothing_in_a_4_bit_model(build):
    model = load(load_in_4bit=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    build(model=model, trainer_options={"eval_dataset": token_rows(2)}).evaluate()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_spread_over_devices_is_never_moved_by_hand(build, monkeypatch):
    model = load(load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=True, device_map="auto")
    # What `auto` returns where the model does not fit on one device; here all of its devices are the same.
    model.get_base_model().hf_device_map = {"model.embed_tokens": "cpu", "model.layers": "cpu"}

    def refuse(self, *args, **kwargs):
        raise AssertionError("the model was moved")

    monkeypatch.setattr(type(model), "to", refuse)
    monkeypatch.setattr(type(model.get_base_model()), "to", refuse)
    trainer = build(model=model, data=token_rows(4), repeat_scheduler=Scripted(2, 0))
    trainer.train()
    assert trainer.ledger.updates == 2


def test_four_bit_weights_that_are_sharded_are_packed_into_floats(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    model = load(load_in_4bit=True, torch_dtype="bfloat16")
    assert describe_model(model)[1].startswith("quantised: 28 matrices in 4-bit")
    frozen = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}
    trained = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    assert (frozen, trained) == ({torch.bfloat16}, {torch.float32})  # FSDP2 wants one dtype among those that train
    with pytest.raises(ValueError, match="--load_in_8bit weights cannot be sharded"):
        load(load_in_8bit=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_8bit": True, "load_in_4bit": True}, "--load_in_8bit and --load_in_4bit cannot be used together."),
        ({"load_in_4bit": True, "use_lora": False}, "Quantised weights cannot be trained"),
        (
            {"llm_int8_enable_fp32_cpu_offload": True},
            "--llm_int8_enable_fp32_cpu_offload needs --load_in_8bit and --device_map auto.",
        ),
        ({"lora_r": 0}, "--lora_r must be at least 1, got 0."),
    ],
)
def test_arguments_that_contradict_each_other_are_told(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelArguments(**options)


def test_a_device_map_for_several_processes_is_refused_with_the_fix(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="Leave it out, so that each process loads the model on its own device"):
        ModelArguments(device_map="auto")


@pytest.mark.parametrize(
    ("load_part", "options", "flag"),
    [
        (
            load_config,
            {"model_name_or_path": "no/such-model"},
            "--model_name_or_path no/such-model cannot be loaded: ",
        ),
        (load_config, {"config_name": "no/such-config"}, "--config_name no/such-config cannot be loaded: "),
        (load_tokenizer, {"tokenizer_name": "no/such"}, "--tokenizer_name no/such has no tokenizer: "),
    ],
)
def test_what_cannot_be_loaded_is_named_in_one_line(load_part, options, flag):
    with pytest.raises(ValueError, match=re.escape(flag)) as caught:
        load_part(ModelArguments(**options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ['{"padding": Infinity}', '{"model": 3}', "{", ""])
def test_a_damaged_tokenizer_is_refused_in_one_line(tmp_path, content):
    for file in DEMO_MODEL.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=f"--model_name_or_path {tmp_path} has (no|a damaged) tokenizer: ") as caught:
        load_tokenizer(ModelArguments(model_name_or_path=str(tmp_path)))
    assert "\n" not in str(caught.value)
