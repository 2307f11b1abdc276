"""Weights that lie in memory, given to an ONNX Runtime session beside its graph and not in it.

The bytes of a graph end at 2 GiB, and while a session is opened several copies of them are in memory at a time.
"""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

_LEAST_BYTES = 1024  # smaller ones stay in the graph, where shapes are inferred from some of them

SessionWeights = dict[str, ir.TensorProtocol]
"""Weights by name, read when the session is opened."""


def take_weights(model: ir.Model) -> SessionWeights:
    """Take the weights that are in memory out of the graph, which refers to them as if they were in a file."""
    taken: SessionWeights = {}
    for name, value in model.graph.initializers.items():
        weight = value.const_value
        if weight is None or isinstance(weight, ir.ExternalTensor) or weight.nbytes < _LEAST_BYTES:
            continue
        if weight.dtype == ir.DataType.STRING or weight.dtype.bitwidth < 8:
            continue
        taken[name] = weight
        value.const_value = ir.ExternalTensor(
            "memory", 0, weight.nbytes, weight.dtype, shape=ir.Shape(weight.shape.numpy()), name=name, base_dir=""
        )
    return taken


def give_weights(options: ort.SessionOptions, weights: SessionWeights) -> list[ort.OrtValue]:
    """Have a session that is opened with `options` compute with these weights. What is returned must live as long as
    the session, which makes no copy of some weights."""
    values = [
        ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(weight.numpy()), int(weight.dtype))
        for weight in weights.values()
    ]
    if values:
        options.add_external_initializers(list(weights), values)
    return values


def put_back(graph: bytes, weights: SessionWeights) -> bytes:
    """The graph with its weights in it, for who opens it as a file. ValueError from 2 GiB on."""
    model = ir.from_proto(onnx.ModelProto.FromString(graph))
    for name, weight in weights.items():
        model.graph.initializers[name].const_value = weight
    proto: bytes = ir.to_proto(model).SerializeToString()
    return proto
