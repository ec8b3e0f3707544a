"""Check that bitsandbytes computes quantised layers correctly on this machine, once for each kind of layer."""

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
"""Most weights of a layer to check, in full rows: enough to test a kernel, and cheap."""

ROUNDING_OF_VALUES = 0.01
"""Allowed error of dequantised values, relative to their norm. In bf16 the error is 0.002."""

ROUNDING = {4: 0.05, 8: 0.1}
"""Allowed error of a layer's output, relative to its norm, by bits. The error of bf16 is 0.003, that of rounding rows
to 8 bit 0.01, and that of wrong kernels 0.2 or more.
"""


def unpacked(packed: Tensor, count: int) -> Tensor:
    """Return the first `count` 4-bit codes. A byte holds two, the first one in its upper half.

    >>> unpacked(torch.tensor([0x1F, 0x20], dtype=torch.uint8), 3).tolist()
    [1, 15, 2]
    """
    packed = packed.reshape(-1).view(torch.uint8)[: math.ceil(count / 2)]
    return torch.stack((packed >> 4, packed & 15), dim=1).flatten()[:count]


def _scaled(codes: Tensor, table: Tensor, scales: Tensor, blocksize: int) -> Tensor:
    return table[codes.int()] * scales.repeat_interleave(blocksize)[: len(codes)]


def dequantised(layer: Linear4bit | Linear8bitLt, rows: int) -> Tensor:
    """Dequantise the first rows of a layer with plain torch: `(rows, inputs)` in fp32."""
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
    """Compare one quantised layer of each kind with the result of plain torch.

    If bitsandbytes dequantises 4-bit weights wrongly on a CPU, replace its kernel by plain torch.

    Raises:
        ValueError: Layers are computed wrongly in another way.
    """
    version = f"bitsandbytes {bitsandbytes.__version__}"
    for name, layer in _one_of_each_kind(model):
        device, bits = layer.weight.device, 4 if isinstance(layer, Linear4bit) else 8
        if bits == 4 and device.type == "cpu" and _values_are_wrong(layer):
            logger.warning(
                f"{version} dequantises 4-bit weights with {layer.in_features} inputs wrongly on this processor "
                f"({_processor(device)}), e.g. {name}. Plain torch is used instead, which is slower."
            )
            _replace_kernel(layer.weight.quant_state)
        error = _error(layer)
        if not error <= ROUNDING[bits]:  # also if it is NaN
            raise ValueError(
                f"{version} computes {bits}-bit layers of shape {(layer.out_features, layer.in_features)} wrongly on "
                f"this machine ({_processor(device)}): the error of {name} is {error:.0%}. Load the model without "
                f"--load_in_{bits}bit, or install another version of bitsandbytes."
            )


def _one_of_each_kind(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the name and the layer of one quantised layer per device, shape and quantisation. Skips meta tensors."""
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
    """Return the error of a layer's output compared with plain torch, relative to its norm."""
    weight = layer.weight
    dtype = (layer.compute_dtype or torch.bfloat16) if isinstance(layer, Linear4bit) else torch.float16
    values = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(0))
    inputs = values.to(weight.device, dtype)
    if isinstance(layer, Linear4bit):
        # Transposed: bitsandbytes 0.49 needs it, and only 0.50 takes the weight untransposed.
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


# ---- Replacing a kernel ----


class _Replacement:
    """A kernel that replaces the one of bitsandbytes for dequantising 4-bit weights on the CPU."""

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


_replacement: _Replacement | None = None


def _replace_kernel(state: Any) -> None:
    global _replacement
    if _replacement is None:
        _replacement = _Replacement()
    _replacement.wrong.add((state.shape[-1], state.blocksize, state.quant_type))
