"""A packed weight in a graph: the operator `stageline::Dequantize`, which docs/reference/bundle.md specifies."""

from collections.abc import Mapping

import onnx_ir as ir
from stageline.models.tensors import Packing

DOMAIN, DEQUANTIZE = "stageline", "Dequantize"
_OURS = ("method", "roles", "shape", "dtype")  # attributes; the others are the method's settings


def dequantise_node(packing: Packing, parts: Mapping[str, ir.Value]) -> ir.Node:
    """The operator that unpacks `parts`, by their role in the method."""
    attributes = {
        "method": packing.method,
        "roles": list(parts),
        "shape": list(packing.shape),
        "dtype": packing.dtype,
        **packing.settings,
    }
    return ir.node(DEQUANTIZE, list(parts.values()), attributes, domain=DOMAIN)


def is_dequantise(node: ir.Node) -> bool:
    """Whether the node unpacks a weight."""
    return (node.domain, node.op_type) == (DOMAIN, DEQUANTIZE)


def packing_of(node: ir.Node) -> Packing:
    """How the weight that the node unpacks is packed."""
    given = node.attributes
    settings = {
        name: value.as_int() if value.type == ir.AttributeType.INT else value.as_string()
        for name, value in given.items()
        if name not in _OURS
    }
    shape = tuple(given["shape"].as_ints())
    return Packing(given["method"].as_string(), settings, shape, given["dtype"].as_string())


def parts_of(node: ir.Node) -> dict[str, ir.Value]:
    """The initializers that the node unpacks, by their role."""
    values = [value for value in node.inputs if value is not None]
    return dict(zip(node.attributes["roles"].as_strings(), values, strict=True))
