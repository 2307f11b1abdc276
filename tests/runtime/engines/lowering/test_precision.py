"""Types of a lowered graph's values, on graphs of a few nodes: what becomes narrow, and what has to stay float32."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from stageline.models.errors import EngineError
from stageline.runtime.engines.lowering.precision import to_precision, widen_initializers

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def value(name: str, dtype: ir.DataType = FLOAT, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape or ("rows", 2)), type=ir.TensorType(dtype))


def weight(name: str, folder: Path, dtype: ir.DataType = FLOAT) -> ir.Value:
    """An initializer in a file, as a bundle's weights are."""
    array = np.ones((2, 2), dtype.numpy())
    (folder / name).write_bytes(array.tobytes())
    data = ir.ExternalTensor(name, 0, array.nbytes, dtype, shape=ir.Shape((2, 2)), name=name, base_dir=folder)
    return ir.Value(name=name, shape=ir.Shape((2, 2)), type=ir.TensorType(dtype), const_value=data)


def node(op: str, *inputs: ir.Value, name: str, **attributes: object) -> ir.Node:
    made = ir.node(op, inputs, attributes or None, name=name)  # type: ignore[arg-type]
    made.outputs[0].name = name
    made.outputs[0].type = ir.TensorType(FLOAT)
    return made


def model(inputs: list[ir.Value], nodes: list[ir.Node], initializers: list[ir.Value]) -> ir.Model:
    outputs = [nodes[-1].outputs[0]]
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=initializers, opset_imports={"": 20}, name="g")
    return ir.Model(graph, ir_version=10)


def types(made: ir.Model) -> dict[str, ir.DataType | None]:
    return {str(v.name): v.dtype for n in made.graph for v in n.outputs}


def test_a_product_with_a_weight_is_narrow_and_the_border_is_not(tmp_path: Path) -> None:
    x, w = value("x"), weight("w", tmp_path)
    made = model([x], [node("MatMul", x, w, name="y")], [w])
    to_precision(made, HALF, ())
    assert [n.op_type for n in made.graph] == ["Clip", "Cast", "MatMul", "Cast"]
    assert types(made)["y.float16"] == HALF
    assert (made.graph.inputs[0].dtype, made.graph.outputs[0].dtype, made.graph.outputs[0].name) == (FLOAT, FLOAT, "y")
    assert (w.dtype, list(made.graph.initializers)) == (FLOAT, ["precision.least", "precision.most", "w"])
    assert made.graph.initializers["w"].dtype == HALF  # read in the narrow type, under its own name
    assert made.graph.initializers["w"].const_value.dtype == FLOAT  # type: ignore[union-attr]  # on disk as it was


def test_what_comes_from_positions_alone_stays_float32() -> None:
    """In bfloat16, position 257 would be 256."""
    positions = value("positions", ir.DataType.INT64, "rows")
    made = model(
        [positions],
        [
            node("Cast", positions, name="p", to=FLOAT),
        ],
        [],
    )
    made.graph.append(node("Cos", made.graph[0].outputs[0], name="c"))
    made.graph.outputs[0] = made.graph[1].outputs[0]
    to_precision(made, ir.DataType.BFLOAT16, ())
    assert types(made) == {"p": FLOAT, "c": FLOAT}


def test_squares_are_computed_in_float32(tmp_path: Path) -> None:
    """300 x 300 is beyond float16."""
    x, w = value("x"), weight("w", tmp_path)
    product = node("MatMul", x, w, name="h")
    square = node("Mul", product.outputs[0], product.outputs[0], name="s")
    made = model([x], [product, square], [w])
    to_precision(made, HALF, ())
    assert (types(made)["h"], types(made)["s"]) == (HALF, FLOAT)
    assert square.inputs[0] is square.inputs[1]
    assert square.inputs[0] is not None
    assert square.inputs[0].dtype == FLOAT


def test_a_router_is_float32_from_its_product_on(tmp_path: Path) -> None:
    """What lies before it, and the experts that it chooses among, are narrow."""
    x, before, router, expert = value("x"), *(weight(name, tmp_path) for name in ("before", "router", "expert"))
    hidden = node("MatMul", x, before, name="h")
    logits = node("MatMul", hidden.outputs[0], router, name="l")
    chances = node("Softmax", logits.outputs[0], name="c")
    count = ir.Value(name="k", shape=ir.Shape((1,)), type=ir.TensorType(ir.DataType.INT64),
                     const_value=ir.tensor(np.array([1], np.int64), name="k"))  # fmt: skip
    chosen = node("TopK", chances.outputs[0], count, name="t")
    other = node("MatMul", hidden.outputs[0], expert, name="e")
    made = model([x], [hidden, logits, chances, chosen, other], [before, router, expert, count])
    made.graph.outputs.append(chosen.outputs[0])
    to_precision(made, HALF, ())
    found = types(made)
    assert [found[name] for name in ("h", "l", "c", "t", "e.float16")] == [HALF, FLOAT, FLOAT, FLOAT, HALF]
    assert {name: made.graph.initializers[name].dtype for name in ("before", "router", "expert")} == {
        "before": HALF, "router": FLOAT, "expert": HALF,
    }  # fmt: skip


