"""Stitching parts into stages: plain graph work on ONNX, in milliseconds, without torch.

What crosses a cut is the hidden state and whatever else the later blocks read. Shared values (masks, rotary tables) are
recomputed from something smaller where the prologue's graph allows it: the smallest set is a minimum cut of that graph.
"""

import itertools
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from stageline.models.errors import BundleError
from stageline.models.tensors import TensorEntry
from stageline.runtime.manifest import CacheSpec, Manifest, Stage, TensorSpec, Use

NOMINAL = {"batch": 8, "length": 128}  # sizes at which the bytes that cross a cut are compared
_RECOMPUTE_WEIGHT_BYTES = 64 * 1024  # a shared value that needs a larger weight than this is shipped, not recomputed
_UNBOUNDED = math.inf
CACHE_ATTENTION = "CacheAttention"  # of the domain "stageline"; docs/bundle.md says what it computes


def size_bytes(shape: Sequence[int | str], dtype: str) -> int:
    """Bytes of a tensor at nominal sizes of its free dimensions."""
    return math.prod(d if isinstance(d, int) else NOMINAL.get(d, 64) for d in shape) * ir_dtype(dtype).numpy().itemsize


def ir_dtype(name: str) -> ir.DataType:
    """The ONNX data type of a NumPy name."""
    return ir.DataType[{"float32": "FLOAT", "float64": "DOUBLE"}.get(name, name.upper())]


def cache_of(node: ir.Node, name: str) -> CacheSpec:
    """The cache that a CacheAttention node reads and adds to."""
    _, key, value, *_ = node.inputs
    return CacheSpec(name=name, heads=static(key, 1), key_size=static(key, 3), value_size=static(value, 3))


def static(value: ir.Value | None, axis: int) -> int:
    """The size of a dimension that the graph fixes."""
    assert value is not None
    assert value.shape is not None
    size = value.shape[axis]
    assert isinstance(size, int)
    return size


def part_costs(manifest: Manifest, parts: Sequence[ir.Model]) -> list[int]:
    """A cost for each use in order (prologue, blocks, epilogue): the elements of weights it multiplies by a token."""
    costs = []
    for use in manifest.uses:
        graph = parts[use.part].graph
        looked_up = {node.inputs[0].name for node in graph if node.op_type == "Gather" and node.inputs[0] is not None}
        weights = manifest.parts[use.part].weights
        costs.append(sum(math.prod(map(int, w.shape)) for w in weights if w.name not in looked_up))
    return costs


def balance(costs: Sequence[int], stages: int) -> list[int]:
    """Blocks for each stage such that the costliest stage is cheapest. `costs` begins with the prologue, which the
    first stage bears, and ends with the epilogue, which the last bears. Exact, by dynamic programming over the cuts."""
    blocks = len(costs) - 2
    total = list(itertools.accumulate(costs[1:-1], initial=0))

    def cost(first: int, end: int) -> int:
        return total[end] - total[first] + (costs[0] if first == 0 else 0) + (costs[-1] if end == blocks else 0)

    # best[end]: (costliest stage, sum of squares for evenness among equals, cuts) of the first `end` blocks
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, ())}
    for _ in range(stages):
        best = {
            end: min(
                (max(worst, cost(first, end)), squares + cost(first, end) ** 2, (*cuts, end))
                for first, (worst, squares, cuts) in best.items()
                if first < end
            )
            for end in range(1, blocks + 1)
            if any(first < end for first in best)
        }
    cuts = best[blocks][2]
    return [end - first for first, end in zip((0, *cuts), cuts, strict=False)]


