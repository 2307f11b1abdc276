"""Makes golden.safetensors: small weights that the methods' own libraries packed, and what these unpack them to.

    pip install --target LIBRARIES --no-deps compressed-tensors==0.20.1 bitsandbytes==0.50.2 loguru
    PYTHONPATH=LIBRARIES python tests/models/packing/golden.py

Each weight CASE has its parts under CASE.weight... and the library's own float32 values under CASE.expected.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

ROWS, COLUMNS = 16, 32
PACKED = {  # name -> bits, group (-1: a row), symmetric
    "int4_group": (4, 16, True),
    "int4_asymmetric": (4, 16, False),
    "int8_channel": (8, -1, True),
    "int3_channel": (3, -1, False),
    "int2_group": (2, 16, False),
}


def scheme(num_bits, kind, strategy, group_size, symmetric=True, block=None):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(
        num_bits=num_bits,
        type=kind,
        strategy=strategy,
        group_size=group_size,
        symmetric=symmetric,
        block_structure=block,
        **({"scale_dtype": torch.uint8} if (kind, group_size) == ("float", 32) else {}),
    )
    return QuantizationScheme(targets=["Linear"], weights=weights)


def blocks(weight, rows, columns):
    """[N / rows, K / columns, rows * columns]"""
    n, k = weight.shape
    return weight.reshape(n // rows, rows, k // columns, columns).permute(0, 2, 1, 3).flatten(2)


def scale_and_zero(weight, bits, rows, columns, symmetric):
    parts = blocks(weight, rows, columns)
    if symmetric:
        return parts.abs().amax(-1) / (2 ** (bits - 1) - 0.5), None
    low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    return scale, (-(2 ** (bits - 1)) - low / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(
        torch.int8
    )


def compressed(compressor, weight, plan, scale, zero=None, **more):
    """The stored parts, and the values in float32."""
    state = {"weight": weight, "weight_scale": scale, **more} | ({} if zero is None else {"weight_zero_point": zero})
    stored = compressor.compress(state, plan)
    exact = {name: t.float() if t.is_floating_point() and t.itemsize > 1 else t for name, t in stored.items()}
    return stored, compressor.decompress(exact, plan)["weight"].float()


def compressed_tensors(weight):
    from compressed_tensors.compressors import (
        FloatQuantizationCompressor,
        IntQuantizationCompressor,
        MXFP4PackedCompressor,
        NVFP4PackedCompressor,
        PackedQuantizationCompressor,
    )
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    for name, (bits, group, symmetric) in PACKED.items():
        scale, zero = scale_and_zero(weight, bits, 1, COLUMNS if group == -1 else group, symmetric)
        plan = scheme(bits, "int", "channel" if group == -1 else "group", group, symmetric)
        yield name, compressed(PackedQuantizationCompressor, weight, plan, scale.bfloat16(), zero)
    narrow = weight[:, :20].contiguous()  # words are not full
    scale, zero = scale_and_zero(narrow, 4, 1, 20, False)
    plan = scheme(4, "int", "channel", -1, False)
    yield "int4_narrow", compressed(PackedQuantizationCompressor, narrow, plan, scale.half(), zero)
    for name, symmetric, strategy, rows in (
        ("w8a8", True, "channel", 1), ("w8a8_asymmetric", False, "channel", 1), ("w8a8_tensor", True, "tensor", ROWS)
    ):  # fmt: skip
        scale, zero = scale_and_zero(weight, 8, rows, COLUMNS, symmetric)
        plan = scheme(8, "int", strategy, None, symmetric)
        yield name, compressed(IntQuantizationCompressor, weight, plan, scale.bfloat16(), zero)
    for name, strategy, rows, columns in (
        ("fp8_channel", "channel", 1, COLUMNS), ("fp8_tensor", "tensor", ROWS, COLUMNS), ("fp8_block", "block", 4, 16)
    ):  # fmt: skip
        scale = blocks(weight, rows, columns).abs().amax(-1) / 448
        plan = scheme(8, "float", strategy, None, block=[rows, columns] if strategy == "block" else None)
        yield name, compressed(FloatQuantizationCompressor, weight, plan, scale)
    largest = weight.abs().max()
    glob = (448 * 6 / largest).reshape(1)
    scale = (blocks(weight, 1, 16).abs().amax(-1) / 6 * glob).to(torch.float8_e4m3fn).float()
    plan = scheme(4, "float", "tensor_group", 16)
    stored, _ = compressed(NVFP4PackedCompressor, weight, plan, scale, weight_global_scale=glob)
    numbers = unpack_fp4_from_uint8(
        stored["weight_packed"], *weight.shape, dtype=torch.float32
    )  # not rounded, as above
    yield "nvfp4", (stored, dequantize(numbers, scale, args=plan.weights, global_scale=glob, dtype=torch.float32))
    scale = torch.exp2((blocks(weight, 1, 32).abs().amax(-1) / 6).log2().ceil())
    yield "mxfp4", compressed(MXFP4PackedCompressor, weight, scheme(4, "float", "group", 32), scale)


def bitsandbytes(weight):
    import bitsandbytes.functional as bnb

    for name, kind, nested in (("nf4", "nf4", False), ("nf4_nested", "nf4", True), ("fp4", "fp4", False)):
        packed, state = bnb.quantize_4bit(weight.float(), blocksize=64, quant_type=kind, compress_statistics=nested)
        stored = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        yield name, ({"weight": packed, **stored}, bnb.dequantize_4bit(packed, state).float())
    numbers, scale, _ = bnb.int8_vectorwise_quant(weight.half())
    yield "int8", ({"weight": numbers, "SCB": scale}, bnb.int8_vectorwise_dequant(numbers, scale).float())


def main():
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.02
    held = {}
    for made in (compressed_tensors, bitsandbytes):
        for name, (parts, values) in made(weight):
            case = f"{made.__name__}.{name}"
            held |= {f"{case}.{part}": tensor.contiguous() for part, tensor in parts.items()}
            held[f"{case}.expected"] = values.contiguous()
    save_file(held, Path(__file__).with_name("golden.safetensors"), metadata={"format": "pt"})


if __name__ == "__main__":
    main()
