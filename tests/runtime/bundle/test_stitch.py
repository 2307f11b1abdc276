"""Cuts are balanced exactly, and what crosses them is the smallest that the graph allows."""

import itertools

import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stageline.runtime.bundle.balance import balance
from stageline.runtime.bundle.crossing import Prologue
from stageline.runtime.bundle.graph import size_bytes
from stageline.runtime.bundle.manifest import Manifest, Part, TensorSpec, Use


@settings(deadline=None)
@given(costs=st.lists(st.integers(0, 50), min_size=3, max_size=9), data=st.data())
def test_balance_is_as_good_as_the_best_of_all_cuts(costs: list[int], data: st.DataObject) -> None:
    blocks = len(costs) - 2
    stages = data.draw(st.integers(1, blocks))

    def worst(counts: tuple[int, ...]) -> int:
        ends = [0, *itertools.accumulate(counts)]
        sums = [sum(costs[1 + a : 1 + b]) for a, b in itertools.pairwise(ends)]
        sums[0] += costs[0]
        sums[-1] += costs[-1]
        return max(sums)

    every = [c for c in itertools.product(range(1, blocks + 1), repeat=stages) if sum(c) == blocks]
    found = balance(costs, stages)
    assert len(found) == stages
    assert sum(found) == blocks
    assert worst(tuple(found)) == min(map(worst, every))


SHAPES: list[tuple[int | str, ...]] = [("batch",), ("batch", "length"), ("batch", 1, "length", "length"), (3,)]


def _prologue(nodes: list[tuple[list[int], int]], inputs: int) -> tuple[Prologue, list[ir.Value]]:
    """A prologue of Sum nodes over earlier values; value i has shape SHAPES[...]; its last value is the one wanted."""
    values = [_value(f"in{i}", SHAPES[i % 2]) for i in range(inputs)]
    made = []
    for number, (sources, shape) in enumerate(nodes):
        node = ir.node("Sum", [values[i % len(values)] for i in sources])
        node.outputs[0].name, node.outputs[0].type = f"v{number}", ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = ir.Shape(list(SHAPES[shape]))
        values.append(node.outputs[0])
        made.append(node)
    graph = ir.Graph(values[:inputs], [values[-1]], nodes=made, opset_imports={"": 23}, name="prologue")
    spec = tuple(TensorSpec(name=f"in{i}", dtype="float32", shape=SHAPES[i % 2]) for i in range(inputs))
    part = Part(file="parts/0.onnx", inputs=spec, outputs=(), weights=())
    use = Use(part=0, reads={s.name: s.name for s in spec}, writes={str(values[-1].name): "shared.0"}, weights={})
    manifest = Manifest.model_construct(parts=(part,), uses=(use, use, use), inputs=spec)
    return Prologue(manifest, ir.Model(graph, ir_version=10)), values


def _value(name: str, shape: tuple[int | str, ...]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(list(shape)), type=ir.TensorType(ir.DataType.FLOAT))


def _bytes(value: ir.Value) -> int:
    return size_bytes([d if isinstance(d, int) else str(d.value) for d in value.shape or ()], "float32")


def _gives(cut: frozenset[ir.Value], wanted: ir.Value) -> bool:
    if wanted in cut:
        return True
    node = wanted.producer()
    return node is not None and all(_gives(cut, v) for v in node.inputs if v is not None)


@settings(deadline=None)
@given(
    nodes=st.lists(
        st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(0, 3)), min_size=1, max_size=6
    ),
    inputs=st.integers(1, 2),
)
def test_what_crosses_a_cut_is_the_smallest_that_gives_the_shared_value(
    nodes: list[tuple[list[int], int]], inputs: int
) -> None:
    prologue, values = _prologue(nodes, inputs)
    found = prologue.frontier(["shared.0"], set())
    by_name = {name: value for value, name in prologue.names.items()}
    chosen = frozenset(by_name[name] for name in found)
    assert _gives(chosen, values[-1])
    cheapest = min(
        sum(map(_bytes, subset))
        for size in range(len(values) + 1)
        for subset in itertools.combinations(values, size)
        if _gives(frozenset(subset), values[-1])
    )
    assert sum(map(_bytes, chosen)) == cheapest


def test_sizes_at_hand_need_not_cross() -> None:
    value = _value("in0", ("batch", "length"))
    shape = ir.node("Shape", [value], {"start": 1, "end": 2})
    shape.outputs[0].name, shape.outputs[0].type, shape.outputs[0].shape = (
        "n",
        ir.TensorType(ir.DataType.INT64),
        ir.Shape([1]),
    )
    graph = ir.Graph([value], [shape.outputs[0]], nodes=[shape], opset_imports={"": 23}, name="prologue")
    spec = (TensorSpec(name="in0", dtype="float32", shape=("batch", "length")),)
    part = Part(file="parts/0.onnx", inputs=spec, outputs=(), weights=())
    use = Use(part=0, reads={"in0": "in0"}, writes={"n": "shared.0"}, weights={})
    manifest = Manifest.model_construct(parts=(part,), uses=(use, use, use), inputs=spec)
    prologue = Prologue(manifest, ir.Model(graph, ir_version=10))
    assert prologue.frontier(["shared.0"], {"length"}) == []
    assert prologue.frontier(["shared.0"], set()) == ["shared.0"]


@pytest.mark.parametrize(
    ("shape", "dtype", "size"), [((), "float32", 4), (("batch", 3), "int64", 8 * 3 * 8), ((0,), "bool", 0)]
)
def test_size_at_nominal_dimensions(shape: tuple[int | str, ...], dtype: str, size: int) -> None:
    assert size_bytes(shape, dtype) == size
