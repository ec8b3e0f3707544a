"""Whether bitsandbytes computes with quantised weights rightly on this machine: each kind of layer, once, by hand."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit, get_4bit_type, has_avx512bf16
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

MOST_WEIGHTS = 2**22
"""How many weights of a layer are looked at, whole rows: enough for a kernel, and little beside the layer."""

ROUNDING_OF_VALUES = 0.01
"""How far values may be from those by hand, as a share of their norm. In bf16 they are off by 0.002."""

ROUNDING = {4: 0.05, 8: 0.1}
"""How far products may be from those by hand, as a share of their norm, by bits. Arithmetic in bf16 is off by 0.003,
rows rounded to 8 bit by 0.01; kernels that are wrong, by 0.2 and more.
"""


def unpacked(packed: Tensor, count: int) -> Tensor:
    """Return the first so many codes of 4 bit, of which a byte holds two, the first in its upper half.

    >>> unpacked(torch.tensor([0x1F, 0x20], dtype=torch.uint8), 3).tolist()
    [1, 15, 2]
    """
    packed = packed.reshape(-1).view(torch.uint8)[: math.ceil(count / 2)]
    return torch.stack((packed >> 4, packed & 15), dim=1).flatten()[:count]


def _scaled(codes: Tensor, table: Tensor, scales: Tensor, blocksize: int) -> Tensor:
    return table[codes.int()] * scales.repeat_interleave(blocksize)[: len(codes)]


def dequantised(layer: Linear4bit | Linear8bitLt, rows: int) -> Tensor:
    """Return the first rows of the weights that a quantised layer stands for, `(rows, inputs)` in fp32, with plain
    torch.
    """
    weight: Any = layer.weight
    if isinstance(layer, Linear8bitLt):
        values: Tensor = weight.CB[:rows].float() * weight.SCB[:rows, None].float() / 127
        return values
    state = weight.quant_state
    inputs = state.shape[-1]
    scales = state.absmax[: math.ceil(rows * inputs / state.blocksize)]
    if state.nested:
        inner = state.state2
        scales = _scaled(scales, inner.code, inner.absmax, inner.blocksize) + state.offset
    return _scaled(unpacked(weight.data, rows * inputs), state.code, scales.float(), state.blocksize).view(
        rows, inputs
    )


def check_kernels(model: nn.Module) -> None:
    """Compare one quantised layer of each kind with what plain torch makes of its weights.

    On a CPU, plain torch takes over where bitsandbytes makes wrong values of 4-bit weights. Nothing else is mended.

    Raises:
        ValueError: Layers are computed wrongly.
    """
    version = f"bitsandbytes {bitsandbytes.__version__}"
    for name, layer in _one_of_each_kind(model):
        device, bits = layer.weight.device, 4 if isinstance(layer, Linear4bit) else 8
        if bits == 4 and device.type == "cpu" and _values_are_wrong(layer):
            logger.warning(
                f"{version} makes wrong values of 4-bit weights with {layer.in_features} inputs on this processor "
                f"({_processor(device)}), as of {name}: plain torch does it instead, more slowly."
            )
            _go_around(layer.weight.quant_state)
        error = _error(layer)
        if not error <= ROUNDING[bits]:  # nor if it is not a number
            raise ValueError(
                f"{version} computes {bits}-bit layers of shape {(layer.out_features, layer.in_features)} wrongly on "
                f"this machine ({_processor(device)}): {name} is off by {error:.0%}. Load the model without "
                f"--load_in_{bits}bit, or install another version of bitsandbytes."
            )


def _one_of_each_kind(model: nn.Module) -> list[tuple[str, Any]]:
    """Return a quantised layer for each device, shape and way of quantising, with its name, where weights are here."""
    kinds: dict[Any, tuple[str, nn.Module]] = {}
    for name, layer in model.named_modules():
        weight: Any = getattr(layer, "weight", None)
        if isinstance(layer, Linear4bit) and (state := getattr(weight, "quant_state", None)) is not None:
            how: tuple[Any, ...] = (state.shape, state.blocksize, state.quant_type, state.dtype, state.nested)
            how += (weight.dtype, layer.compute_dtype)
        elif isinstance(layer, Linear8bitLt) and getattr(weight, "CB", None) is not None:
            how = (weight.shape,)
        else:
            continue
        if weight.device.type != "meta":
            kinds.setdefault((weight.device, *how), (name, layer))
    return list(kinds.values())


def _rows(layer: nn.Linear) -> int:
    return max(1, min(layer.out_features, MOST_WEIGHTS // layer.in_features))


@torch.no_grad()
def _values_are_wrong(layer: Any) -> bool:
    expected = dequantised(layer, _rows(layer))
    found = dequantize_4bit(layer.weight.data, layer.weight.quant_state)[: len(expected)].float()
    return not _distance(found, expected) <= ROUNDING_OF_VALUES


@torch.no_grad()
def _error(layer: Any) -> float:
    """Return how far the products of a layer are from those by hand, as a share of their norm."""
    weight = layer.weight
    dtype = (layer.compute_dtype or torch.bfloat16) if isinstance(layer, Linear4bit) else torch.float16
    values = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(0))
    inputs = values.to(weight.device, dtype)
    if isinstance(layer, Linear4bit):
        # Transposed, which bitsandbytes takes from 0.49 on; the weight as it is, only from 0.50 on.
        found = bitsandbytes.matmul_4bit(inputs, weight.data.t(), quant_state=weight.quant_state)
    else:
        state = bitsandbytes.MatmulLtState()
        state.CB, state.SCB, state.threshold = weight.CB, weight.SCB, layer.state.threshold
        state.has_fp16_weights = state.is_training = False
        found = bitsandbytes.matmul(inputs, weight.CB, state=state)
    expected = inputs.float() @ dequantised(layer, _rows(layer)).T
    return _distance(found[:, : expected.shape[1]].float(), expected)


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float32).tiny))


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.backends.cpu.get_cpu_capability() + (" with avx512_bf16" if has_avx512bf16() else "")


# ---- Going around a kernel ----


class _Around:
    """A kernel in the place of that of bitsandbytes for the CPU, of which all that turns 4-bit weights makes use."""

    def __init__(self) -> None:
        self.wrong: set[tuple[int, int, str]] = set()  # inputs, size of a block, type
        self._original = torch.library.get_kernel("bitsandbytes::dequantize_4bit", "CPU")
        self.library = torch.library.Library("bitsandbytes", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Warning only once for all operators")
            self.library.impl("dequantize_4bit", self, "CPU", allow_override=True)

    def __call__(
        self, packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        if (shape[-1], blocksize, quant_type) not in self.wrong:
            on_cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
            kept: Tensor = self._original.call_boxed(on_cpu, packed, absmax, blocksize, quant_type, shape, dtype)
            return kept
        codes = unpacked(packed, math.prod(shape))
        table = get_4bit_type(quant_type, device=packed.device)
        return _scaled(codes, table, absmax.float(), blocksize).view(*shape).to(dtype)


_around: _Around | None = None


def _go_around(state: Any) -> None:
    global _around
    if _around is None:
        _around = _Around()
    _around.wrong.add((state.shape[-1], state.blocksize, state.quant_type))
