"""Sparse models: what is counted, what is pruned, and a merge that leaves zeros at zero."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

import run_clm_abr
from abr_trainer.cli import export
from abr_trainer.cli import prune as prune_verb
from abr_trainer.data.demo import DEMO_MODEL
from abr_trainer.models.pruning import layers, left_in, nonzero_shares, parse_pattern, prune, sparsity_report
from tests.conftest import ROOT, tiny_llama, tiny_mixture

pytestmark = pytest.mark.slow

MATRIX = torch.tensor([[4.0, -1.0, 2.0, -3.0], [0.5, 5.0, -6.0, 0.1]])


@pytest.mark.parametrize(
    ("pattern", "sparsity", "kept"),
    [
        ("unstructured", 0.5, [[4.0, 0, 0, -3.0], [0, 5.0, -6.0, 0]]),
        ("unstructured", 0.3, [[4.0, -1.0, 2.0, -3.0], [0, 5.0, -6.0, 0]]),  # int(0.3 * 8) is 2
        ("2:4", 0.5, [[4.0, 0, 0, -3.0], [0, 5.0, -6.0, 0]]),
        ("1:2", 0.5, [[4.0, 0, 0, -3.0], [0, 5.0, -6.0, 0]]),
        ("1:4", 0.5, [[4.0, 0, 0, 0], [0, 0, -6.0, 0]]),
        ("1x2", 0.5, [[0, 0, 0, 0], [0.5, 5.0, -6.0, 0.1]]),  # squared norms 17, 13, 25.25, 36.01
        ("2x2", 0.5, [[0, 0, 2.0, -3.0], [0, 0, -6.0, 0.1]]),  # 42.25, 49.01
        ("2x3", 0.5, [[4.0, -1.0, 2.0, 0], [0.5, 5.0, -6.0, 0]]),  # the block at the edge has one column
    ],
)
def test_the_lowest_magnitudes_go(pattern, sparsity, kept):
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(4, 2)})
    with torch.no_grad():
        model["layer"].weight.copy_(MATRIX)
    prune(model, sparsity, pattern)
    assert torch.equal(model["layer"].weight, torch.tensor(kept))


def test_every_layer_but_head_embeddings_and_norms_is_pruned():
    model = tiny_llama(tie_word_embeddings=False, num_hidden_layers=2)
    kept = {name: parameter.clone() for name, parameter in model.named_parameters() if "proj" not in name}
    prune(model, 0.5)
    assert all(torch.equal(parameter, model.get_parameter(name)) for name, parameter in kept.items())
    assert len(layers(model)) == 2 * 7
    assert all((matrix.values() == 0).float().mean() == 0.5 for matrix in layers(model))
    shares = nonzero_shares(model)
    assert shares["lm_head"] == 1
    assert shares["q_proj"] == 0.5


def test_equal_magnitudes_still_give_the_share_that_was_asked_for():
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(10, 10)})
    torch.nn.init.ones_(model["layer"].weight)
    prune(model, 0.37)
    assert int((model["layer"].weight == 0).sum()) == 37


def test_inputs_are_grouped_also_where_a_layer_is_stored_the_other_way_round():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    prune(model, pattern="2:4")
    weight = model.transformer.h[0].mlp.c_fc.weight  # (inputs, outputs)
    assert weight.shape == (8, 32)
    assert ((weight != 0).reshape(2, 4, 32).sum(dim=1) == 2).all()
    assert sparsity_report(model)["all"] == {"zeros": 0.5, "2:4": 1.0, "4:8": 1.0, "16x16": 0.0}


@pytest.mark.parametrize(
    ("kind", "experts", "inputs"),
    [
        ("mixtral", "mlp.experts.gate_up_proj", 2),  # (experts, outputs, inputs)
        ("deepseek_v3", "mlp.experts.down_proj", 2),
        ("gpt_oss", "mlp.experts.gate_up_proj", 1),  # (experts, inputs, outputs), which the class says
        ("llama4_text", "feed_forward.experts.down_proj", 1),  # the same, which it does not say
        ("jetmoe", "mlp.input_linear.weight", 2),
    ],
)
def test_each_expert_is_pruned_along_its_inputs(kind, experts, inputs):
    model = tiny_mixture(kind)
    before = model.model.layers[1].get_parameter(experts).clone()
    prune(model, pattern="2:4")
    weight = model.model.layers[1].get_parameter(experts)
    groups = (weight != 0).unflatten(inputs, (-1, 4))
    assert (groups.sum(dim=inputs + 1) == 2).all()
    assert torch.equal(weight, before * (weight != 0))
    strongest = before.abs().unflatten(inputs, (-1, 4)).topk(2, dim=inputs + 1).values
    assert torch.equal(weight.abs().unflatten(inputs, (-1, 4)).topk(2, dim=inputs + 1).values, strongest)


def test_every_expert_has_the_share_that_was_asked_for():
    model = tiny_mixture("qwen2_moe")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[0] *= 100  # among the others' weights none of these would go
    prune(model, 0.25)
    experts = model.model.layers[0].mlp.experts
    for weight in (*experts.gate_up_proj, *experts.down_proj):
        assert int((weight == 0).sum()) == 0.25 * weight.numel()


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "llama4_text", "phimoe", "jetmoe"])
def test_what_chooses_experts_is_never_pruned_and_named_as_left(kind):
    model = tiny_mixture(kind)
    routers = {
        name: parameter.clone()
        for name, parameter in model.named_parameters()
        if {"gate", "router", "shared_expert_gate"} & set(name.split("."))
    }
    prune(model, 0.5)
    assert routers
    assert all(torch.equal(parameter, model.get_parameter(name)) for name, parameter in routers.items())
    assert {"embed_tokens", "lm_head"} < set(left_in(model))
    assert {"gate", "router"} & set(left_in(model))


def test_a_layer_called_gate_is_pruned_where_there_are_no_experts():
    model = torch.nn.ModuleDict({"gate": torch.nn.Linear(4, 4)})
    prune(model, 0.5)
    assert int((model["gate"].weight == 0).sum()) == 8


def test_what_is_said_of_a_mixture_is_counted_in_the_file(tmp_path, capsys):
    tiny_mixture("mixtral", vocab_size=1024).save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(tmp_path / "dense")
    flags = ["--model_name_or_path", str(tmp_path / "dense"), "--output_dir", str(tmp_path / "pruned")]
    report = prune_verb.main(flags)
    shown = capsys.readouterr().out
    tensors = load_file(tmp_path / "pruned" / "model.safetensors").values()
    zeros, weights = sum(int((each == 0).sum()) for each in tensors), sum(each.numel() for each in tensors)
    # Half of two layers, each with four projections of 16 by 16 and four experts of (64 by 16) and (16 by 32); and the
    # embedding of the token that pads.
    assert zeros == 2 * (4 * 16 * 16 + 4 * (64 * 16 + 16 * 32)) // 2 + 16
    assert report["all"]["zeros"] == 0.5
    assert f"whole model: {zeros / weights:.1%} of {weights:,} weights are zero" in shown
    assert "not pruned: embed_tokens, gate, input_layernorm, post_attention_layernorm, norm, lm_head" in shown


class Stack(torch.nn.Module):
    """Experts that do not say how they are stored."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(shape))