def test_casts_down_keep_a_mask_finite(tmp_path: Path) -> None:
    x, w = value("x"), weight("w", tmp_path)
    made = model([x], [node("Add", x, w, name="y")], [w])
    to_precision(made, HALF, ())
    ends = [made.graph.initializers[f"precision.{end}"].const_value for end in ("least", "most")]
    assert [float(tensor.numpy()) for tensor in ends if tensor is not None] == [-65504.0, 65504.0]


def test_caches_are_narrow_at_the_border() -> None:
    past = value("past")
    made = model([past], [node("Identity", past, name="present")], [])
    to_precision(made, HALF, {"past", "present"})
    assert (made.graph.inputs[0].dtype, made.graph.outputs[0].dtype) == (HALF, HALF)


def test_a_cast_of_a_weight_becomes_the_weight(tmp_path: Path) -> None:
    x, w = value("x"), weight("w", tmp_path, HALF)
    cast = node("Cast", w, name="wide", to=FLOAT)
    made = model([x], [cast, node("MatMul", x, cast.outputs[0], name="y")], [w])
    widen_initializers(made)
    assert [n.op_type for n in made.graph] == ["MatMul"]
    assert made.graph[0].inputs[1] is w
    assert (w.dtype, w.const_value.dtype) == (FLOAT, HALF)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [HALF, ir.DataType.BFLOAT16])
def test_values_get_their_types_whatever_the_file_holds(tmp_path: Path, dtype: ir.DataType) -> None:
    """ONNX's inference leaves a model as it is if a small weight has another type on disk than in the graph."""
    x, w = value("x"), weight("w", tmp_path, dtype)
    inner, last = node("Neg", x, name="inner"), None
    inner.outputs[0].type = None
    last = node("MatMul", inner.outputs[0], w, name="y")
    made = model([x], [inner, last], [w])
    widen_initializers(made)
    to_precision(made, HALF, ())
    assert (types(made)["inner"], types(made)["y.float16"]) == (FLOAT, HALF)
    assert made.graph.initializers["w"].const_value.dtype == dtype  # type: ignore[union-attr]


def test_a_value_without_a_type_is_refused(tmp_path: Path) -> None:
    x, w = value("x"), weight("w", tmp_path)
    unknown = ir.node("Strange", [x], domain="nobody", name="unknown")
    unknown.outputs[0].name = "u"
    made = model([x], [unknown, node("MatMul", unknown.outputs[0], w, name="y")], [w])
    with pytest.raises(EngineError, match="the type of 'u', which Strange computes, cannot be inferred"):
        to_precision(made, HALF, ())


def test_constants_in_half_precision_are_widened() -> None:
    x = value("x")
    data = ir.tensor(np.array([0.5, -65504], np.float16), name="c")
    c = ir.Value(name="c", shape=ir.Shape([2]), type=ir.TensorType(HALF), const_value=data)
    made = model([x], [node("Mul", x, c, name="y")], [c])
    widen_initializers(made)
    tensor = made.graph.initializers["c"].const_value
    assert tensor is not None
    assert (c.dtype, tensor.dtype, tensor.numpy().tolist()) == (FLOAT, FLOAT, [0.5, -65504])


def test_a_cast_of_a_constant_becomes_the_constant() -> None:
    """An export keeps the exact values of constants in float32, each with a Cast to the bundle's type."""
    x = value("x")
    data = ir.tensor(np.array(0.044715, np.float32), name="c")
    c = ir.Value(name="c", shape=ir.Shape([]), type=ir.TensorType(FLOAT), const_value=data)
    narrow = node("Cast", c, name="narrow", to=HALF)
    made = model([x], [narrow, node("Mul", x, narrow.outputs[0], name="y")], [c])
    widen_initializers(made)
    assert [n.op_type for n in made.graph] == ["Mul"]
    assert made.graph[0].inputs[1] is c
    assert (c.dtype, c.const_value) == (FLOAT, data)


def test_a_branch_is_refused() -> None:
    x = value("x")
    inner = ir.Graph([], [], nodes=[], name="then")
    branch = node("If", x, name="y", then_branch=inner)
    with pytest.raises(EngineError, match=r"operator If \(y\) has a subgraph: only float32 can be built"):
        to_precision(model([x], [branch], []), HALF, ())
