"""What both ONNX Runtime engines need: a stage's graph as their session opens it, and errors in one line."""

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import IdentityEliminationPass
from stageline.runtime.bundle.graph import dimensions
from stageline.runtime.engines.base import StageFile, WeightDtype
from stageline.runtime.engines.lowering.cache_names import past_names, present_names
from stageline.runtime.engines.lowering.external import locate_in, root_of
from stageline.runtime.engines.lowering.flat_attention import has_caches
from stageline.runtime.engines.lowering.float32 import has_types, to_float32
from stageline.runtime.engines.lowering.group_query import to_group_query
from stageline.runtime.engines.lowering.nbits import check_graph_size, to_nbits
from stageline.runtime.engines.lowering.packed import has_packed, open_stage
from stageline.runtime.engines.lowering.packed_picks import pick_tokens
from stageline.runtime.engines.lowering.packed_rows import look_up
from stageline.runtime.engines.lowering.paged import to_paged
from stageline.runtime.engines.lowering.precision import read_as_stored, to_precision, widen_initializers
from stageline.runtime.engines.lowering.session_weights import SessionWeights, take_weights
from stageline.runtime.engines.lowering.tensor_scatter import to_tensor_scatter

_NO_BFLOAT16 = frozenset(
    {"ArgMax", "ArgMin", "BatchNormalization", "Ceil", "Clip", "ConvTranspose", "CumSum", "DepthToSpace", "Einsum"}
    | {"Elu", "Equal", "Floor", "GlobalAveragePool", "GlobalMaxPool", "Greater", "GreaterOrEqual", "GridSample"}
    | {"InstanceNormalization", "LeakyRelu", "Less", "LessOrEqual", "Log", "LogSoftmax", "MaxPool", "NonZero", "OneHot"}
    | {"Pad", "PRelu", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax"}
    | {"ReduceMin", "ReduceProd", "ReduceSumSquare", "Resize", "Round", "Selu", "SpaceToDepth", "ThresholdedRelu"}
)
"""Operators that have kernels for float32 on GPUs and none for bfloat16, in ONNX Runtime 1.31 (its registered kernels,
which it lists only where TensorRT is installed). Computing them in float32 is right in every version."""


@dataclass(frozen=True)
class LoweredForCpu:
    """A stage's graph as ONNX bytes, its weights that are in no file, and the dimensions of its inputs and outputs in
    the bundle, without those of its caches."""

    proto: bytes
    weights: SessionWeights
    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str, ...]]


def lowered(
    stage: StageFile, cache_dtype: ir.DataType, quantise: WeightDtype | None, grouped: bool = True
) -> LoweredForCpu:
    """The stage's graph for CPUs: all half-precision values in float32, its caches lowered, its weights still in their
    files unless quantised. Locations are relative to `root_of` the stage's folder.

    `grouped`: caches for GroupQueryAttention, in `cache_dtype`, and a graph for packed tokens; else for standard
    operators, in float32."""
    model = open_stage(stage)
    inputs, outputs = dimensions(model.graph.inputs), dimensions(model.graph.outputs)
    halves, caches = has_types(model), has_caches(model)
    root = root_of(stage.folder)
    if root != stage.folder:
        locate_in(root, model)
    elif not halves and not caches and quantise is None and not has_packed(model):
        return LoweredForCpu(stage.file.read_bytes(), {}, inputs, outputs)
    if halves:
        model = to_float32(model)
    if caches and grouped:
        to_group_query(model, cache_dtype)
        pick_tokens(model.graph)
    elif caches:
        to_tensor_scatter(model, None)
    if quantise != "float32":
        look_up(model)
        to_nbits(model, quantise)
    weights = take_weights(model)
    return LoweredForCpu(ir.to_proto(model).SerializeToString(), weights, inputs, outputs)


@dataclass(frozen=True)
class LoweredForCuda:
    """A stage's graph as ONNX bytes, and the type of its caches."""

    proto: bytes
    cache_dtype: ir.DataType


def lowered_for_cuda(stage: StageFile, quantise: WeightDtype | None) -> LoweredForCuda:
    """The stage's graph for GPUs. It computes in the bundle's type; its inputs and outputs are float32, except caches.

    Caches, and attention to them, are bfloat16 or float16: the bundle's own type, and float16 for one of float32."""
    model = open_stage(stage)
    dtype = next((one for one in (ir.DataType.BFLOAT16, ir.DataType.FLOAT16) if has_types(model, {one})), None)
    root = root_of(stage.folder)
    if root != stage.folder:
        locate_in(root, model)
    widen_initializers(model)
    if has_types(model):
        to_float32(model)
    if has_caches(model):
        to_paged(model, ir.DataType.FLOAT if dtype else ir.DataType.FLOAT16)
    if quantise is not None and quantise != "float32":
        to_nbits(model, quantise)
    check_graph_size(model, quantise or "packed")
    IdentityEliminationPass()(model)
    if dtype is not None:
        names = {name for spec in stage.caches for name in (*past_names(spec.name), *present_names(spec.name))}
        bare = _NO_BFLOAT16 if dtype == ir.DataType.BFLOAT16 else ()
        to_precision(model, dtype, names, {str(node.name) for node in model.graph if node.op_type in bare})
    read_as_stored(model)
    return LoweredForCuda(ir.to_proto(model).SerializeToString(), dtype or ir.DataType.FLOAT16)


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).strip().split("\n", 1)[0]