@pytest.mark.parametrize(
    ("name", "experts"),
    [("mlp", Stack(4, 8, 8)), ("experts", Stack(32, 8))],  # a stack, and experts below each other in one matrix
)
def test_experts_of_which_the_layout_is_not_known_are_refused_by_name(name, experts):
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 8), name: experts})
    with pytest.raises(ValueError, match=rf"{name} of Stack, of shape .* may hold experts, but it is not known which"):
        prune(model, 0.5)
    assert nonzero_shares(model)["all"] == 1


def test_a_convolution_and_a_vector_with_three_dimensions_are_no_experts():
    model = torch.nn.ModuleDict({"conv": torch.nn.Conv1d(4, 4, 3), "mix": Stack(1, 1, 8), "q": torch.nn.Linear(8, 8)})
    prune(model, 0.5)
    assert nonzero_shares(model) == {"conv": 1.0, "mix": 1.0, "q": 0.5, "all": (48 + 8 + 32) / (48 + 8 + 64)}


def test_patterns_are_counted():
    model = torch.nn.ModuleDict({"a_proj": torch.nn.Linear(8, 2), "b_proj": torch.nn.Linear(6, 2)})
    with torch.no_grad():
        model["a_proj"].weight.copy_(torch.tensor([[1.0, 1, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0, 0]]))
        torch.nn.init.ones_(model["b_proj"].weight)
    report = sparsity_report(model, ("2:4", "1x4"))
    assert report["a_proj"] == {"zeros": 11 / 16, "2:4": 3 / 4, "1x4": 2 / 4}
    assert report["b_proj"] == {"zeros": 0, "2:4": 0, "1x4": 0}  # six inputs: no groups of four
    assert report["all"]["zeros"] == 11 / 28
    assert list(report)[-1] == "all"


