"""Reading weights that a graph refers to in other files."""

import numpy as np
import onnx_ir as ir
from stageline.runtime.engines.base import Array


def read_external(tensor: ir.ExternalTensor) -> Array:
    """The tensor on disk as an array, memory-mapped. onnx_ir itself refuses to read hard-linked files, which a bundle's
    weights may be."""
    kind = tensor.dtype.numpy()
    data = np.memmap(tensor.path, np.uint8, "r", tensor.offset or 0, (tensor.size * kind.itemsize,))
    return data.view(kind).reshape(tensor.shape.numpy())
