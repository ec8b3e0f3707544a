"""Quantised layers are computed rightly, or not at all, whatever the processor."""

from __future__ import annotations

import warnings

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from abr_trainer.cli import perplexity
from abr_trainer.data.demo import DEMO_MODEL
from abr_trainer.models import quantisation
from abr_trainer.models.arguments import ModelArguments
from abr_trainer.models.loading import load_base, load_config
from abr_trainer.models.quantisation import check_kernels, dequantised

IDS = torch.arange(0, 1024, 11)[None]


def random_weights(outputs, inputs, dtype=torch.float32):
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)).to(dtype)


def four_bit(outputs, inputs, dtype=torch.float32, **options):
    options = {"quant_type": "nf4", "compress_statistics": True, **options}
    layer = Linear4bit(inputs, outputs, bias=False, compute_dtype=torch.float32, **options)
    layer.weight = Params4bit(random_weights(outputs, inputs, dtype), requires_grad=False, **options)
    return layer.to("cpu")


def eight_bit(outputs, inputs):
    layer = Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.load_state_dict({"weight": random_weights(outputs, inputs)})
    return layer.to("cpu")


@pytest.fixture
def broken_kernel(monkeypatch):
    """A processor on which values of 4-bit layers with 96 inputs are scaled as if blocks began anew in each row."""
    monkeypatch.setattr(quantisation, "_replacement", None)
    original = torch.library.get_kernel("bitsandbytes::dequantize_4bit", "CPU")
    on_cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def kernel(packed, absmax, blocksize, quant_type, shape, dtype):
        if shape[-1] == 96:
            absmax = absmax.roll(1)
        return original.call_boxed(on_cpu, packed, absmax, blocksize, quant_type, shape, dtype)

    library = torch.library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.impl("dequantize_4bit", kernel, "CPU", allow_override=True)
    yield
    if quantisation._replacement is not None:
        quantisation._replacement.library._destroy()
    library._destroy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("compress_statistics", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_values_by_hand_are_those_of_the_weights(dtype, quant_type, compress_statistics, storage):
    options = {"quant_type": quant_type, "compress_statistics": compress_statistics, "quant_storage": storage}
    layer = four_bit(64, 128, dtype=dtype, **options)
    weights = random_weights(64, 128, dtype).float()
    by_hand = dequantised(layer, 64)
    # Each value is the nearest one of a table, so that all are off by a tenth of their norm.
    assert 0.05 < float((by_hand - weights).norm() / weights.norm()) < 0.15
    assert torch.equal(dequantised(layer, 5), by_hand[:5])
    torch.testing.assert_close(
        by_hand, dequantize_4bit(layer.weight.data, layer.weight.quant_state).float(), rtol=2**-7, atol=1e-3
    )


def test_kernels_that_are_right_are_left_alone_and_nothing_is_said(caplog):
    shapes = [(96, 64), (64, 128), (96, 256), (10, 100), (7, 320), (1, 64)]
    model = nn.ModuleList(four_bit(*shape, dtype=dtype) for shape in shapes for dtype in (torch.float32, torch.half))
    before, around = torch.get_rng_state(), quantisation._replacement
    check_kernels(model)
    assert quantisation._replacement is around
    assert not caplog.records
    assert torch.equal(torch.get_rng_state(), before)


def test_a_kernel_that_is_wrong_for_some_layers_is_gone_around_for_these(broken_kernel, caplog):
    model = nn.ModuleDict({"wrong": four_bit(64, 96), "right": four_bit(64, 128), "bf16": four_bit(64, 96)})
    expected = {name: dequantised(layer, 64) for name, layer in model.items()}
    wrong = dequantize_4bit(model["wrong"].weight.data, model["wrong"].weight.quant_state)
    assert float((wrong - expected["wrong"]).norm() / expected["wrong"].norm()) > 0.05
    check_kernels(model)
    assert caplog.text.count("dequantises 4-bit weights with 96 inputs wrongly on this processor") == 1
    for name, layer in model.items():
        inputs = torch.randn(3, layer.in_features, requires_grad=True)
        outputs = layer(inputs)
        outputs.sum().backward()
        torch.testing.assert_close(outputs, inputs @ expected[name].T)
        torch.testing.assert_close(inputs.grad, expected[name].sum(0).expand(3, -1))


def test_a_model_with_such_layers_says_and_trains_what_it_should(broken_kernel):
    arguments = ModelArguments(load_in_4bit=True, torch_dtype="float32", bnb_4bit_compute_dtype="float32")
    model = load_base(arguments, load_config(arguments), "cpu")
    plain = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, Linear4bit):
                plain.get_submodule(name).weight.copy_(dequantised(layer, layer.out_features))
    adapter = LoraConfig(target_modules=["q_proj"], use_dora=True)  # DoRA asks for the norms of the weights
    gradients = []
    for each in (model, plain):
        torch.manual_seed(0)
        adapted = get_peft_model(each, adapter).eval()
        output = adapted(IDS, labels=IDS)
        output.loss.backward()
        gradients.append(
            [output.loss.detach(), *(p.grad.float() for n, p in adapted.named_parameters() if p.requires_grad)]
        )
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_the_perplexity_does_not_depend_on_the_processor(broken_kernel):
    flags = ["--dataset_name", "demo", "--token_length", "64", "--use_cpu", "--max_rows", "4", "--load_in_4bit"]
    flags += ["--torch_dtype", "float32", "--bnb_4bit_compute_dtype", "float32"]
    around = perplexity.main(flags)["perplexity"]
    quantisation._replacement.wrong.clear()
    plain = perplexity.main([flag for flag in flags if flag != "--load_in_4bit"])["perplexity"]
    assert around == pytest.approx(plain, rel=0.05)


@pytest.mark.parametrize(("bits", "function"), [(4, "matmul_4bit"), (8, "matmul")])
def test_products_that_are_wrong_are_refused_in_one_line(monkeypatch, bits, function):
    original = getattr(bitsandbytes, function)

    def wrong(*arguments, **options):
        return 1.2 * original(*arguments, **options)

    model = nn.ModuleDict({"q_proj": four_bit(64, 128) if bits == 4 else eight_bit(64, 128)})
    check_kernels(model)
    monkeypatch.setattr(bitsandbytes, function, wrong)
    message = rf"computes {bits}-bit layers of shape \(64, 128\) wrongly .*: the error of q_proj is (19|20|21)%"
    with pytest.raises(ValueError, match=message) as told:
        check_kernels(model)
    assert f"Load the model without --load_in_{bits}bit, or install another version" in str(told.value)
    assert "\n" not in str(told.value)
