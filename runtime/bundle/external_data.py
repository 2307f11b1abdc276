"""What a bundle's graphs may read beside themselves: the files that its manifest lists, and no byte beyond them."""

import posixpath
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import onnx
from stageline.models.errors import BundleError
from stageline.runtime.bundle.manifest import FileEntry


def check_external_data(folder: Path, name: str, listed: Mapping[str, FileEntry]) -> None:
    """Check the tensors that the graph file `name` of the bundle in `folder` keeps elsewhere; `listed`: the manifest's
    files by path. BundleError if it is no ONNX graph, or one of them lies in another file or is longer than its file.
    """
    graph = (folder / name).read_bytes()
    try:
        model = onnx.ModelProto.FromString(graph)
    except Exception as error:  # protobuf's DecodeError; the package is onnx's
        raise BundleError(f"bundle {folder}: {name} is not an ONNX graph; export the bundle again") from error
    for tensor in _tensors_of_model(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        said = {entry.key: entry.value for entry in tensor.external_data}
        location = said.get("location", "")
        entry = listed.get(posixpath.normpath(posixpath.join(posixpath.dirname(name), location)))
        if entry is None:
            raise BundleError(
                f"bundle {folder}: {name} reads {tensor.name!r} from {location!r}, which its manifest does not list; "
                "export the bundle again"
            )
        try:
            offset, length = int(said.get("offset", "0")), int(said.get("length", "0"))
            whole = _bytes_of(tensor)
        except (ValueError, KeyError, TypeError):
            offset = length = whole = -1
        if min(offset, length, whole) < 0 or offset + max(length, whole) > entry.size_bytes:
            raise BundleError(
                f"bundle {folder}: {name} reads {tensor.name!r} beyond the end of {location}; export the bundle again"
            )


def _bytes_of(tensor: onnx.TensorProto) -> int:
    """How many a reader takes, whatever `length` says. KeyError for a type that is not known."""
    count = 1
    for size in tensor.dims:
        if size < 0:
            raise ValueError("a negative dimension")
        count *= size
    halves = tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.FLOAT4E2M1)
    bits = 4 if halves else 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return -(-count * bits // 8)


def _tensors_of_model(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from _tensors_of_graph(model.graph)
    for function in model.functions:
        yield from _tensors_of_nodes(function.node)


def _tensors_of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _tensors_of_nodes(graph.node)


def _tensors_of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for graph in (attribute.g, *attribute.graphs):
                yield from _tensors_of_graph(graph)
