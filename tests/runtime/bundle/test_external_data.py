"""Graphs of a bundle read what its manifest lists, and nothing else, however they name it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from stageline.models.errors import BundleError
from stageline.runtime import Pipeline
from stageline.runtime.bundle.folder import Bundle, file_entry, write_manifest


def external(name: str, location: str, **said: object) -> onnx.TensorProto:
    """Eight floats in another file."""
    tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=[8])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, **said}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def changed(bundle: Path, change: Callable[[onnx.ModelProto], object]) -> None:
    """Change the first stage's graph, and let the manifest say so: who writes bundles can do both."""
    manifest = Bundle.open(bundle).manifest
    file = manifest.stages[0].file
    model = onnx.ModelProto.FromString((bundle / file).read_bytes())
    change(model)
    (bundle / file).write_bytes(model.SerializeToString())
    files = tuple(file_entry(bundle, file) if entry.path == file else entry for entry in manifest.files)
    write_manifest(bundle, manifest.model_copy(update={"files": files}))


def weights(bundle: Path) -> tuple[str, int]:
    (name,) = Bundle.open(bundle).manifest.weight_files
    return name, (bundle / name).stat().st_size


def refused(bundle: Path, message: str) -> None:
    for opens in (Bundle.open, Pipeline.open):
        with pytest.raises(BundleError, match=message) as caught:
            opens(bundle)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("location", ["notes.bin", "../secret", "weights/../../secret", "/etc/hostname", "", "weights"])
def test_a_file_that_is_not_listed_is_not_read(bundle: Path, location: str) -> None:
    for file in (bundle / "notes.bin", bundle.parent / "secret"):
        file.write_bytes(bytes(64))
    changed(bundle, lambda model: model.graph.initializer.append(external("w", location)))
    refused(bundle, f"reads 'w' from '{location}', which its manifest does not list")


def test_no_more_is_read_than_the_file_has(bundle: Path) -> None:
    name, size = weights(bundle)
    for said in (
        {"offset": size - 31}, {"offset": size - 32, "length": 33}, {"offset": -1}, {"offset": "x"}, {"length": 2**60},
        {"offset": 2**63, "length": 32},
    ):  # fmt: skip
        one = bundle.parent / "changed"
        shutil.copytree(bundle, one)
        changed(one, lambda model, said=said: model.graph.initializer.append(external("w", name, **said)))  # type: ignore[misc]
        refused(one, "reads 'w' beyond the end of weights/")
        shutil.rmtree(one)
    changed(bundle, lambda model: model.graph.initializer.append(external("w", f"./{name}", offset=size - 32)))
    Bundle.open(bundle)


def _in_a_constant(model: onnx.ModelProto) -> None:
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["c"], value=external("w", "notes.bin")))


def _in_a_branch(model: onnx.ModelProto) -> None:
    inner = onnx.helper.make_graph([], "inner", [], [], initializer=[external("w", "notes.bin")])
    outer = onnx.helper.make_graph([onnx.helper.make_node("Loop", [], [], body=inner)], "outer", [], [])
    model.graph.node.append(onnx.helper.make_node("If", ["c"], ["d"], then_branch=outer))


def _sparse(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.add().values.CopyFrom(external("w", "notes.bin"))


def _in_a_function(model: onnx.ModelProto) -> None:
    node = onnx.helper.make_node("Constant", [], ["c"], value=external("w", "notes.bin"))
    model.functions.append(onnx.helper.make_function("own", "f", [], ["c"], [node], []))


@pytest.mark.parametrize("change", [_in_a_constant, _in_a_branch, _sparse, _in_a_function])
def test_it_is_found_wherever_a_graph_has_tensors(bundle: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    changed(bundle, change)
    refused(bundle, "reads 'w' from 'notes.bin'")


def test_what_is_no_graph_is_refused_in_a_line(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    file = manifest.parts[0].file
    (bundle / file).write_bytes(b"\xff" * 50)
    files = tuple(file_entry(bundle, file) if entry.path == file else entry for entry in manifest.files)
    write_manifest(bundle, manifest.model_copy(update={"files": files}))
    refused(bundle, f"{file} is not an ONNX graph; export the bundle again")
