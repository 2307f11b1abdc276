"""Lower a stage to an OpenVINO model: attention with a cache becomes PagedAttention, on packed tokens.

A packed token is a row of length 1 with its own place in `past_lengths`, so the graph needs no change for it: tokens
meet in attention alone, which is told by five further inputs which row each one belongs to, and where its blocks lie.

No weight passes through OpenVINO's frontend. Each is an input of the ONNX graph, and becomes a constant in the memory
of its file afterwards.
"""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import openvino as ov
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass
from openvino import opset15 as ops
from openvino.frontend import FrontEndManager
from openvino.frontend.onnx import ConversionExtension
from openvino.op import _PagedAttentionExtension
from stageline.models.errors import EngineError
from stageline.models.packing.base import Groups
from stageline.runtime.bundle.graph import CACHE_ATTENTION, cache_of, dimensions, static
from stageline.runtime.engines.base import StageFile, WeightDtype
from stageline.runtime.engines.lowering.cache_names import past_names
from stageline.runtime.engines.lowering.external import Stored
from stageline.runtime.engines.lowering.float32 import has_types, to_float32
from stageline.runtime.engines.lowering.nbits import MIN_WEIGHTS, multiplied_weight
from stageline.runtime.engines.lowering.packed import Packed, open_stage
from stageline.runtime.engines.lowering.packed_picks import pick_tokens

CONTROL: dict[str, list[str]] = {
    "past_lens": ["rows"],
    "subsequence_begins": ["rows + 1"],
    "block_indices": ["blocks"],
    "block_indices_begins": ["rows + 1"],
    "max_context_len": [],
}
"""Inputs of attention, int32: of each row its tokens before this step, where its new ones begin and its blocks, with
where these begin, and the most tokens of a row after this step."""
GROUP = 32
"""Weights that share a scale and a zero point."""
_SMALL = 64  # constants of at most so many values stay in the graph
_NOT_NUMPY = {"bfloat16": ov.Type.bf16}


@dataclass(frozen=True)
class LoweredForOpenVino:
    """A stage as a model, and the dimensions of its inputs and outputs in the bundle, without those for caches.
    `memory`: what the model's constants lie in; it must live as long as the model, and what is compiled of it."""

    model: ov.Model
    memory: list[NDArray[Any]]
    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str, ...]]


def lowered_for_openvino(stage: StageFile, quantise: WeightDtype | None) -> LoweredForOpenVino:
    """The stage, whose inputs and outputs are float32 where they are half-precision. EngineError if OpenVINO lacks
    something that it needs."""
    model = open_stage(stage)
    if has_types(model):
        to_float32(model)
    inputs, outputs = dimensions(model.graph.inputs), dimensions(model.graph.outputs)
    for node in list(model.graph):
        if node.op_type == CACHE_ATTENTION:
            _give_control(model.graph, node, stage.number)
        elif node.op_type == "Attention":
            _repeat_heads(model.graph, node)
    if stage.caches:
        pick_tokens(model.graph)
    _break_up_gates(model.graph)
    RemoveUnusedNodesPass()(model)
    products = _products(model.graph) if quantise not in (None, "float32") else {}
    weights = _weights_as_inputs(model.graph)
    frontend = FrontEndManager().load_by_framework("onnx")
    frontend.add_extension(ConversionExtension("PagedAttention", "stageline", _paged_attention))
    made = frontend.convert(frontend.load(io.BytesIO(ir.to_proto(model).SerializeToString())))
    memory: list[NDArray[Any]] = []
    for parameter in list(made.get_parameters()):
        name = parameter.get_friendly_name()
        if name in weights:
            groups = _groups_of(weights[name]) if quantise != "float32" else None
            if groups is not None:
                constant = _grouped(groups)
            elif name in products and quantise is not None:
                constant = _quantised(_values(weights[name]), quantise, products[name])
            else:
                memory.append(_values(weights[name]))
                constant = _constant(memory[-1])
            constant.set_friendly_name(name)
            parameter.output(0).replace(constant.output(0))
            made.remove_parameter(parameter)
        elif name.startswith("cache."):  # the plugin chooses type and shape when it compiles
            parameter.set_element_type(ov.Type.dynamic)
            parameter.set_partial_shape(ov.PartialShape([-1] * 4))
    made.validate_nodes_and_infer_types()
    return LoweredForOpenVino(made, memory, inputs, outputs)


