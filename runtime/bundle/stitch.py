"""Stitching parts into stages: operations on ONNX graphs that take milliseconds, without torch.

The hidden state crosses a cut, and so does everything else that later blocks read. Shared values (masks, rotary tables)
are recomputed from something smaller if the prologue's graph allows it: the smallest set is a minimum cut of that
graph.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
from stageline.models.errors import BundleError
from stageline.models.tensors import Entry, PackedEntry, TensorEntry
from stageline.runtime.bundle.crossing import Crossing
from stageline.runtime.bundle.graph import CACHE_ATTENTION, cache_of, ir_dtype, size_read
from stageline.runtime.bundle.manifest import CacheSpec, Stage, TensorSpec, Use, uses_of
from stageline.runtime.bundle.packed import dequantise_node


def stitch(crossing: Crossing, number: int, tensors: Mapping[str, Entry], folder: Path) -> tuple[ir.Model, Stage]:
    """Stage `number` as a model whose weights are references into the weight files of `folder`."""
    first, end = crossing.ranges[number]
    uses = uses_of(crossing.manifest.uses, first, end)
    builder = _Builder(crossing, tensors, folder)
    inputs = [builder.input(crossing.specs[name]) for name in crossing.inputs[number]]
    if first > 0:
        builder.recompute(uses)
    for place, use in enumerate(uses):
        ends = "prologue" if use is crossing.manifest.uses[0] else "epilogue"
        builder.add(use, f"{first + place - (first == 0)}/" if use.module else f"{ends}/")
    outputs = [builder.output(crossing.specs[name]) for name in crossing.outputs[number]]
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=builder.nodes,
        initializers=list(builder.initializers.values()),
        opset_imports=builder.opsets,
        name=f"stage-{number}",
    )
    model = ir.Model(graph, ir_version=crossing.parts[0].ir_version, producer_name="stageline")
    used = {name: tensors[name] for name in builder.weights}
    stage = Stage(
        file=f"stage.{first:03}-{end - 1:03}.onnx",
        first_block=first,
        last_block=end - 1,
        inputs=tuple(crossing.specs[name] for name in crossing.inputs[number]),
        outputs=tuple(crossing.specs[name] for name in crossing.outputs[number]),
        weight_bytes=sum(entry.size_bytes for entry in used.values()),
        parameters=sum(math.prod(entry.shape) for entry in used.values()),
        caches=tuple(builder.caches),
    )
    return model, stage


class _Builder:
    """Builds one stage's graph use by use. `values` maps names of the model's values to values of the graph."""

    def __init__(self, crossing: Crossing, tensors: Mapping[str, Entry], folder: Path):
        self.crossing, self.tensors, self.folder = crossing, tensors, folder
        self.values: dict[str, ir.Value] = {}
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.weights: dict[str, ir.Value] = {}
        self.opsets: dict[str, int] = {}
        self.caches: list[CacheSpec] = []

    def input(self, spec: TensorSpec) -> ir.Value:
        value = ir.Value(name=spec.name, shape=ir.Shape(list(spec.shape)), type=ir.TensorType(ir_dtype(spec.dtype)))
        self.values[spec.name] = value
        return value

    def output(self, spec: TensorSpec) -> ir.Value:
        """The value under its name in the model. Names inside a stage have a prefix, so they never clash."""
        value = self.values[spec.name]
        if value.is_graph_input() or value.name in self.initializers or value.name != spec.name:
            node = ir.node("Identity", [value])
            self.nodes.append(node)
            value = node.outputs[0]
            value.name = spec.name
        value.shape, value.type = ir.Shape(list(spec.shape)), ir.TensorType(ir_dtype(spec.dtype))
        return value

    def add(self, use: Use, prefix: str) -> None:
        """Add a part's nodes, reading and writing the model's values."""
        model = self.crossing.parts[use.part]
        new: dict[ir.Value, ir.Value] = {}
        self.opsets.update(model.graph.opset_imports)
        for value in model.graph.inputs:
            name = str(value.name)
            new[value] = self.values[use.reads[name]] if name in use.reads else self.weight(use.weights[name], value)
        self.copy(list(model.graph), new, prefix)
        for value in model.graph.outputs:
            self.values[use.writes[str(value.name)]] = new[value]
        if model is self.crossing.parts[self.crossing.manifest.uses[0].part]:
            for value, name in self.crossing.prologue.names.items():
                if value in new:
                    self.values.setdefault(name, new[value])

    def recompute(self, uses: Sequence[Use]) -> None:
        """Add the prologue's nodes that compute the shared values which these uses read, from what crosses the cut."""
        manifest = self.crossing.manifest
        prologue = self.crossing.prologue
        wanted = [v for use in uses for v in use.reads.values() if v in prologue.outputs and v not in self.values]
        sizes = {d for v in self.values.values() for d in _free(v)}
        new: dict[ir.Value, ir.Value] = {v: self.values[n] for v, n in prologue.names.items() if n in self.values}
        keep: set[ir.Node] = set()
        todo = [prologue.outputs[name] for name in wanted]
        while todo:
            value = todo.pop()
            node = value.producer()
            if value in new or value.is_initializer() or (node is not None and node in keep):
                continue
            if node is None:
                new[value] = self.weight(manifest.uses[0].weights[str(value.name)], value)
                continue
            keep.add(node)
            if size_read(node) not in sizes:
                todo += [source for source in node.inputs if source is not None]
        self.opsets.update(self.crossing.parts[manifest.uses[0].part].graph.opset_imports)
        self.copy([node for node in prologue.graph if node in keep], new, "shared/")
        for name in wanted:
            self.values[name] = new[prologue.outputs[name]]

    def copy(self, nodes: Sequence[ir.Node], new: dict[ir.Value, ir.Value], prefix: str) -> None:
        """Copy nodes and their constants, renaming their outputs."""
        for node in nodes:
            source = node.inputs[0] if node.inputs else None
            if source is not None and source not in new and (size := size_read(node)) is not None:
                copy = self.size_of(size)
            else:
                mapped = [None if v is None else self.constant(v, new, prefix) for v in node.inputs]
                copy = ir.Node(
                    node.domain, node.op_type, mapped, list(node.attributes.values()), num_outputs=len(node.outputs)
                )
                if node.op_type == CACHE_ATTENTION:
                    earlier = sum(c.name.startswith(f"cache.{prefix}") for c in self.caches)
                    cache = cache_of(node, f"cache.{prefix}{earlier}")
                    copy.attributes["cache"] = ir.AttrString("cache", cache.name)
                    self.caches.append(cache)
            copy.name = prefix + str(node.name)
            for old, value in zip(node.outputs, copy.outputs, strict=True):
                value.name, value.type, value.shape = prefix + str(old.name), old.type, old.shape
                new[old] = value
            self.nodes.append(copy)

    def constant(self, value: ir.Value, new: dict[ir.Value, ir.Value], prefix: str) -> ir.Value:
        if value not in new:
            assert value.const_value is not None
            name = prefix + str(value.name)
            new[value] = self.initializers.setdefault(
                name, ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
            )
        return new[value]

    def size_of(self, size: str) -> ir.Node:
        for value in self.values.values():
            for axis, dimension in enumerate(value.shape or ()):
                if isinstance(dimension, ir.SymbolicDim) and dimension.value == size:
                    return ir.node("Shape", [value], {"start": axis, "end": axis + 1})
        raise BundleError(f"no tensor that crosses the cut has dimension {size!r}; export the bundle again")

    def weight(self, name: str, local: ir.Value) -> ir.Value:
        """The weight `name` as an initializer that refers to its file, with a Cast if the file has another dtype; of a
        packed one its parts, and the operator that unpacks them."""
        if name in self.weights:
            return self.weights[name]
        entry = self.tensors.get(name)
        if entry is None:
            raise BundleError(f"bundle {self.folder}: no weight file holds tensor {name!r}; export the bundle again")
        assert local.shape is not None
        if tuple(entry.shape) != tuple(local.shape):
            raise BundleError(
                f"bundle {self.folder}: tensor {name!r} has shape {list(entry.shape)}, the graph needs "
                f"{list(local.shape)}; export the bundle again"
            )
        if isinstance(entry, PackedEntry):
            self.weights[name] = self.unpacked(entry, local)
            return self.weights[name]
        value = self.stored(name, entry)
        if local.dtype is not None and value.dtype != local.dtype:
            cast = ir.node("Cast", [value], {"to": int(local.dtype)})
            value = cast.outputs[0]
            value.name, value.shape, value.type = f"{name}.{local.dtype.name.lower()}", local.shape, local.type
            self.nodes.append(cast)
        self.weights[name] = value
        return value

    def unpacked(self, entry: PackedEntry, local: ir.Value) -> ir.Value:
        parts = {role: self.stored(f"{entry.name}.{role}", part) for role, part in entry.parts.items()}
        node = dequantise_node(entry.packing, parts)
        node.name = f"{entry.name}.dequantise"
        value = node.outputs[0]
        value.name, value.shape, value.type = entry.name, local.shape, local.type
        self.nodes.append(node)
        self.opsets[node.domain] = 1
        return value

    def stored(self, name: str, entry: TensorEntry) -> ir.Value:
        dtype = ir_dtype(entry.dtype)
        data = ir.ExternalTensor(
            location=entry.file.relative_to(self.folder).as_posix(),
            offset=entry.offset,
            length=entry.size_bytes,
            dtype=dtype,
            shape=ir.Shape(entry.shape),
            name=name,
            base_dir=self.folder,
        )
        value = ir.Value(name=name, shape=ir.Shape(entry.shape), type=ir.TensorType(dtype), const_value=data)
        self.initializers[name] = value
        return value


def _free(value: ir.Value) -> set[str]:
    return {d.value for d in value.shape or () if isinstance(d, ir.SymbolicDim) and d.value}
