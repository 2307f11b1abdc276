"""Reading weights that a graph refers to in other files."""

import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
from stageline.models.tensors import TensorEntry
from stageline.runtime.bundle.graph import ir_dtype
from stageline.runtime.bundle.hub_cache import repository_of
from stageline.runtime.engines.base import Array

Stored = ir.ExternalTensor | ir.LazyTensor
"""A weight that stays on disk until it is read; a lazy one is unpacked then."""


def read_stored(tensor: Stored) -> Array:
    """The weight as an array, memory-mapped unless it is unpacked. onnx_ir itself refuses to read hard-linked files,
    which a bundle's weights may be."""
    if isinstance(tensor, ir.LazyTensor):
        return tensor.numpy()
    kind = tensor.dtype.numpy()
    data = np.memmap(tensor.path, np.uint8, "r", tensor.offset or 0, (tensor.size * kind.itemsize,))
    return data.view(kind).reshape(tensor.shape.numpy())


def in_file(entry: TensorEntry) -> ir.ExternalTensor:
    """A tensor of a weight file, not read."""
    return ir.ExternalTensor(
        entry.file.name,
        entry.offset,
        entry.size_bytes,
        ir_dtype(entry.dtype),
        shape=ir.Shape(entry.shape),
        name=entry.name,
        base_dir=entry.file.parent,
    )


def root_of(folder: Path) -> Path:
    """The folder that holds the weights of the bundle in `folder`, and into which no symbolic link leads: ONNX Runtime
    opens no others. In the Hub's cache that is the repository's, since a snapshot is links."""
    return repository_of(folder) or folder


def locate_in(root: Path, model: ir.Model) -> None:
    """Make the locations of a graph's weights those of the files themselves, relative to `root`."""
    for value in model.graph.initializers.values():
        old = value.const_value
        if isinstance(old, ir.ExternalTensor):
            location = os.path.relpath(Path(old.path).resolve(), root.resolve())
            value.const_value = ir.ExternalTensor(
                location, old.offset, old.length, old.dtype, shape=old.shape, name=old.name, base_dir=root
            )
