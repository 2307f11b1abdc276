"""What both ONNX Runtime engines need: a stage's graph as their session opens it, and errors in one line."""

from collections.abc import Collection

import onnx_ir as ir
from stageline.runtime.engines.base import StageFile, WeightDtype
from stageline.runtime.engines.lowering.external import locate_in, root_of
from stageline.runtime.engines.lowering.float32 import has_types, to_float32
from stageline.runtime.engines.lowering.group_query import has_caches, to_group_query
from stageline.runtime.engines.lowering.nbits import to_nbits


def lowered(
    stage: StageFile, widened: Collection[ir.DataType], cache_dtype: ir.DataType, quantise: WeightDtype | None
) -> bytes:
    """The stage's graph as ONNX bytes, its caches lowered, its weights still in their files unless quantised. If it has
    one of the types `widened`, all its half-precision values become float32. Locations are relative to `root_of` the
    stage's folder."""
    model = ir.load(stage.file)
    ir.external_data.set_base_dir(model.graph, stage.folder)
    halves, caches = has_types(model, widened), has_caches(model)
    root = root_of(stage.folder)
    if root != stage.folder:
        locate_in(root, model)
    elif not halves and not caches and quantise is None:
        return stage.file.read_bytes()
    if halves:
        model = to_float32(model)
    if caches:
        model = to_group_query(model, cache_dtype)
    if quantise is not None:
        model = to_nbits(model, quantise)
    proto: bytes = ir.to_proto(model).SerializeToString()
    return proto


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).strip().split("\n", 1)[0]
