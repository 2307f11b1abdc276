"""Lower the matrix products of a stage to ONNX Runtime's MatMulNBits: weights of 4 or 8 bits, quantised on opening.

Each block of 32 weights of a row has its own scale and zero point, which cover its minimum, its maximum and zero
evenly. Activations are quantised to 8 bits inside the operator (accuracy level 4), as in llama.cpp.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass
from stageline.models.errors import EngineError
from stageline.runtime.engines.base import WeightDtype
from stageline.runtime.engines.lowering.external import read_external

BLOCK = 32
MIN_WEIGHTS = 1 << 14  # smaller matrices are not quantised
MAX_GRAPH_BYTES = 1_900_000_000  # of one graph: protobuf ends at 2 GiB
_BITS = {"int4": 4, "int8": 8}


def to_nbits(model: ir.Model, dtype: WeightDtype) -> ir.Model:
    """Lower `model`, whose activations are float32, in place and return it. EngineError if its weights do not fit into
    one graph."""
    bits = _BITS[dtype]
    made: dict[ir.Value, list[ir.Value]] = {}
    total = 0
    for node in list(model.graph):
        found = multiplied_weight(node, MIN_WEIGHTS)
        if found is None:
            continue
        weight, transposed = found
        if weight not in made:
            array = _values(weight)
            tensors = quantise(array if transposed else array.T, bits)
            total += sum(tensor.nbytes for tensor in tensors)
            if total > MAX_GRAPH_BYTES:
                raise EngineError(
                    f"the {dtype} weights of one stage have more than {MAX_GRAPH_BYTES / 1e9} GB; cut the bundle into "
                    "more stages: stageline recut BUNDLE --stages N"
                )
            made[weight] = [_initializer(model.graph, f"{weight.name}.{dtype}.{i}", t) for i, t in enumerate(tensors)]
        _replace(model.graph, node, made[weight], bits, weight, transposed)
    model.graph.opset_imports["com.microsoft"] = 1
    RemoveUnusedNodesPass()(model)
    return model


def bytes_per_weight(dtype: WeightDtype) -> float:
    """Bytes of a quantised weight, including its share of its block's scale and zero point."""
    return (BLOCK * _BITS[dtype] + 32 + _BITS[dtype]) / 8 / BLOCK


def quantise(weight: NDArray[np.float32], bits: int) -> list[NDArray[Any]]:
    """weight [N, K] -> values uint8 [N, blocks, BLOCK * bits / 8], scales float32 [N, blocks], zero points uint8 [N,
    blocks * bits / 8]. Two of four bits share a byte, the first in the lower half. weight ~ (value - zero) * scale."""
    rows, columns = weight.shape
    blocks = -(-columns // BLOCK)
    padded = np.zeros((rows, blocks * BLOCK), np.float32)
    padded[:, :columns] = weight
    grouped = padded.reshape(rows, blocks, BLOCK)
    top = 2**bits - 1
    low, high = grouped.min(axis=2).clip(max=0), grouped.max(axis=2).clip(min=0)
    scales = (high - low) / np.float32(top)
    scales[scales == 0] = 1
    zeros = np.rint(-low / scales).clip(0, top).astype(np.uint8)
    values = (np.rint(grouped / scales[:, :, None]) + zeros[:, :, None]).clip(0, top).astype(np.uint8)
    if bits == 4:
        values = values[:, :, 0::2] | values[:, :, 1::2] << 4
        even = np.zeros((rows, blocks + blocks % 2), np.uint8)
        even[:, :blocks] = zeros
        zeros = even[:, 0::2] | even[:, 1::2] << 4
    return [values, scales, zeros]


def multiplied_weight(node: ir.Node, min_weights: int = 1) -> tuple[ir.Value, bool] | None:
    """The initializer of at least `min_weights` elements that the node multiplies its first input by, and whether its
    layout is [N, K]."""
    if node.op_type not in ("MatMul", "Gemm") or node.domain or node.inputs[0] is None or node.inputs[1] is None:
        return None
    plain = {"transA": 0, "alpha": 1.0, "beta": 1.0}
    if any(name in node.attributes and node.attributes[name].value != value for name, value in plain.items()):
        return None
    transposed = "transB" in node.attributes and node.attributes["transB"].as_int() == 1
    value = node.inputs[1]
    while (producer := value.producer()) is not None and producer.op_type in ("Transpose", "Cast"):
        if producer.op_type == "Transpose":
            transposed = not transposed
        source = producer.inputs[0]
        assert source is not None
        value = source
    if not value.is_initializer() or value.const_value is None or len(value.const_value.shape) != 2:
        return None
    return (value, transposed) if value.const_value.size >= min_weights else None


def _values(weight: ir.Value) -> NDArray[np.float32]:
    """The weight in float32."""
    tensor = weight.const_value
    assert tensor is not None
    array = read_external(tensor) if isinstance(tensor, ir.ExternalTensor) else np.asarray(tensor.numpy())
    return array.astype(np.float32)


def _initializer(graph: ir.Graph, name: str, tensor: NDArray[Any]) -> ir.Value:
    data = ir.tensor(tensor, name=name)
    value = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(data.dtype), const_value=data)
    graph.register_initializer(value)
    return value


def _replace(
    graph: ir.Graph, node: ir.Node, tensors: list[ir.Value], bits: int, weight: ir.Value, transposed: bool
) -> None:
    assert weight.const_value is not None
    first, second = (int(size) for size in weight.const_value.shape.numpy())
    rows, columns = (first, second) if transposed else (second, first)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    product = ir.node(
        "MatMulNBits",
        [node.inputs[0], *tensors, None, bias],
        {"K": columns, "N": rows, "bits": bits, "block_size": BLOCK, "accuracy_level": 4},
        domain="com.microsoft",
        name=f"{node.name}.nbits",
    )
    graph.insert_before(node, product)
    result = product.outputs[0]
    old = node.outputs[0]
    result.name, result.shape, result.type = old.name, old.shape, old.type
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