@dataclass(frozen=True)
class Plan:
    """Where the cuts are and what crosses them."""

    manifest: Manifest
    parts: Sequence[ir.Model]
    ranges: tuple[tuple[int, int], ...]  # first and last block of each stage
    inputs: tuple[tuple[str, ...], ...]
    outputs: tuple[tuple[str, ...], ...]
    specs: Mapping[str, TensorSpec]
    prologue: "Prologue"

    @classmethod
    def of(cls, manifest: Manifest, parts: Sequence[ir.Model], counts: Sequence[int]) -> "Plan":
        """The plan for stages of `counts` blocks each."""
        ends = list(itertools.accumulate(counts))
        ranges = tuple((end - count, end - 1) for end, count in zip(ends, counts, strict=True))
        prologue = Prologue(manifest, parts[manifest.uses[0].part])
        specs = {**_specs(manifest), **prologue.specs}
        uses = [_uses(manifest, *r) for r in ranges]
        made = [{value for use in group for value in use.writes.values()} for group in uses]
        reads: list[tuple[str, ...]] = []
        for number, group in enumerate(uses):
            wanted = list(dict.fromkeys(v for use in group for v in use.reads.values() if v not in made[number]))
            if number:
                hidden = {d for v in wanted if v not in prologue.outputs for d in specs[v].shape if isinstance(d, str)}
                shared = [v for v in wanted if v in prologue.outputs]
                wanted = [v for v in wanted if v not in prologue.outputs] + prologue.frontier(shared, hidden)
            reads.append(tuple(dict.fromkeys(wanted)))
        model_inputs = {spec.name for spec in manifest.inputs}
        model_outputs = [spec.name for spec in manifest.outputs]
        outputs = []
        for number in range(len(ranges)):
            later = dict.fromkeys(v for group in reads[number + 1 :] for v in group if v not in model_inputs)
            mine = made[number] | (set(prologue.specs) if number == 0 else set())
            outputs.append(tuple(v for v in (*later, *model_outputs) if v in mine))
        return cls(manifest, parts, ranges, tuple(reads), tuple(outputs), specs, prologue)


def _uses(manifest: Manifest, first: int, last: int) -> list[Use]:
    begin = 0 if first == 0 else first + 1
    end = len(manifest.uses) if last == manifest.blocks - 1 else last + 2
    return list(manifest.uses[begin:end])


def _specs(manifest: Manifest) -> dict[str, TensorSpec]:
    """Every value of the model that a part writes, and its inputs, by name."""
    specs = {spec.name: spec for spec in manifest.inputs}
    for use in manifest.uses:
        for spec in manifest.parts[use.part].outputs:
            name = use.writes[spec.name]
            specs[name] = spec.model_copy(update={"name": name})
    return specs


class Prologue:
    """The prologue's graph, asked which of its values to ship to a later stage and which to recompute there."""

    def __init__(self, manifest: Manifest, model: ir.Model):
        use = manifest.uses[0]
        self.graph = model.graph
        self.outputs = {use.writes[str(v.name)]: v for v in self.graph.outputs}
        self.names: dict[ir.Value, str] = {v: name for name, v in self.outputs.items()}
        self.weights = {w.name: w for w in manifest.parts[use.part].weights}
        for value in self.graph.inputs:
            if value.name not in self.weights:
                self.names[value] = use.reads[str(value.name)]
        self.specs: dict[str, TensorSpec] = {}
        for node in self.graph:
            for value in node.outputs:
                if value.dtype is not None and value.shape is not None and value.name:
                    name = self.names.setdefault(value, f"prologue.{value.name}")
                    shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
                    self.specs[name] = TensorSpec(name=name, dtype=np.dtype(value.dtype.numpy()).name, shape=shape)

    def frontier(self, wanted: Sequence[str], sizes: set[str]) -> list[str]:
        """The values of fewest bytes from which all `wanted` shared values can be computed, where the sizes of the
        dimensions `sizes` are at hand. A minimum vertex cut, by augmenting paths."""
        capacity: dict[tuple[object, object], float] = {}
        near: dict[object, set[object]] = {}

        def edge(a: object, b: object, size: float) -> None:
            capacity[a, b] = capacity.get((a, b), 0) + size
            capacity.setdefault((b, a), 0)
            near.setdefault(a, set()).add(b)
            near.setdefault(b, set()).add(a)

        todo = [self.outputs[name] for name in wanted]
        for value in todo:
            edge((value, "out"), "sink", _UNBOUNDED)
        seen = set(todo)
        while todo:
            value = todo.pop()
            name = self.names.get(value)
            spec = self.specs.get(name) if name else None
            if value.producer() is None and name is not None:
                assert value.dtype is not None
                assert value.shape is not None
                shape = [d if isinstance(d, int) else str(d.value) for d in value.shape]
                size = size_bytes(shape, np.dtype(value.dtype.numpy()).name)
                edge((value, "in"), (value, "out"), size - 0.5)  # of equal sizes an input, which is at hand everywhere
            else:
                edge((value, "in"), (value, "out"), size_bytes(spec.shape, spec.dtype) if spec else _UNBOUNDED)
            for source in self.sources(value, sizes):
                if source is None:
                    edge("source", (value, "in"), _UNBOUNDED)
                    continue
                edge((source, "out"), (value, "in"), _UNBOUNDED)
                if source not in seen:
                    seen.add(source)
                    todo.append(source)
        while path := _augmenting(capacity, near):
            room = min(capacity[step] for step in path)
            for a, b in path:
                capacity[a, b] -= room
                capacity[b, a] += room
        reach = _reaching_sink(capacity, near)
        cut = [v for v in seen if (v, "in") not in reach and (v, "out") in reach]
        return sorted(self.names[v] for v in cut)

    def sources(self, value: ir.Value, sizes: set[str]) -> list[ir.Value | None]:
        """What a value is computed from, constants left out; None stands for what is only had in the first stage."""
        node = value.producer()
        if node is None:
            return [None]
        if size_read(node) in sizes:
            return []
        found: list[ir.Value | None] = []
        for source in node.inputs:
            if source is None or source.is_initializer():
                continue
            weight = self.weights.get(str(source.name)) if source.producer() is None else None
            if weight is None:
                found.append(source)
            elif size_bytes(weight.shape, weight.dtype) > _RECOMPUTE_WEIGHT_BYTES:
                found.append(None)
        return found