@pytest.mark.parametrize("pattern", ["4:2", "2:2", "0:4", "16", "x16", "2;4", ""])
def test_what_is_no_pattern_is_told(pattern):
    with pytest.raises(ValueError, match="--pattern must be 'unstructured', n:m with n below m, or a block size"):
        parse_pattern(pattern)


def test_nothing_is_pruned_where_one_layer_does_not_fit():
    model = torch.nn.ModuleDict({"fits": torch.nn.Linear(8, 2), "not": torch.nn.Linear(6, 2)})
    with pytest.raises(
        ValueError, match="--pattern 2:4 does not fit not: its 6 inputs cannot be divided into groups of 4"
    ):
        prune(model, pattern="2:4")
    assert nonzero_shares(model)["all"] == 1


def test_quantised_weights_are_not_pruned():
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, quantization_config=options)
    with pytest.raises(ValueError, match="q_proj are quantised. Load the model without"):
        prune(model)


def test_zeros_survive_quantisation_to_4_bit(tmp_path):
    prune_verb.main(["--output_dir", str(tmp_path / "pruned")])
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", quantization_config=options)
    assert nonzero_shares(model)["q_proj"] <= 0.5  # small values may be rounded to zero as well


def test_the_path_from_dense_to_merged(tmp_path, capsys):
    pruned, lora, merged = (str(tmp_path / name) for name in ("pruned", "lora", "merged"))
    report = prune_verb.main(["--sparsity", "0.6", "--output_dir", f"{pruned}/"])
    assert report["all"]["zeros"] == pytest.approx(0.6, abs=1e-3)
    data = ["--dataset_name", "demo", "--use_cpu"]
    train = [
        "--do_train",
        "--block_size",
        "64",
        "--learning_rate",
        "5e-3",
        "--max_passes",
        "30",
        "--disable_tqdm",
        "true",
    ]
    run_clm_abr.main([*data, *train, "--model_name_or_path", pruned, "--output_dir", lora])
    flags = [*data, "--model_name_or_path", pruned, "--adapter", lora, "--token_length", "64", "--max_rows", "40"]
    (tmp_path / "merged").mkdir()
    written = ["--output_file", str(tmp_path / "found.json")]
    found = export.main([*flags, "--output_dir", f"{merged}/", *written])
    merge = found.pop("merge")
    assert merge["keep_mask"], "the base is sparse"
    assert json.loads((tmp_path / "found.json").read_text()) == found
    shown = capsys.readouterr().out
    assert found["beside"]["perplexity"] < found["base"]["perplexity"]
    assert found["beside"]["perplexity"] < found["merged"]["perplexity"] < found["base"]["perplexity"]
    assert found["merged"]["nonzero_share"] == found["base"]["nonzero_share"]
    assert f"merged      {found['merged']['perplexity']:.4f}" in shown
    assert "model  " in shown
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["model_type"] == "llama"
    with pytest.raises(SystemExit, match=f"error: --output_dir {merged} is not an empty directory. Give a new one."):
        export.main([*flags, "--output_dir", merged])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sparsity", "2"], "--sparsity must be between 0 and 1, got 2.0."),
        (
            ["--pattern", "2:4", "--sparsity", "0.7"],
            "--sparsity cannot be used with --pattern 2:4, which sets the sparsity.",
        ),
    ],
)
def test_a_share_that_cannot_be_is_told(tmp_path, flags, message):
    with pytest.raises(SystemExit, match=re.escape(f"error: {message}")):
        prune_verb.main([*flags, "--output_dir", str(tmp_path / "pruned")])


@pytest.mark.long
@pytest.mark.launches
def test_the_recipe_recovers_a_pruned_model_and_makes_nothing_twice(tmp_path):
    out = tmp_path / "sparse"
    flags = ["--max_passes", "20", "--learning_rate", "5e-3", "--max_eval_samples", "16", "--use_cpu"]
    command = ["bash", "scripts/run_pruned_lora.sh", "demo", "demo", str(out), *flags, "--disable_tqdm", "true"]
    environment = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    options = {"cwd": ROOT, "env": environment | {"TOKEN_LENGTH": "64"}, "capture_output": True, "text": True}
    done = subprocess.run(command, timeout=300, check=True, **options)
    lines = dict(re.findall(r"^(base|beside|merged) +([\d.]+)", done.stdout, flags=re.MULTILINE))
    base, beside, merged = (float(lines[name]) for name in ("base", "beside", "merged"))
    assert beside < merged < base
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    zeros = sparsity_report(AutoModelForCausalLM.from_pretrained(out / "merged"))["all"]["zeros"]
    assert zeros == pytest.approx(0.5, abs=1e-3)
    again = subprocess.run(command, timeout=300, check=True, **options)
    assert again.stdout == ""
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == made
