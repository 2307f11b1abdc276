"""Lower a stage of a bundle to the ONNX graph that TensorRT parses: strongly typed, its weights separate."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import onnx_ir as ir
from onnx_ir.passes.common import IdentityEliminationPass
from stageline.runtime.bundle.manifest import CacheSpec, TensorSpec, UncutManifest
from stageline.runtime.engines.base import StageFile
from stageline.runtime.engines.lowering.cache_names import past_names, present_names
from stageline.runtime.engines.lowering.external import Stored
from stageline.runtime.engines.lowering.float32 import has_types, to_float32
from stageline.runtime.engines.lowering.packed import open_stage
from stageline.runtime.engines.lowering.precision import to_precision, widen_initializers
from stageline.runtime.engines.lowering.quantise import Quantisation, to_quantised
from stageline.runtime.engines.lowering.tensor_scatter import to_tensor_scatter
from stageline.runtime.engines.lowering.weights import Weight, unread

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8", "int4"]
"""int8, fp8 and int4 are types of weights; they are computed in float16, those of a bfloat16 bundle in bfloat16."""
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
QUANTISED: tuple[Quantisation, ...] = get_args(Quantisation)


def default_precision(activations: str) -> Precision:
    """The precision for a bundle with `activations` (its manifest's dtype), if none is asked for. A model that was
    trained in bfloat16 may compute values that float16 cannot hold."""
    return "bf16" if activations == "bfloat16" else "fp16"


def computed_precision(precision: Precision, activations: str) -> Precision:
    """What an engine of `precision` computes in, for a bundle with `activations`: the default if weights are
    quantised."""
    return default_precision(activations) if precision in QUANTISED else precision


def compute_dtype(precision: Precision, activations: str) -> ir.DataType:
    """The type of computed values and of caches, for a bundle with `activations`."""
    computed = computed_precision(precision, activations)
    return {"fp32": ir.DataType.FLOAT, "bf16": ir.DataType.BFLOAT16}.get(computed, ir.DataType.FLOAT16)


def float32_nodes(manifest: UncutManifest, precision: Precision) -> tuple[str, ...]:
    """The nodes of a bundle that its engines of `precision` keep in float32, sorted."""
    computed = computed_precision(precision, manifest.dtype)
    return () if manifest.float32_nodes is None else getattr(manifest.float32_nodes, computed, ())


@dataclass(frozen=True)
class Lowered:
    """A stage for TensorRT. Floating inputs and outputs are float32; each of `caches` is two inputs and two outputs
    (`past_names`, `present_names` of stageline.runtime.engines.lowering.cache_names) in the type `computes`.

    `proto` is the graph as ONNX bytes. `weights` maps names to values that stay in the bundle's files: initializers
    without data, or inputs of a stripped graph, which is never quantised.
    """

    proto: bytes
    weights: Mapping[str, Weight]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    caches: tuple[CacheSpec, ...]
    computes: ir.DataType

    @property
    def weight_specs(self) -> tuple[TensorSpec, ...]:
        """Name, type and shape of each weight in the graph."""
        return tuple(
            TensorSpec(name=name, dtype=str(weight.dtype.numpy()), shape=weight.shape)
            for name, weight in self.weights.items()
        )


def lower(stage: StageFile, precision: Precision, capacity: int, stripped: bool, wide: Collection[str] = ()) -> Lowered:
    """Lower a stage of a bundle. Its caches hold `capacity` tokens per row; `stripped`: its weights are inputs; nodes
    named in `wide` compute in float32.

    The result depends only on the arguments and the stage's graph. EngineError if the graph cannot be lowered.
    """
    model = open_stage(stage)
    dtype = _compute_dtype(model, precision)
    return _lower(model, dtype, _quantisation(precision), dtype, capacity, stripped, wide)


def lower_exactly(stage: StageFile, precision: Precision, capacity: int) -> Lowered:
    """The stage with weights in `precision`, computed in float32: the reference for an engine."""
    model = open_stage(stage)
    scales = _compute_dtype(model, precision)
    return _lower(model, ir.DataType.FLOAT, _quantisation(precision), scales, capacity, stripped=False)


def _compute_dtype(model: ir.Model, precision: Precision) -> ir.DataType:
    return compute_dtype(precision, "bfloat16" if has_types(model, {ir.DataType.BFLOAT16}) else "float32")


def _quantisation(precision: Precision) -> Quantisation | None:
    return next((kind for kind in QUANTISED if kind == precision), None)


def _lower(
    model: ir.Model,
    dtype: ir.DataType,
    quantisation: Quantisation | None,
    scales: ir.DataType,
    capacity: int,
    stripped: bool,
    wide: Collection[str] = (),
) -> Lowered:
    """Compute in `dtype`. Scales of quantised weights are rounded to the type `scales`."""
    widen_initializers(model)
    if has_types(model):
        to_float32(model)
    caches = to_tensor_scatter(model, capacity)
    IdentityEliminationPass()(model)
    state = {n for cache in caches for n in (*past_names(cache.name), *present_names(cache.name))}
    if dtype != ir.DataType.FLOAT:
        to_precision(model, dtype, state, wide)
    inputs = tuple(_spec(value) for value in model.graph.inputs if value.name not in state)
    outputs = tuple(_spec(value) for value in model.graph.outputs if value.name not in state)
    weights = to_quantised(model, quantisation, scales) if quantisation is not None else {}
    for name, value in list(model.graph.initializers.items()):
        if isinstance(value.const_value, Stored) and name not in weights:
            assert value.dtype is not None
            weights[name] = weight = Weight(value.const_value, value.dtype)
            if stripped:
                del model.graph.initializers[name]
                value.const_value = None
                model.graph.inputs.append(value)
            else:
                value.const_value = unread(name, weight)
    return Lowered(ir.to_proto(model).SerializeToString(), weights, inputs, outputs, caches, dtype)


def _spec(value: ir.Value) -> TensorSpec:
    assert value.dtype is not None
    assert value.shape is not None
    shape = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)
    return TensorSpec(name=str(value.name), dtype=str(value.dtype.numpy()), shape=shape)