def _augmenting(
    capacity: dict[tuple[object, object], float], near: dict[object, set[object]]
) -> list[tuple[object, object]]:
    """A shortest path with room from source to sink, as steps; empty where none is left."""
    came: dict[object, object] = {"source": "source"}
    queue = deque(["source"] if "source" in near else [])
    while queue:
        at: object = queue.popleft()
        for to in near[at]:
            if to not in came and capacity[at, to] > 0:
                came[to] = at
                if to == "sink":
                    path: list[tuple[object, object]] = []
                    while to != "source":
                        path.append((came[to], to))
                        to = came[to]
                    return path[::-1]
                queue.append(to)  # type: ignore[arg-type]
    return []


def _reaching_sink(capacity: dict[tuple[object, object], float], near: dict[object, set[object]]) -> set[object]:
    reach: set[object] = {"sink"}
    todo: list[object] = ["sink"]
    while todo:
        at = todo.pop()
        for other in near.get(at, ()):
            if other not in reach and capacity[other, at] > 0:
                reach.add(other)
                todo.append(other)
    return reach


def size_read(node: ir.Node) -> str | None:
    """The free dimension whose size a Shape node reads, or None where it reads anything else."""
    if node.op_type != "Shape" or node.domain or node.inputs[0] is None or node.inputs[0].shape is None:
        return None
    shape = node.inputs[0].shape
    start = node.attributes["start"].as_int() if "start" in node.attributes else 0
    end = node.attributes["end"].as_int() if "end" in node.attributes else len(shape)
    read = list(shape)[start:end]
    return read[0].value if len(read) == 1 and isinstance(read[0], ir.SymbolicDim) else None


