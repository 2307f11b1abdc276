"""Constants of half-precision graphs, with the values that they have in float32.

torch computes with Python's numbers in float32, whatever the type of the tensors that they meet. Its ONNX exporter
rounds them to that type: 0.044715 becomes 0.0447 in bfloat16, and an engine that computes in float32 cannot know
better. Here such a constant is a float32 one with a Cast to the graph's type. Engines fold the Cast when they load, or
drop it where they compute in float32. What is computed from constants alone is left to the engines for the same reason.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import torch
from stageline.runtime.engines.lowering.float32 import HALVES
from torch.overrides import TorchFunctionMode

_EXACT = "stageline.exact"  # among a tensor's own notes: its values in float32
_TORCH_HALVES = frozenset({torch.float16, torch.bfloat16})


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """While entered, `torch.tensor` makes half-precision tensors by a cast, which a trace shows, and each tensor of a
    graph that is made from Python's numbers remembers what they are in float32, for `restore`."""
    make = ir.tensor

    def tensor(value: Any, dtype: ir.DataType | None = None, *args: Any, **options: Any) -> Any:
        made = make(value, dtype, *args, **options)
        if made.dtype in HALVES and isinstance(value, (int, float, list, tuple)):
            made.meta[_EXACT] = np.asarray(value, np.float32)
        return made

    with mock.patch.object(ir, "tensor", tensor), _CastTensors():
        yield


class _CastTensors(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        dtype = options.get("dtype")
        if function is torch.tensor and dtype in _TORCH_HALVES:
            return function(*args, **{**options, "dtype": torch.float32}).to(dtype)
        return function(*args, **options)


def take_buffers(half: torch.nn.Module, wide: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Give a half-precision model the buffers of `wide`, the same model in float32: its own may have been computed in
    half precision (positions' frequencies). Returns those that it has in half precision, by name, for `restore`."""
    exact = {}
    buffers = dict(wide.named_buffers())
    for path, module in half.named_modules():
        for name, rounded in module._buffers.items():
            full = f"{path}.{name}" if path else name
            buffer = buffers.get(full)
            if rounded is None or buffer is None:
                continue
            if rounded.dtype == buffer.dtype:
                module._buffers[name] = buffer
            elif rounded.dtype in _TORCH_HALVES and buffer.dtype == torch.float32:
                exact[full] = buffer
    return exact


def restore(model: ir.Model, buffers: Mapping[str, torch.Tensor]) -> None:
    """Give the constants that half precision rounds their exact values, in place: those that were remembered, and the
    initializers that are named in `buffers`."""
    for node in list(model.graph.all_nodes()):
        value = node.attributes.get("value")
        if value is None or value.type != ir.AttributeType.TENSOR:
            continue
        rounded = value.as_tensor()
        exact = rounded.meta.get(_EXACT)
        if exact is not None and _differ(rounded, exact):
            assert node.graph is not None
            result = node.outputs[0]
            wide = ir.node(node.op_type, node.inputs, {"value": ir.tensor(exact)}, domain=node.domain)
            cast = _cast(wide.outputs[0], result, rounded.dtype)
            node.graph.insert_before(node, [wide, cast])
            result.replace_all_uses_with(cast.outputs[0], replace_graph_outputs=True)
            node.graph.remove(node, safe=True)
    for name, buffer in buffers.items():
        initializer = model.graph.initializers.get(name)
        if initializer is None or initializer.const_value is None:
            continue
        rounded, exact = initializer.const_value, buffer.numpy()
        if _differ(rounded, exact):
            wide_value = ir.Value(
                name=f"{name}.float32",
                shape=initializer.shape,
                type=ir.TensorType(ir.DataType.FLOAT),
                const_value=ir.tensor(exact, name=f"{name}.float32"),
            )
            model.graph.register_initializer(wide_value)
            cast = _cast(wide_value, initializer, rounded.dtype)
            model.graph.insert_before(model.graph[0], cast)
            initializer.replace_all_uses_with(cast.outputs[0], replace_graph_outputs=True)
            del model.graph.initializers[name]


def folds(node: ir.Node) -> bool | None:
    """Whether the optimiser may compute `node`, all of whose inputs are constants: not in half precision. None leaves
    the decision to its own rules."""
    cast_to = node.attributes.get("to") if node.op_type == "Cast" else None
    types = {value.dtype for value in (*node.inputs, *node.outputs) if value is not None}
    if cast_to is not None:
        types.add(ir.DataType(cast_to.as_int()))
    return False if types & HALVES else None


def _differ(rounded: ir.TensorProtocol, exact: np.ndarray[Any, Any]) -> bool:
    return not np.array_equal(rounded.numpy().astype(np.float32), exact, equal_nan=True)


def _cast(wide: ir.Value, half: ir.Value, dtype: ir.DataType) -> ir.Node:
    """A Cast of `wide` that can take the place of `half`."""
    cast = ir.node("Cast", [wide], {"to": dtype})
    result = cast.outputs[0]
    result.name, result.shape, result.type = half.name, half.shape, ir.TensorType(dtype)
    return cast