# The ONNX graph.


def _give_control(graph: ir.Graph, node: ir.Node, stage: int) -> None:
    """Replace cache attention by one that reads its caches and `CONTROL`."""
    if "softcap" in node.attributes:
        raise EngineError(f"stage {stage}: OpenVINO's attention has no soft cap; choose --engine onnxruntime")
    query, key, value, _, _, *sinks = node.inputs
    cache = cache_of(node, node.attributes["cache"].as_string())
    caches = [_input(graph, name, ["b", "h", "t", "s"], ir.DataType.FLOAT) for name in past_names(cache.name)]
    control = [_input(graph, name, shape, ir.DataType.INT32) for name, shape in CONTROL.items()]
    attributes = {
        "heads": static(query, 1),
        "kv_heads": cache.heads,
        "key_size": cache.key_size,
        "value_size": cache.value_size,
        "scale": node.attributes["scale"].as_float(),
        "window": node.attributes["window"].as_int() if "window" in node.attributes else 0,
    }
    read = [query, key, value, *caches, *control, *sinks]
    _replace(graph, node, ir.node("PagedAttention", read, attributes, domain="stageline"))


def _repeat_heads(graph: ir.Graph, node: ir.Node) -> None:
    """Give each head of an Attention keys and values of its own, since OpenVINO's shares none."""
    heads = static(node.inputs[0], 1)
    for place in (1, 2):
        value = node.inputs[place]
        group, size = heads // static(value, 1), static(value, 3)
        if group == 1:
            continue
        steps: list[tuple[str, list[int]]] = [
            ("Unsqueeze", [2]),
            ("Expand", [1, 1, group, 1, 1]),
            ("Reshape", [0, heads, -1, size]),
        ]
        for op, given in steps:
            constant = ir.node("Constant", [], {"value": ir.tensor(given, dtype=ir.DataType.INT64)})
            made = ir.node(op, [value, constant.outputs[0]])
            for new in (constant, made):
                new.outputs[0].name = f"{node.name}.{place}.{op}.{new.op_type}"
            graph.insert_before(node, [constant, made])
            value = made.outputs[0]
        node.replace_input_with(place, value)


def _break_up_gates(graph: ir.Graph) -> None:
    """Write x * sigmoid(x) * y as x * y * sigmoid(x). In bfloat16 with one thread, OpenVINO divides by zero when it
    sets up the operator that it makes of the former (openvino#33300)."""
    for node in list(graph):
        if node.op_type != "Mul":
            continue
        for swish, other in (node.inputs, reversed(node.inputs)):
            factors = _factors_of_swish(swish)
            if factors is None:
                continue
            first = ir.node("Mul", [factors[0], other])
            gated, old = first.outputs[0], node.outputs[0]
            gated.shape, gated.type, gated.name = old.shape, old.type, f"{old.name}.gated"
            graph.insert_before(node, first)
            node.replace_input_with(0, gated)
            node.replace_input_with(1, factors[1])
            break


