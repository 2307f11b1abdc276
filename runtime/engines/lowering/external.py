"""Reading the weights that a graph refers to in other files."""

import numpy as np
import onnx_ir as ir
from stageline.runtime.engines.base import Array


def read_external(tensor: ir.ExternalTensor) -> Array:
    """The tensor as it lies on disk, mapped and not copied. onnx_ir itself does not read files that are hard-linked, as
    a bundle's weights are."""
    kind = tensor.dtype.numpy()
    data = np.memmap(tensor.path, np.uint8, "r", tensor.offset or 0, (tensor.size * kind.itemsize,))
    return data.view(kind).reshape(tensor.shape.numpy())
