"""The weights of a stripped engine: from the bundle when it is loaded, or from a new checkpoint while it runs.

The weights of a stripped engine are inputs, each bound once to a buffer on the device. Filling these buffers is the
refit: at load and, for a checkpoint of the same shapes, at any time between two steps. TensorRT's own stripped engines
(STRIP_PLAN) need a CUDA driver to build: TensorRT-RTX 1.7 compiles the refit itself, for the GPU.
"""

from collections.abc import Iterator, Mapping

from stageline.models.errors import EngineError
from stageline.models.tensors import Entry, PackedEntry
from stageline.runtime.bundle.graph import ir_dtype
from stageline.runtime.engines.base import Array
from stageline.runtime.engines.lowering.external import in_file
from stageline.runtime.engines.lowering.packed import Packed
from stageline.runtime.engines.lowering.weights import Weight
from stageline.runtime.engines.tensorrt.records import EngineRecord


def weights_of(record: EngineRecord, tensors: Mapping[str, Entry]) -> Iterator[tuple[str, Array]]:
    """Name and values of each of `record.weights`, in its type and shape, contiguous; one in memory at a time.

    `tensors` are the bundle's own (`Bundle.tensors`), or those of a checkpoint with the same names and shapes, of any
    floating type. EngineError, before the first one is read, if one is missing or of another shape.
    """
    for spec in record.weights:
        entry = tensors.get(spec.name)
        if entry is None:
            raise EngineError(f"no tensor {spec.name!r} among the weights; use a checkpoint of the same architecture")
        if entry.shape != spec.shape:
            raise EngineError(
                f"tensor {spec.name!r} has shape {list(entry.shape)}, the engine needs {list(spec.shape)}; "
                "use a checkpoint of the same shapes, or build the engine again"
            )
    return ((spec.name, _weight(tensors[spec.name], spec.dtype).read()) for spec in record.weights)


def _weight(entry: Entry, dtype: str) -> Weight:
    tensor = Packed.of(entry) if isinstance(entry, PackedEntry) else in_file(entry)
    return Weight(tensor, ir_dtype(dtype))
