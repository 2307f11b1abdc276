"""Nodes that compute in float32 whatever an engine's precision: read from a bundle's manifest, written into it."""

from collections.abc import Collection
from typing import Literal

import onnx_ir as ir
from stageline.models.errors import BundleError
from stageline.runtime.bundle.folder import Bundle, write_manifest
from stageline.runtime.bundle.manifest import Float32Nodes

Half = Literal["fp16", "bf16"]


def node_names(bundle: Bundle) -> set[str]:
    """The names of all nodes of the bundle's stages. They are the same however the bundle is cut."""
    return {str(node.name) for stage in bundle.manifest.stages for node in ir.load(bundle.path / stage.file).graph}


def check_float32_nodes(bundle: Bundle) -> None:
    """BundleError if the manifest names a node that no stage has."""
    nodes = bundle.manifest.float32_nodes or Float32Nodes()
    names = node_names(bundle)
    for precision, kept in (("fp16", nodes.fp16), ("bf16", nodes.bf16)):
        for name in kept:
            if name not in names:
                raise BundleError(
                    f"bundle {bundle.path}: its manifest keeps {name!r} in float32, which no stage has; search again: "
                    f"stageline verify {bundle.path} --find-precision --precision {precision}"
                )


def write_float32_nodes(bundle: Bundle, precision: Half, names: Collection[str]) -> Bundle:
    """Let engines of `precision` keep these nodes in float32, in place of those before. The bundle as it is then."""
    nodes = bundle.manifest.float32_nodes or Float32Nodes()
    nodes = nodes.model_copy(update={precision: tuple(sorted(names))})
    kept = nodes if nodes.fp16 or nodes.bf16 else None
    manifest = bundle.manifest.model_copy(update={"float32_nodes": kept})
    write_manifest(bundle.path, manifest)
    return Bundle(bundle.path, manifest, bundle.tensors)
