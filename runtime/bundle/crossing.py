"""What crosses from one stage to a later one: the hidden state, and as few bytes of shared values as possible."""

import itertools
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from stageline.runtime.bundle.graph import size_bytes, size_read
from stageline.runtime.bundle.manifest import TensorSpec, UncutManifest, uses_of

_RECOMPUTE_WEIGHT_BYTES = 64 * 1024  # a shared value that needs a larger weight is sent, not recomputed
_UNBOUNDED = math.inf


@dataclass(frozen=True)
class Crossing:
    """Where the cuts are and what crosses them."""

    manifest: UncutManifest
    parts: Sequence[ir.Model]
    ranges: tuple[tuple[int, int], ...]  # of each stage: its first block, and the first one after it
    inputs: tuple[tuple[str, ...], ...]
    outputs: tuple[tuple[str, ...], ...]
    specs: Mapping[str, TensorSpec]
    prologue: "Prologue"

    @classmethod
    def of(cls, manifest: UncutManifest, parts: Sequence[ir.Model], counts: Sequence[int]) -> "Crossing":
        """What crosses from stage to stage, if they have `counts` blocks each."""
        ends = list(itertools.accumulate(counts))
        ranges = tuple((end - count, end) for end, count in zip(ends, counts, strict=True))
        prologue = Prologue(manifest, parts[manifest.uses[0].part])
        specs = {**_specs(manifest), **prologue.specs}
        uses = [uses_of(manifest.uses, *r) for r in ranges]
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


def _specs(manifest: UncutManifest) -> dict[str, TensorSpec]:
    """Every value of the model that a part writes, and its inputs, by name."""
    specs = {spec.name: spec for spec in manifest.inputs}
    for use in manifest.uses:
        for spec in manifest.parts[use.part].outputs:
            name = use.writes[spec.name]
            specs[name] = spec.model_copy(update={"name": name})
    return specs


class Prologue:
    """The prologue's graph. It decides which of its values are sent to a later stage and which are recomputed there."""

    def __init__(self, manifest: UncutManifest, model: ir.Model):
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
        """The values, as few bytes as possible, from which all `wanted` shared values can be computed if the sizes of
        the dimensions `sizes` are known. A minimum vertex cut, by augmenting paths."""
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
                edge((value, "in"), (value, "out"), size - 0.5)  # at equal size prefer an input: every stage has it
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
            room = min(capacity[edge] for edge in path)
            for a, b in path:
                capacity[a, b] -= room
                capacity[b, a] += room
        reach = _reaching_sink(capacity, near)
        cut = [v for v in seen if (v, "in") not in reach and (v, "out") in reach]
        return sorted(self.names[v] for v in cut)

    def sources(self, value: ir.Value, sizes: set[str]) -> list[ir.Value | None]:
        """What a value is computed from, without constants; None stands for what only the first stage has."""
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
    """A shortest path from source to sink with capacity left, as edges; empty if there is none."""
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
