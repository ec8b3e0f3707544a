"""Merging adapters: what is written is what was trained, and zeros stay zero where that is asked for."""

from __future__ import annotations

import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

from abr_trainer.cli import export
from abr_trainer.cli import prune as prune_verb
from abr_trainer.data.demo import DEMO_MODEL
from abr_trainer.models.arguments import AdaptedArguments
from abr_trainer.models.loading import load_written
from abr_trainer.models.merging import MergeArguments, merge_adapter, merge_to
from abr_trainer.models.pruning import layers, nonzero_shares, prune, sparsity_report
from tests.conftest import model_for, tiny_llama, tiny_mixture, tokenizer_that_adds

pytestmark = pytest.mark.slow

IDS = torch.arange(0, 1024, 11)[None]
TARGETS = ["q_proj", "v_proj", "down_proj"]


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def random_adapter(path, base=DEMO_MODEL, config=LoraConfig, dtype="auto", std=0.02, **options):
    """An adapter that changes what its base says."""
    options = {"task_type": "CAUSAL_LM", **({"target_modules": TARGETS} if config is LoraConfig else {}), **options}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), config(**options))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02 if "lora_A" in name else std)
    model.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(
    ("options", "is_tied"),
    [
        ({}, True),
        ({"use_rslora": True}, True),
        ({"use_dora": True}, True),
        ({"trainable_token_indices": [1, 2, 1023]}, True),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"modules_to_save": ["embed_tokens"]}, False),
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"target_modules": ["q_proj", "embed_tokens"]}, False),
    ],
)
def test_what_is_written_says_in_plain_transformers_what_base_and_adapter_said(tmp_path, options, is_tied):
    adapter, whole = random_adapter(tmp_path / "adapter", **options), tmp_path / "whole"
    found = export.main(["--adapter", adapter, "--output_dir", str(whole)])["merge"]
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(DEMO_MODEL), adapter))
    model = AutoModelForCausalLM.from_pretrained(whole)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == is_tied
    assert model.config.tie_word_embeddings == is_tied
    assert not found["keep_mask"]
    assert found["by_merging"] < 1e-5 < found["by_adapter"]
    assert found["by_writing"] == 0


