"""Lower a stage of a bundle to the ONNX graph that TensorRT parses, strongly typed, its weights apart from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import IdentityEliminationPass
from stageline.runtime.engines.base import Array, StageFile
from stageline.runtime.engines.external import read_external
from stageline.runtime.engines.float32 import has_halves, to_float32
from stageline.runtime.engines.group_query import past_names, present_names
from stageline.runtime.manifest import CacheSpec, TensorSpec
from stageline.runtime.tensorrt.cache_attention import to_tensor_scatter
from stageline.runtime.tensorrt.precision import fold_weight_casts, to_precision

Precision = Literal["fp32", "fp16", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
DTYPES: dict[Precision, ir.DataType] = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
}


@dataclass(frozen=True)
class Lowered:
    """A stage as TensorRT takes it. Floating inputs and outputs are float32; each of `caches` is two inputs and two
    outputs (`past_names`, `present_names` of stageline.runtime.engines.group_query) in the precision's type.

    `proto` is the graph as ONNX bytes. `weights` are the names of the weights, their values wherever the bundle has
    them: initializers without data, or inputs of a stripped graph.
    """

    proto: bytes
    weights: Mapping[str, "Weight"]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    caches: tuple[CacheSpec, ...]

    @property
    def weight_specs(self) -> tuple[TensorSpec, ...]:
        """Name, type and shape of each weight as the graph wants it."""
        return tuple(
            TensorSpec(name=name, dtype=str(weight.dtype.numpy()), shape=weight.shape)
            for name, weight in self.weights.items()
        )


@dataclass(frozen=True)
class Weight:
    """A tensor on disk and the type that the graph wants it in."""

    tensor: ir.ExternalTensor
    dtype: ir.DataType

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return tuple(int(size) for size in self.tensor.shape.numpy())

    def read(self) -> Array:
        """The values, contiguous: mapped from the file where that has the same type, else converted."""
        array = read_external(self.tensor)
        if self.tensor.dtype == self.dtype:
            return array
        if self.dtype == ir.DataType.FLOAT16:  # what float16 cannot hold becomes the most that it can
            array = np.clip(array.astype(np.float32), -65504, 65504)
        return np.ascontiguousarray(array.astype(self.dtype.numpy()))


def lower(stage: StageFile, precision: Precision, capacity: int, stripped: bool) -> Lowered:
    """Lower a stage of a bundle. Its caches hold `capacity` tokens a row; `stripped`: its weights are inputs.

    The result depends on the arguments and the stage's graph only. EngineError where the graph cannot be lowered.
    """
    model = ir.load(stage.file)
    if has_halves(model):
        to_float32(model)
    fold_weight_casts(model)
    caches = to_tensor_scatter(model, capacity)
    IdentityEliminationPass()(model)
    state = {n for cache in caches for n in (*past_names(cache.name), *present_names(cache.name))}
    if precision != "fp32":
        to_precision(model, DTYPES[precision], state)
    inputs = tuple(_spec(value) for value in model.graph.inputs if value.name not in state)
    outputs = tuple(_spec(value) for value in model.graph.outputs if value.name not in state)
    weights = {}
    for name, value in list(model.graph.initializers.items()):
        if isinstance(value.const_value, ir.ExternalTensor):
            assert value.dtype is not None
            weights[name] = weight = Weight(value.const_value, value.dtype)
            if stripped:
                del model.graph.initializers[name]
                value.const_value = None
                model.graph.inputs.append(value)
            else:
                nowhere = ir.ExternalTensor("weights", 0, None, weight.dtype, shape=ir.Shape(weight.shape), name=name)
                value.const_value = nowhere
    return Lowered(ir.to_proto(model).SerializeToString(), weights, inputs, outputs, caches)


def _spec(value: ir.Value) -> TensorSpec:
    assert value.dtype is not None
    assert value.shape is not None
    shape = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)
    return TensorSpec(name=str(value.name), dtype=str(value.dtype.numpy()), shape=shape)
