"""Weights as the methods of quantisation store them, rounded to nearest, each beside the values that it means then.

Written from the methods' documentation with torch alone: nothing here is shared with what reads them.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

Tensors = dict[str, torch.Tensor]
Stored = tuple[Tensors, torch.Tensor]
"""What lies in the file (the names after the module's), and the values in float32."""


class Method(NamedTuple):
    """How a matrix [outputs, inputs] is stored, and what config.json says of it."""

    store: Callable[[torch.Tensor], Stored]
    stated: Mapping[str, Any]


def _grouped(weight: torch.Tensor, group: int) -> torch.Tensor:
    return weight.reshape(weight.shape[0], -1, group)


def _whole(weight: torch.Tensor, bits: int, group: int, kind: torch.dtype, *, symmetric: bool) -> Any:
    """Numbers from 0 [N, K], zero points [N, G], scales [N, G] of type `kind`, the values."""
    parts, most = _grouped(weight, group), 2**bits - 1
    if symmetric:
        scale = (parts.abs().amax(-1) * 2 / most).to(kind)
        zero = torch.full(scale.shape, 2 ** (bits - 1))
    else:
        low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
        scale = ((high - low) / most).to(kind)
        zero = (-low / scale.float()).round().clamp(0, most).long()
    steps = scale.float()[..., None]
    numbers = ((parts / steps).round() + zero[..., None]).clamp(0, most).long()
    values = (numbers - zero[..., None]).float() * steps
    return numbers.reshape(weight.shape), zero, scale, values.reshape(weight.shape)


def _words(numbers: torch.Tensor, bits: int, order: list[int] | None = None) -> torch.Tensor:
    """Along the last axis, 32 / bits numbers an int32; place p of a word has number order[p]."""
    count = 32 // bits
    each = numbers.long().reshape(*numbers.shape[:-1], -1, count)[..., order or list(range(count))]
    word = sum(each[..., place] << bits * place for place in range(count))
    return torch.as_tensor(word).to(torch.int32)


def _gptq(bits: int, *, first: int = 1, mixed: bool = False) -> Callable[[torch.Tensor], Stored]:
    def store(weight: torch.Tensor) -> Stored:
        inputs, group = weight.shape[1], 128
        order = torch.randperm(inputs, generator=torch.Generator().manual_seed(0)) if mixed else torch.arange(inputs)
        numbers, zero, scale, values = _whole(weight[:, order], bits, group, torch.float16, symmetric=False)
        back = torch.argsort(order)
        stored_zero = (zero.T - first) % 2**bits
        return {
            "qweight": _words(numbers[:, back], bits).T,
            "qzeros": _words(stored_zero, bits),
            "scales": scale.T,
            "g_idx": (torch.arange(inputs) // group)[back].to(torch.int32),
        }, values[:, back]

    return store


def _awq(weight: torch.Tensor) -> Stored:
    numbers, zero, scale, values = _whole(weight, 4, 128, torch.float16, symmetric=False)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    parts = {"qweight": _words(numbers.T, 4, order), "qzeros": _words(zero.T, 4, order), "scales": scale.T}
    return parts, values


def _packed(bits: int, group: int, *, symmetric: bool) -> Callable[[torch.Tensor], Stored]:
    def store(weight: torch.Tensor) -> Stored:
        size = weight.shape[1] if group == -1 else group
        numbers, zero, scale, values = _whole(weight, bits, size, torch.bfloat16, symmetric=symmetric)
        parts = {
            "weight_packed": _words(numbers, bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor(weight.shape),
        }
        return parts | ({} if symmetric else {"weight_zero_point": _words(zero.T, bits).T}), values

    return store


def _bytes(weight: torch.Tensor) -> Stored:
    numbers, zero, scale, values = _whole(weight, 8, weight.shape[1], torch.bfloat16, symmetric=True)
    return {"weight": (numbers - zero).to(torch.int8), "weight_scale": scale}, values


def _fp8(rows: int, columns: int, role: str) -> Callable[[torch.Tensor], Stored]:
    """Blocks of so many rows and columns (-1: all)."""

    def store(weight: torch.Tensor) -> Stored:
        n, k = weight.shape
        block = (n if rows == -1 else rows, k if columns == -1 else columns)
        parts = weight.reshape(n // block[0], block[0], k // block[1], block[1])
        scale = parts.abs().amax((1, 3), keepdim=True) / 448
        numbers = (parts / scale).to(torch.float8_e4m3fn)
        values = (numbers.float() * scale).reshape(n, k)
        return {"weight": numbers.reshape(n, k), role: scale.reshape(n // block[0], k // block[1])}, values

    return store


_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
_NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def _nearest(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return (values[..., None] - table).abs().argmin(-1)


def _nvfp4(weight: torch.Tensor) -> Stored:
    parts = _grouped(weight, 16)
    whole = weight.abs().max() / (6 * 448)
    scale = (parts.abs().amax(-1) / 6 / whole).to(torch.float8_e4m3fn)
    steps = (scale.float() * whole)[..., None]
    numbers = _nearest(parts / steps, _FP4)
    values = (_FP4[numbers] * steps).reshape(weight.shape)
    numbers = numbers.reshape(weight.shape)
    packed = (numbers[:, 0::2] | numbers[:, 1::2] << 4).to(torch.uint8)
    return {"weight": packed, "weight_scale": scale, "weight_scale_2": whole}, values


def _nf4(weight: torch.Tensor) -> Stored:
    flat = weight.reshape(-1, 64)
    largest = flat.abs().amax(-1)
    numbers = _nearest(flat / largest[:, None], _NF4)
    values = (_NF4[numbers] * largest[:, None]).reshape(weight.shape)
    pairs = numbers.reshape(-1, 2)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    return {
        "weight": (pairs[:, :1] << 4 | pairs[:, 1:]).to(torch.uint8),
        "weight.absmax": largest,
        "weight.quant_map": _NF4,
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }, values


def _int8(weight: torch.Tensor) -> Stored:
    scale = weight.abs().amax(1)
    numbers = (weight / scale[:, None] * 127).round().to(torch.int8)
    return {"weight": numbers, "SCB": scale}, numbers.float() * (scale[:, None] * torch.tensor(1 / 127))


def _compressed(kind: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups}


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
METHODS = {
    "gptq": Method(_gptq(4), _GPTQ),
    "gptq 8 bits": Method(_gptq(8), {**_GPTQ, "bits": 8}),
    "gptq v2": Method(_gptq(4, first=0), {**_GPTQ, "checkpoint_format": "gptq_v2"}),
    "gptq act-order": Method(_gptq(4, mixed=True), {**_GPTQ, "desc_act": True}),
    "awq": Method(_awq, {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}),
    "compressed-tensors w4a16": Method(
        _packed(4, 128, symmetric=True), _compressed("pack-quantized", num_bits=4, strategy="group", group_size=128)
    ),
    "compressed-tensors w4a16 asymmetric": Method(
        _packed(4, 32, symmetric=False),
        _compressed("pack-quantized", num_bits=4, strategy="group", group_size=32, symmetric=False),
    ),
    "compressed-tensors w8a16": Method(
        _packed(8, -1, symmetric=True), _compressed("pack-quantized", num_bits=8, strategy="channel")
    ),
    "compressed-tensors w8a8": Method(_bytes, _compressed("int-quantized", num_bits=8, strategy="channel")),
    "compressed-tensors fp8": Method(
        _fp8(1, -1, "weight_scale"), _compressed("float-quantized", num_bits=8, type="float", strategy="channel")
    ),
    "fp8": Method(_fp8(128, 128, "weight_scale_inv"), {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "modelopt fp8": Method(_fp8(-1, -1, "weight_scale"), {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "modelopt nvfp4": Method(_nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "bitsandbytes nf4": Method(_nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "bitsandbytes int8": Method(_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
}
"""Methods that are read, under the name of a row."""
