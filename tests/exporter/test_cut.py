"""A marked graph of a few nodes is cut where its blocks meet; equal blocks are one part, unequal ones are refused."""

import onnx.parser
import onnx_ir as ir
import pytest
import torch
from stageline.exporter.blocks import Call
from stageline.exporter.cut import NotProvenError, PartGraph, cut
from stageline.exporter.trace import Trace
from stageline.models.errors import ExportError
from stageline.runtime.bundle.manifest import Use

ADD = "w{i} = Mul(h{i}, s{i})  r{i} = Add(w{i}, layers.{i}.bias)"


def cut_graph(blocks: dict[int, str], count: int | None = None) -> tuple[tuple[PartGraph, ...], list[Use]]:
    """Cut a model of `count` like blocks (as many as are traced, if None), of which `blocks` were traced: each computes
    r from its hidden state h [batch, length, 8], a scale s [batch, length, 1] that all share, and its weight."""
    lines, hidden = ["hidden = Gather(table, ids)  scale = Cast <to = 1> (mask)"], "hidden"
    for i, body in blocks.items():
        lines.append(f'h{i} = stageline.Mark <tag = "in.{i}.0"> ({hidden})')
        lines.append(f's{i} = stageline.Mark <tag = "in.{i}.1"> (scale)')
        lines.append(body.replace("{i}", str(i)).replace(f"layers.{i}.bias", f"bias{i}"))
        lines.append(f'out{i} = stageline.Mark <tag = "out.{i}.0"> (r{i})')
        hidden = f"out{i}"
    lines.append(f"logits = MatMul({hidden}, head)")
    weights = ["float[99, 8] table", "float[8, 4] head", *(f"float[8] bias{i}" for i in blocks)]
    model = ir.from_proto(
        onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["" : 23, "stageline" : 1]> g (int64[batch, length] ids, '
            f"int64[batch, length, 1] mask, {', '.join(weights)}) => (float[batch, length, 4] logits) "
            f"{{ {' '.join(lines)} }}"
        )
    )
    graph = model.graph
    for node in graph:  # types and shapes, as the tracer gives them
        for value in node.outputs:
            scale = str(value.name).startswith("s")
            value.shape = value.shape or ir.Shape(["batch", "length", 1 if scale else 8])
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for value in list(graph.inputs)[2:]:
        graph.inputs.remove(value)
        value.name = str(value.name).replace("bias", "layers.") + ".bias" * str(value.name).startswith("bias")
        graph.initializers.add(value)
    stack = [Call(f"layers.{i}", torch.nn.Module(), 0, [], chain=0) for i in range(count or len(blocks))]
    trace = Trace(model, frozenset(blocks), None)
    return cut(trace, stack, [0] * len(stack), frozenset(graph.initializers))


def operators(part: PartGraph) -> list[str]:
    return [node.op_type for node in part.model.graph if node.op_type != "Identity"]


def test_the_parts_are_a_prologue_a_block_and_an_epilogue() -> None:
    parts, uses = cut_graph({0: ADD})
    assert [operators(part) for part in parts] == [["Gather", "Cast"], ["Mul", "Add"], ["MatMul"]]
    assert [use.part for use in uses] == [0, 1, 2]
    assert [spec.shape for spec in parts[1].inputs] == [("batch", "length", 8), ("batch", "length", 1)]
    assert [(spec.name, spec.shape) for spec in parts[1].weights] == [("bias", (8,))]


def test_uses_form_a_chain_of_named_values() -> None:
    _, (prologue, first, second, epilogue) = cut_graph({0: ADD, 1: ADD})
    assert sorted(prologue.writes.values()) == ["hidden.0", "shared.0"]
    assert first.reads == {"in0": "hidden.0", "in1": "shared.0"}
    assert second.reads == {"in0": "hidden.1", "in1": "shared.0"}
    assert (first.weights, second.weights) == ({"bias": "layers.0.bias"}, {"bias": "layers.1.bias"})
    assert (epilogue.reads, epilogue.writes) == ({"in0": "hidden.2"}, {"out0": "logits"})


def test_blocks_whose_graphs_are_equal_are_one_part() -> None:
    other = "w{i} = Add(h{i}, layers.{i}.bias)  r{i} = Mul(w{i}, s{i})"
    _, uses = cut_graph({0: ADD, 1: other, 2: ADD})
    assert [use.part for use in uses] == [0, 1, 2, 1, 3]


def test_blocks_that_were_left_out_are_stamped_and_the_hidden_state_is_led_through_them() -> None:
    parts, uses = cut_graph({0: ADD, 3: ADD}, count=4)
    assert len(parts) == 3
    assert [use.reads["in0"] for use in uses[1:]] == [f"hidden.{i}" for i in range(5)]
    assert [use.writes["out0"] for use in uses[1:-1]] == [f"hidden.{i + 1}" for i in range(4)]
    assert [use.weights for use in uses[1:-1]] == [{"bias": f"layers.{i}.bias"} for i in range(4)]
    assert [use.module for use in uses[1:-1]] == [f"layers.{i}" for i in range(4)]


def test_a_last_block_with_another_graph_forbids_stamping() -> None:
    other = "c{i} = Constant <value_float = 3.0> ()  w{i} = Mul(h{i}, s{i})  r{i} = Add(w{i}, c{i})"
    with pytest.raises(NotProvenError, match="blocks 0 and 3 look alike but their graphs differ"):
        cut_graph({0: ADD, 3: other}, count=4)


def test_a_block_that_reads_nothing_of_the_blocks_before_it_is_refused() -> None:
    with pytest.raises(ExportError, match=r"block 1 \(layers\.1\) does not depend on the blocks before it"):
        cut_graph({0: ADD, 1: "r{i} = Add(s{i}, layers.{i}.bias)"})


def test_random_numbers_are_refused() -> None:
    with pytest.raises(ExportError, match=r"\(RandomNormalLike\) draws random numbers"):
        cut_graph({0: "r{i} = RandomNormalLike(h{i})"})