def stitch(plan: Plan, number: int, tensors: Mapping[str, TensorEntry], folder: Path) -> tuple[ir.Model, Stage]:
    """Stage `number` of the plan as a model whose weights are references into the weight files of `folder`."""
    first, last = plan.ranges[number]
    builder = _Builder(plan, tensors, folder)
    inputs = [builder.input(plan.specs[name]) for name in plan.inputs[number]]
    if first > 0:
        builder.recompute(_uses(plan.manifest, first, last))
    for place, use in enumerate(_uses(plan.manifest, first, last)):
        builder.use(
            use,
            f"{first + place - (first == 0)}/"
            if use.module
            else f"{'prologue' if use is plan.manifest.uses[0] else 'epilogue'}/",
        )
    outputs = [builder.output(plan.specs[name]) for name in plan.outputs[number]]
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=builder.nodes,
        initializers=list(builder.initializers.values()),
        opset_imports=builder.opsets,
        name=f"stage-{number}",
    )
    model = ir.Model(graph, ir_version=plan.parts[0].ir_version, producer_name="stageline")
    used = {name: tensors[name] for name in builder.weights}
    stage = Stage(
        file=f"stage.{first:03}-{last:03}.onnx",
        first_block=first,
        last_block=last,
        inputs=tuple(plan.specs[name] for name in plan.inputs[number]),
        outputs=tuple(plan.specs[name] for name in plan.outputs[number]),
        weight_bytes=sum(entry.size_bytes for entry in used.values()),
        parameters=sum(math.prod(entry.shape) for entry in used.values()),
        caches=tuple(builder.caches),
    )
    return model, stage


class _Builder:
    """Grows one stage's graph use by use; `values` holds what the model's values are in it."""

    def __init__(self, plan: Plan, tensors: Mapping[str, TensorEntry], folder: Path):
        self.plan, self.tensors, self.folder = plan, tensors, folder
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
        """The value itself under its model name: names inside a stage are prefixed, so they never clash."""
        value = self.values[spec.name]
        if value.is_graph_input() or value.name in self.initializers or value.name != spec.name:
            node = ir.node("Identity", [value])
            self.nodes.append(node)
            value = node.outputs[0]
            value.name = spec.name
        value.shape, value.type = ir.Shape(list(spec.shape)), ir.TensorType(ir_dtype(spec.dtype))
        return value

    def use(self, use: Use, prefix: str) -> None:
        """Add a part's nodes, reading and writing the model's values."""
        model = self.plan.parts[use.part]
        new: dict[ir.Value, ir.Value] = {}
        self.opsets.update(model.graph.opset_imports)
        for value in model.graph.inputs:
            name = str(value.name)
            new[value] = self.values[use.reads[name]] if name in use.reads else self.weight(use.weights[name], value)
        self.copy(list(model.graph), new, prefix)
        for value in model.graph.outputs:
            self.values[use.writes[str(value.name)]] = new[value]
        if model is self.plan.parts[self.plan.manifest.uses[0].part]:
            for value, name in self.plan.prologue.names.items():
                if value in new:
                    self.values.setdefault(name, new[value])

    def recompute(self, uses: Sequence[Use]) -> None:
        """Add the prologue's nodes that give the shared values which these uses read, from what crosses the cut."""
        manifest = self.plan.manifest
        prologue = self.plan.prologue
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
        self.opsets.update(self.plan.parts[manifest.uses[0].part].graph.opset_imports)
        self.copy([node for node in prologue.graph if node in keep], new, "shared/")
        for name in wanted:
            self.values[name] = new[prologue.outputs[name]]

    def copy(self, nodes: Sequence[ir.Node], new: dict[ir.Value, ir.Value], prefix: str) -> None:
        """Copy nodes, renaming what they give; constants come along."""
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
        """The weight `name` as an initializer that refers to its file; cast where the file's dtype is another."""
        if name in self.weights:
            return self.weights[name]
        entry = self.tensors.get(name)
        if entry is None:
            raise BundleError(f"bundle {self.folder}: no weight file holds tensor {name!r}; export the bundle again")
        assert local.shape is not None
        if tuple(entry.shape) != tuple(local.shape):
            raise BundleError(
                f"bundle {self.folder}: tensor {name!r} has shape {list(entry.shape)} where the graph wants "
                f"{list(local.shape)}; export the bundle again"
            )
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
        if local.dtype is not None and dtype != local.dtype:
            cast = ir.node("Cast", [value], {"to": int(local.dtype)})
            value = cast.outputs[0]
            value.name, value.shape, value.type = f"{name}.{local.dtype.name.lower()}", local.shape, local.type
            self.nodes.append(cast)
        self.weights[name] = value
        return value


def _free(value: ir.Value) -> set[str]:
    return {d.value for d in value.shape or () if isinstance(d, ir.SymbolicDim) and d.value}