def _factors_of_swish(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """x and sigmoid(x), if the value is their product and read once."""
    product = value.producer() if value is not None else None
    if product is None or product.op_type != "Mul" or len(list(product.outputs[0].uses())) != 1:
        return None
    for x, turned in (product.inputs, reversed(product.inputs)):
        sigmoid = turned.producer() if turned is not None else None
        if sigmoid is not None and sigmoid.op_type == "Sigmoid" and sigmoid.inputs[0] is x:
            assert x is not None
            assert turned is not None
            return x, turned
    return None


def _products(graph: ir.Graph) -> dict[str, bool]:
    """The weights that matrix products read, by name, and whether their layout is [N, K]."""
    found = (multiplied_weight(node, MIN_WEIGHTS) for node in graph)
    return {str(weight.name): transposed for weight, transposed in filter(None, found)}


def _weights_as_inputs(graph: ir.Graph) -> dict[str, ir.TensorProtocol]:
    """Take the weights out of the graph, by name."""
    weights: dict[str, ir.TensorProtocol] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and (isinstance(tensor, Stored) or tensor.size > _SMALL):
            weights[name] = tensor
            del graph.initializers[name]
            value.const_value = None
            value.dtype = tensor.dtype
            graph.inputs.append(value)
    return weights


def _input(graph: ir.Graph, name: str, shape: list[str], dtype: ir.DataType) -> ir.Value:
    for value in graph.inputs:
        if value.name == name:
            return value
    made = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    graph.inputs.append(made)
    return made


def _replace(graph: ir.Graph, node: ir.Node, new: ir.Node) -> None:
    graph.insert_before(node, new)
    old, result = node.outputs[0], new.outputs[0]
    result.shape, result.type, result.name = old.shape, old.type, old.name
    old.name = f"{old.name}.replaced"
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    graph.remove(node, safe=True)


# The OpenVINO model.


def _constant(array: NDArray[Any]) -> ov.Node:
    """A constant in the memory of an array."""
    if array.dtype.name in _NOT_NUMPY:
        shape, kind = ov.Shape(list(array.shape)), _NOT_NUMPY[array.dtype.name]
        return ops.constant(ov.Tensor(array.view(np.uint8).reshape(-1), shape, kind), shared_memory=True)
    return ops.constant(array, shared_memory=array.ndim > 0)


def _values(tensor: ir.TensorProtocol) -> NDArray[Any]:
    """Writable, as OpenVINO wants it of memory that it shares: a mapped file's pages are copied where they are."""
    if not isinstance(tensor, ir.ExternalTensor):
        return np.array(tensor.numpy())
    kind = tensor.dtype.numpy()
    data = np.memmap(tensor.path, np.uint8, "c", tensor.offset or 0, (tensor.size * kind.itemsize,))
    return np.asarray(data).view(kind).reshape(tensor.shape.numpy())


def _quantised(weight: NDArray[Any], dtype: WeightDtype, by_rows: bool) -> ov.Node:
    """A matrix of 4 or 8 bits a value, each group's times its scale, from its zero point on, which is a float16: a
    whole one would lose what a checkpoint of the kind d * q + m says."""
    values, scales, zeros = quantise_groups(np.asarray(weight if by_rows else weight.T, np.float32), dtype)
    matrix = _matrix(values, scales, zeros, dtype == "int4")
    return matrix if by_rows else ops.transpose(matrix, _ints(1, 0))


def _groups_of(tensor: ir.TensorProtocol) -> Groups | None:
    """A packed weight as OpenVINO takes it: whole groups, in the order of its columns. None for others."""
    groups = tensor.groups() if isinstance(tensor, Packed) and len(tensor.shape) == 2 else None
    if groups is None or groups.order is not None:
        return None
    columns = groups.values.shape[1]
    return groups if columns % groups.group == 0 or groups.group > columns else None


def _grouped(groups: Groups) -> ov.Node:
    """A packed weight: its own whole numbers, scales and zero points, in float16 if that holds them."""
    scales, offsets = groups.scales[:, :, None], groups.offsets[:, :, None]
    values, flat = groups.values.reshape(*groups.scales.shape, -1), scales == 0
    if groups.zeros is not None:
        zeros = groups.zeros[:, :, None].astype(np.float32)
    else:  # a group of one value is (0 - -1) * value
        values = np.where(flat, np.uint8(0), values)
        zeros = np.where(flat, np.float32(-1), -offsets / np.where(flat, np.float32(1), scales))
        scales = np.where(flat, offsets, scales)
    kind = np.float16 if all(np.array_equal(x.astype(np.float16), x) for x in (scales, zeros)) else np.float32
    return _matrix(values, scales.astype(kind), zeros.astype(kind), groups.bits <= 4)


def _matrix(values: NDArray[np.uint8], scales: NDArray[Any], zeros: NDArray[Any], four_bits: bool) -> ov.Node:
    """(values [N, groups, group] - zeros [N, groups, 1]) * scales, as float32 [N, K]; in their type before."""
    rows, groups, group = values.shape
    if four_bits and values.size % 2 == 0:
        halves = values.reshape(-1)
        packed = ov.Tensor(halves[0::2] | halves[1::2] << np.uint8(4), ov.Shape(list(values.shape)), ov.Type.u4)
    else:
        packed = ov.Tensor(np.ascontiguousarray(values))
    wide = ops.convert(ov.op.Constant(packed, shared_memory=False), "f16" if scales.dtype == np.float16 else "f32")
    found = ops.multiply(ops.subtract(wide, ops.constant(zeros)), ops.constant(scales))
    matrix = ops.reshape(found, _ints(rows, groups * group), False)
    return ops.convert(matrix, "f32") if scales.dtype == np.float16 else matrix


def quantise_groups(weight: NDArray[np.float32], dtype: WeightDtype) -> tuple[NDArray[Any], ...]:
    """weight [N, K] -> values uint8 [N, groups, group], scales and zero points float16 [N, groups, 1]: weight ~
    (value - zero) * scale. Groups of `GROUP`, or whole rows where K is no multiple of it."""
    rows, columns = weight.shape
    group = GROUP if columns % GROUP == 0 else columns
    grouped = weight.reshape(rows, columns // group, group)
    low, high = grouped.min(axis=2, keepdims=True), grouped.max(axis=2, keepdims=True)
    top = 15 if dtype == "int4" else 255
    scales = ((high - low) / np.float32(top)).astype(np.float16)
    scales[scales == 0] = 1
    zeros = (-low / scales.astype(np.float32)).astype(np.float16)
    values = np.rint(grouped / scales.astype(np.float32) + zeros.astype(np.float32)).clip(0, top).astype(np.uint8)
    return values, scales, zeros


def _ints(*values: int) -> ov.Node:
    return ops.constant(np.array(values, np.int64))


def _none(kind: Any, *shape: int) -> ov.Node:
    """What an operator is given in place of an input that it need not have."""
    return ops.constant(np.zeros(shape or (0,), kind))


def _paged_attention(node: Any) -> Any:
    """query, key and value [tokens, heads, 1, size] -> [tokens, 1, heads, size]."""
    heads, kv_heads, key_size, value_size = (
        node.get_attribute(name) for name in ("heads", "kv_heads", "key_size", "value_size")
    )
    given = [node.get_input(place) for place in range(node.get_input_size())]
    sizes = (heads * key_size, kv_heads * key_size, kv_heads * value_size)
    flat = [ops.reshape(value, _ints(-1, size), False) for value, size in zip(given, sizes, strict=False)]
    past, begins, blocks, block_begins, most = given[5:10]
    sinks = ops.reshape(given[10], _ints(1, heads, 1, 1), False) if len(given) > 10 else _none(np.float32, 0, 0, 0, 0)
    inputs = [
        *flat,
        *given[3:5],
        past,
        begins,
        blocks,
        block_begins,
        ops.constant(np.float32(node.get_attribute("scale"))),
        ops.constant(np.int32(node.get_attribute("window"))),
        _none(np.float32),  # alibi's slopes
        most,
        _none(np.int32),  # the window of scores
        *(_none(np.int32), _none(np.int32), _none(np.float32)),  # rotation of blocks
        *(_none(np.float32), ops.constant(np.int32(0)), ops.constant(np.int32(0))),  # sparse attention
        sinks,
        ops.constant(np.int32(0)),  # diversity of blocks, and what it evicts
        *(_none(np.int32) for _ in range(4)),
        _none(np.uint8),  # kinds of tokens
        _none(np.int32),
    ]
    made = _PagedAttentionExtension([one.output(0) if isinstance(one, ov.Node) else one for one in inputs])
    about = made.get_rt_info()
    about["num_k_heads"], about["k_head_size"] = kv_heads, key_size
    about["num_v_heads"], about["v_head_size"] = kv_heads, value_size
    return ops.reshape(made.output(0), _ints(-1, 1, heads, value_size), False).outputs()