def test_what_is_written_is_whole_and_tells_nothing_of_the_machine(tmp_path, capsys):
    adapter, whole = random_adapter(tmp_path / "adapter"), tmp_path / "whole"
    base = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    base.generation_config.max_new_tokens = 7
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(tmp_path / "base")
    (tmp_path / "whole.unfinished").mkdir()
    (tmp_path / "whole.unfinished" / "model-00007.safetensors").touch()  # what a kill has left
    flags = ["--model_name_or_path", str(tmp_path / "base"), "--adapter", adapter, "--output_dir", str(whole)]
    export.main(flags)
    assert "mask        not kept: up to 0.0% of a matrix that the adapter changes is zero" in capsys.readouterr().out
    files = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert files.keys() == {
        *("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    }
    assert all(str(place).encode() not in text for text in files.values() for place in (tmp_path, DEMO_MODEL.parent))
    assert not {"_name_or_path", "quantization_config"} & json.loads(files["config.json"]).keys()
    assert json.loads(files["generation_config.json"])["max_new_tokens"] == 7
    assert (
        AutoTokenizer.from_pretrained(whole)("A lamp").input_ids
        == AutoTokenizer.from_pretrained(DEMO_MODEL)("A lamp").input_ids
    )
    assert not (tmp_path / "whole.unfinished").exists()


def test_an_adapter_of_a_base_whose_tokenizer_adds_bos_is_exported_and_measured(tmp_path):
    base, tokenizer = tmp_path / "base", tokenizer_that_adds("bos")
    model_for(tokenizer).save_pretrained(base)
    tokenizer.save_pretrained(base)
    adapter, whole = random_adapter(tmp_path / "adapter", base=base), tmp_path / "whole"
    flags = ["--dataset_name", "demo", "--max_rows", "6", "--definition", "wanda", "--token_length", "32", "--use_cpu"]
    found = export.main(["--adapter", adapter, "--output_dir", str(whole), *flags])
    assert (whole / "model.safetensors").exists()
    assert found["merged"]["begun_by"] == found["base"]["begun_by"] == "<s>"
    assert found["merged"]["perplexity"] == pytest.approx(found["beside"]["perplexity"], rel=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_stays_and_rounds(tmp_path, dtype):
    adapter, whole = random_adapter(tmp_path / "adapter"), tmp_path / "whole"
    flags = ["--adapter", adapter, "--torch_dtype", dtype, "--output_dir", str(whole)]
    found = export.main(flags)["merge"]
    assert found["dtype"] == dtype == json.loads((whole / "config.json").read_text())["dtype"]
    assert 1e-5 < found["by_merging"] < 0.05


@pytest.mark.parametrize(
    ("dtype", "std", "is_lost"),
    [
        ("bfloat16", 1e-3, True),
        ("float16", 3e-4, True),
        ("bfloat16", 2e-2, False),
        ("float16", 1e-2, False),
        ("float32", 3e-4, False),
    ],
)
def test_an_adapter_that_is_lost_in_rounding_is_told_of(tmp_path, capsys, dtype, std, is_lost):
    adapter = random_adapter(tmp_path / "adapter", std=std)
    export.main(["--adapter", adapter, "--torch_dtype", dtype, "--output_dir", str(tmp_path / "whole")])
    message = f"warning     rounding to {dtype} changes the logits by "
    shown = capsys.readouterr().out
    assert (message in shown) == is_lost
    assert ("Merge with --torch_dtype float32" in shown) == is_lost


def test_an_adapter_that_does_nothing_is_not_lost(tmp_path, capsys):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(DEMO_MODEL), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path / "adapter")  # untrained: it changes nothing
    flags = ["--adapter", str(tmp_path / "adapter"), "--torch_dtype", "bfloat16"]
    found = export.main([*flags, "--output_dir", str(tmp_path / "whole")])["merge"]
    assert found["by_adapter"] == found["by_merging"] == 0
    assert "warning" not in capsys.readouterr().out


def test_an_adapter_of_which_the_mask_leaves_little_is_told_of(tmp_path, capsys):
    base = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    prune(base, 0.9)
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(tmp_path / "base")
    flags = ["--adapter", random_adapter(tmp_path / "adapter", tmp_path / "base")]
    export.main([*flags, "--output_dir", str(tmp_path / "whole")])
    assert re.search(
        r"warning     mask and rounding change the logits by \d+% of the adapter's change. ", capsys.readouterr().out
    )


def test_a_sparse_base_stays_sparse_unless_told_otherwise(tmp_path, capsys):
    base = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    prune(base, 0.3)
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(tmp_path / "base")
    flags = ["--adapter", random_adapter(tmp_path / "adapter", tmp_path / "base")]
    kept = export.main([*flags, "--output_dir", str(tmp_path / "kept")])["merge"]
    assert "mask        kept: up to 30.0% of a matrix that the adapter changes is zero" in capsys.readouterr().out
    assert kept["keep_mask"]
    assert kept["by_writing"] == 0
    assert kept["by_merging"] > 1e-3
    assert kept["sparsity"]["all"]["zeros"] == pytest.approx(0.3, abs=1e-3)
    plain = export.main([*flags, "--keep_mask", "false", "--output_dir", str(tmp_path / "plain")])["merge"]
    assert plain["by_merging"] < 1e-5
    assert plain["sparsity"]["q_proj"]["zeros"] == 0


def test_what_is_not_what_was_trained_is_not_kept(tmp_path, monkeypatch):
    # Then the head changes with the embeddings.
    monkeypatch.setattr("abr_trainer.models.merging._untie", lambda model: False)
    adapter = random_adapter(tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(SystemExit, match="error: The merged model differs from .* more than 1e-05"):
        export.main(["--adapter", adapter, "--output_dir", str(tmp_path / "whole")])
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--load_in_4bit"], "An adapter cannot be merged into quantised weights. Leave out --load_in_8bit"),
        (["--token_length", "9"], "--token_length needs a text to measure. Give --dataset_name or --text_file."),
        (["--max_rows", "9"], "--max_rows needs a text to measure. Give --dataset_name or --text_file."),
        (["--output_dir", "scripts"], "--output_dir scripts is not an empty directory. Give a new one."),
    ],
)
def test_what_cannot_be_is_told_before_a_model_is_loaded(tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr("abr_trainer.models.merging.load_base", lambda *_: pytest.fail("a model was loaded"))
    adapter = random_adapter(tmp_path / "adapter")
    with pytest.raises(SystemExit, match=re.escape(f"error: {message}")):
        export.main(["--adapter", adapter, "--output_dir", str(tmp_path / "whole"), *flags])


def test_a_merge_without_an_adapter_or_of_one_that_changes_no_weights_is_told(tmp_path):
    with pytest.raises(SystemExit, match="error: --adapter_name_or_path is missing. Give the adapter to merge."):
        export.main(["--output_dir", str(tmp_path / "whole")])
    prompt = random_adapter(tmp_path / "prompt", config=PromptTuningConfig, num_virtual_tokens=2)
    with pytest.raises(SystemExit, match="is of the kind PROMPT_TUNING, which changes no weights"):
        export.main(["--adapter", prompt, "--output_dir", str(tmp_path / "whole")])


def test_a_base_that_was_saved_quantised_is_told(tmp_path):
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, quantization_config=options)
    with pytest.raises(ValueError, match="are quantised"):
        merge_adapter(get_peft_model(model, LoraConfig(target_modules=["q_proj"])))
    adapter = random_adapter(tmp_path / "adapter")
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    (tmp_path / "base").mkdir()
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    flags = ["--model_name_or_path", str(tmp_path / "base"), "--adapter", adapter]
    with pytest.raises(SystemExit, match="are quantised. Give the model before quantisation."):
        export.main([*flags, "--output_dir", str(tmp_path / "whole")])


def adapted(model):
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_merge_under_the_mask_keeps_every_zero_and_changes_what_is_left(dtype):
    plain = tiny_llama().to(dtype)
    prune(plain, pattern="2:4")
    before = {matrix.name: matrix.values().clone() for matrix in layers(plain)}
    model = adapted(plain)
    delta = model.base_model.model.model.layers[0].self_attn.q_proj.get_delta_weight("default").to(dtype)
    merged = merge_adapter(model)
    weight, name = merged.model.layers[0].self_attn.q_proj.weight, "model.layers.0.self_attn.q_proj"
    expected = torch.where(before[name] == 0, 0.0, before[name] + delta)
    assert weight.dtype == dtype
    assert torch.equal(weight, expected)
    assert torch.equal(merged.model.layers[0].self_attn.v_proj.weight, before["model.layers.0.self_attn.v_proj"])
    assert sparsity_report(merged)["all"]["2:4"] == 1
    assert not any("lora" in parameter for parameter, _ in merged.named_parameters())


def test_a_plain_merge_fills_the_zeros_and_says_what_the_model_said():
    plain = tiny_llama()
    prune(plain, 0.5)
    model = adapted(plain).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        beside = model(ids).logits
        merged = merge_adapter(model, keep_mask=False).eval()
        torch.testing.assert_close(merged(ids).logits, beside)
    assert nonzero_shares(merged)["q_proj"] == 1
    assert nonzero_shares(merged)["v_proj"] == 0.5


def test_a_merge_in_float16_is_written_in_float16_with_its_zeros(tmp_path):
    pruned, lora, merged = (str(tmp_path / name) for name in ("pruned", "lora", "merged"))
    before = prune_verb.main(["--torch_dtype", "float16", "--pattern", "2:4", "--output_dir", pruned])
    adapted(AutoModelForCausalLM.from_pretrained(pruned)).save_pretrained(lora)
    load = AdaptedArguments(pruned, torch_dtype="float16", adapter_name_or_path=lora)
    report = merge_to(load, MergeArguments(merged)).sparsity
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert model.dtype == torch.float16
    assert sparsity_report(model) == report
    assert all(report[kind]["2:4"] == before[kind]["2:4"] == 1 for kind in ("q_proj", "down_proj", "all"))
    base = AutoModelForCausalLM.from_pretrained(pruned)
    pairs = zip(layers(model), layers(base), strict=True)
    moved = {matrix.kind for matrix, old in pairs if not torch.equal(matrix.values(), old.values())}
    assert moved == {"q_proj", "down_proj"}


def test_layers_that_an_adapter_replaces_are_merged_and_those_it_adapts_keep_their_zeros():
    plain = tiny_llama(tie_word_embeddings=False)
    prune(plain, 0.5)
    model = get_peft_model(plain, LoraConfig(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"]))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    assert set(nonzero_shares(model)) == set(nonzero_shares(tiny_llama(tie_word_embeddings=False)))
    trained = model.base_model.model.lm_head.modules_to_save["default"].weight.clone()
    merged = merge_adapter(model)
    assert torch.equal(merged.lm_head.weight, trained)
    assert nonzero_shares(merged)["q_proj"] == 0.5


def test_a_merge_keeps_the_zeros_of_layers_stored_the_other_way_round():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    prune(model, pattern="2:4")
    adapted_model = get_peft_model(model, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    for name, parameter in adapted_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    assert sparsity_report(merge_adapter(adapted_model))["all"]["2:4"] == 1


@pytest.mark.parametrize(
    ("kind", "targets", "parameters"),
    [
        ("mixtral", ["q_proj"], ["gate_up_proj", "down_proj", "gate.weight"]),
        ("gpt_oss", ["q_proj"], ["down_proj"]),
        ("llama4_text", ["q_proj", "shared_expert.up_proj"], ["gate_up_proj"]),
    ],
)
def test_a_merge_keeps_the_zeros_of_experts_and_of_what_chooses_them(tmp_path, capsys, kind, targets, parameters):
    base = tiny_mixture(kind, vocab_size=1024)
    prune(base, pattern="2:4")
    router = next(each for each in base.parameters() if each.shape == (4, 16))
    with torch.no_grad():
        router[:, :3] = 0  # as other programs prune
    zeros = {name: parameter == 0 for name, parameter in base.named_parameters()}
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(tmp_path / "base")
    options = {"target_modules": targets, "target_parameters": parameters}
    flags = ["--adapter", random_adapter(tmp_path / "adapter", tmp_path / "base", **options)]
    export.main([*flags, "--output_dir", str(tmp_path / "kept")])
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "kept")
    assert all((parameter[zeros[name]] == 0).all() for name, parameter in written.named_parameters())
    assert sparsity_report(written)["all"]["2:4"] == 1
    # Biases of a layer may be zero, too; those of a stack have two dimensions.
    counted = sum(int(mask.sum()) for mask in zeros.values() if mask.dim() > 1)
    assert f"; the written model has all {counted:,} zeros in " in capsys.readouterr().out
    plain = export.main([*flags, "--keep_mask", "false", "--output_dir", str(tmp_path / "plain")])["merge"]
    assert plain["by_merging"] < 1e-5
    assert plain["sparsity"]["all"]["zeros"] < 0.5


def test_a_layer_that_was_trained_in_the_place_of_a_sparse_one_keeps_its_zeros_but_embeddings_do_not():
    plain = tiny_llama(tie_word_embeddings=False, num_hidden_layers=2)
    prune(plain, 0.5)
    with torch.no_grad():
        plain.model.embed_tokens.weight[60:] = 0  # room for tokens that are added
    zeros = plain.model.layers[1].mlp.up_proj.weight == 0
    model = get_peft_model(plain, LoraConfig(target_modules=["q_proj"], modules_to_save=["up_proj", "embed_tokens"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter += 1
    merged = merge_adapter(model)
    assert torch.equal(merged.model.layers[1].mlp.up_proj.weight == 0, zeros)
    assert (merged.model.embed_tokens.weight[60:] == 1).all()


def test_zeros_that_are_lost_in_the_file_are_noticed(tmp_path, monkeypatch):
    def filled(arguments, directory):
        written = load_written(arguments, directory)
        torch.nn.init.ones_(written.model.layers[1].mlp.down_proj.weight)  # which the adapter does not change
        return written

    base = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    prune(base, 0.3)
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(tmp_path / "base")
    flags = ["--adapter", random_adapter(tmp_path / "adapter", tmp_path / "base", target_modules=["q_proj"])]
    monkeypatch.setattr("abr_trainer.models.merging.load_written", filled)
    with pytest.raises(SystemExit, match="error: 1 matrices have fewer zeros .*: model.layers.1.mlp.down_proj."):
        export.main([*flags, "--output_dir", str(tmp_path / "whole")])
    assert not (tmp_path / "whole").exists()


def classifier_adapter(path, **labels):
    """An adapter of a classifier as PEFT writes it, without the files that our runs put beside it."""
    base = AutoModelForSequenceClassification.from_pretrained(DEMO_MODEL, **labels)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)
    return str(path), model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("labels", [{"num_labels": 5}, {"num_labels": 1, "problem_type": "regression"}])
def test_a_classifier_is_exported_with_its_head_and_as_many_labels(tmp_path, dtype, labels):
    adapter, model = classifier_adapter(tmp_path / "adapter", **labels)
    flags = ["--adapter", adapter, "--torch_dtype", dtype, "--output_dir", str(tmp_path / "whole")]
    found = export.main(flags)["merge"]
    written = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    trained = model.base_model.model.score.modules_to_save["default"].weight
    assert torch.equal(written.score.weight, trained.to(written.dtype))
    assert written.num_labels == labels["num_labels"]
    assert found["dtype"] == dtype
    assert found["by_merging"] < (1e-5 if dtype == "float32" else 5e-2)
    assert not (tmp_path / "whole" / "task.json").exists()


def test_a_classifier_of_a_sparse_base_keeps_the_zeros_of_the_base_and_its_whole_head(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    prune(base, 0.5)
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(tmp_path / "base")
    adapter, _ = classifier_adapter(tmp_path / "adapter", num_labels=2)
    flags = ["--model_name_or_path", str(tmp_path / "base"), "--adapter", adapter]
    found = export.main([*flags, "--output_dir", str(tmp_path / "whole")])["merge"]
    assert found["keep_mask"]
    assert found["sparsity"]["q_proj"]["zeros"] == pytest.approx(0.5, abs=1e-3)
    assert found["sparsity"]["score"]["zeros"] == 0


def test_the_perplexity_of_a_classifier_is_refused(tmp_path):
    adapter, _ = classifier_adapter(tmp_path / "adapter", num_labels=2)
    flags = ["--adapter", adapter, "--dataset_name", "demo", "--output_dir", str(tmp_path / "whole")]
    with pytest.raises(
        SystemExit, match="error: .* is an adapter of a classifier, which has no perplexity. Export it wi"
    ):
        export.main(flags)
    assert not (tmp_path / "whole").exists()
