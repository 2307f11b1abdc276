"""A stage of one packed weight: its rows looked up, or activations multiplied by it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from stageline.models.safetensors_file import read_header, write_streaming
from stageline.models.tensors import Packing
from stageline.runtime.bundle.graph import ir_dtype
from stageline.runtime.bundle.packed import dequantise_node
from stageline.runtime.engines import StageFile


def q4_1(rng: np.random.Generator, rows: int, columns: int) -> tuple[Packing, dict[str, NDArray[Any]]]:
    """A random matrix in GGUF's Q4_1: blocks of 32 numbers of four bits, each times a scale, plus an offset."""
    blocks = np.empty((rows, columns // 32, 20), np.uint8)
    blocks[..., 4:] = rng.integers(0, 256, (rows, columns // 32, 16))
    ends = np.stack([rng.uniform(0.01, 0.1, blocks.shape[:2]), rng.uniform(-1, 0.1, blocks.shape[:2])], axis=-1)
    blocks[..., :4] = np.ascontiguousarray(ends.astype("<f2")).view(np.uint8).reshape(*blocks.shape[:2], 4)
    return Packing("gguf", {"type": "Q4_1"}, (rows, columns), "float32"), {"blocks": blocks.reshape(rows, -1)}


def gptq(
    rng: np.random.Generator, rows: int, columns: int, group: int, act_order: bool
) -> tuple[Packing, dict[str, NDArray[Any]]]:
    """A random matrix of four bits as GPTQ lays it out: eight inputs of an output in an int32, zero points less one."""
    g_idx = np.arange(columns, dtype=np.int32) // group
    arrays = {
        "qweight": rng.integers(-(2**31), 2**31, (columns // 8, rows)).astype(np.int32),
        "qzeros": (rng.integers(-(2**31), 2**31, (columns // group, rows // 8)) & 0x77777777).astype(np.int32),
        "scales": rng.uniform(0.01, 0.1, (columns // group, rows)).astype(np.float16),
        "g_idx": rng.permutation(g_idx) if act_order else g_idx,
    }
    return Packing(
        "gptq", {"bits": 4, "group_size": group, "checkpoint_format": "gptq"}, (rows, columns), "float16"
    ), arrays


def packed_stage(
    folder: Path, packing: Packing, arrays: Mapping[str, NDArray[Any]], operator: str, dtype: str = "float32"
) -> StageFile:
    """The stage, saved in `folder`: `MatMul` of x [batch, length, K] and the weight's transpose, or `Gather` of rows
    ids [batch, length]; the graph computes in `dtype`."""
    specs = [(role, array.dtype.name, array.shape) for role, array in arrays.items()]
    write_streaming(folder / "w.safetensors", specs, lambda role: [np.ascontiguousarray(arrays[role]).tobytes()])
    kind = ir_dtype(dtype)
    parts = {}
    for role, entry in read_header(folder / "w.safetensors").items():
        data = ir.ExternalTensor(
            "w.safetensors", entry.offset, entry.size_bytes, ir_dtype(entry.dtype), shape=ir.Shape(entry.shape),
            name=f"w.{role}", base_dir=folder,
        )  # fmt: skip
        parts[role] = ir.Value(name=f"w.{role}", shape=data.shape, type=ir.TensorType(data.dtype), const_value=data)
    unpack = dequantise_node(packing, {role: parts[role] for role in arrays})
    weight = unpack.outputs[0]
    weight.name, weight.shape, weight.type = "w", ir.Shape(packing.shape), ir.TensorType(kind)
    rows, columns = packing.shape
    if operator == "MatMul":
        given = ir.Value(name="x", shape=ir.Shape(["batch", "length", columns]), type=ir.TensorType(kind))
        turn = ir.node("Transpose", [weight], {"perm": [1, 0]})
        nodes = [unpack, turn, ir.node("MatMul", [given, turn.outputs[0]], name="product")]
    else:
        given = ir.Value(name="ids", shape=ir.Shape(["batch", "length"]), type=ir.TensorType(ir.DataType.INT64))
        nodes = [unpack, ir.node("Gather", [weight, given], name="table")]
    y = nodes[-1].outputs[0]
    y.name, y.type = "y", ir.TensorType(kind)
    y.shape = ir.Shape(["batch", "length", rows if operator == "MatMul" else columns])
    graph = ir.Graph(
        [given], [y], nodes=nodes, initializers=list(parts.values()), opset_imports={"": 20, "stageline": 1}
    )
    ir.save(ir.Model(graph, ir_version=10), folder / "stage.onnx")
    return StageFile(0, folder / "stage.onnx", folder)
