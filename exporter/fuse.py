"""Fusing norms and rotary embeddings, which the trace spells out, into single ONNX operators, in place."""

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules.fusion import _layer_norm, _rms_normalization, _rotary_embedding


def fuse_norms(model: ir.Model) -> None:
    """Rewrite normalisation patterns to the operators of opset 23."""
    rewrite(
        model,
        [
            *_rms_normalization.rms_normalization_ruleset.rules,
            *_layer_norm.layer_normalization_ruleset.rules,
        ],
    )
    RemoveUnusedNodesPass()(model)


def fuse_rotary(model: ir.Model) -> None:
    """Rewrite rotary patterns to RotaryEmbedding. Run it on the whole model, before it is cut: only where a table is
    computed can it be seen that its two halves are equal. The patterns know no casts, so tables in half precision are
    cast again where they are used."""
    tables = _take_casts(model)
    rewrite(model, [*_rotary_embedding.rotary_embedding_rules.rules])
    rewrite(model, [*_rotary_embedding.partial_embedding_rules.rules])
    for node in list(model.graph):
        if node.op_type == "RotaryEmbedding":
            for place in (1, 2):
                _give_rows(model, node, place)
                _give_type(model, node, place)
    for table, dtype in tables.items():
        _cast_uses(model, table, dtype)


def _take_casts(model: ir.Model) -> dict[ir.Value, ir.DataType]:
    """Remove the casts of cosines and sines to half precision. Returns the values that were cast, and to what."""
    tables: dict[ir.Value, ir.DataType] = {}
    for node in list(model.graph):
        source = node.inputs[0].producer() if node.op_type == "Cast" and node.inputs[0] is not None else None
        if source is None or source.op_type not in ("Cos", "Sin") or node.outputs[0].is_graph_output():
            continue
        dtype = ir.DataType(node.attributes["to"].as_int())
        if dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) and len(source.outputs[0].uses()) == 1:
            tables[source.outputs[0]] = dtype
            ir.convenience.replace_all_uses_with(node.outputs[0], source.outputs[0])
            model.graph.remove(node, safe=True)
    return tables


def _give_type(model: ir.Model, node: ir.Node, place: int) -> None:
    """Cast a table to the type of what it turns."""
    table, x = node.inputs[place], node.inputs[0]
    assert table is not None
    assert x is not None
    if x.dtype is None or table.dtype == x.dtype:
        return
    cast = ir.node("Cast", [table], {"to": x.dtype}, name=f"{node.outputs[0].name}.table{place}.cast")
    cast.outputs[0].name, cast.outputs[0].shape = cast.name, table.shape
    cast.outputs[0].type = ir.TensorType(x.dtype)
    model.graph.insert_before(node, cast)
    node.replace_input_with(place, cast.outputs[0])


def _cast_uses(model: ir.Model, table: ir.Value, dtype: ir.DataType) -> None:
    """Let what still reads `table`, and is no rotary embedding, read it in `dtype`."""
    producer = table.producer()
    if producer is None or producer.graph is None or not table.uses():
        return
    cast = ir.node("Cast", [table], {"to": dtype}, name=f"{table.name}.cast")
    cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].type = cast.name, table.shape, ir.TensorType(dtype)
    ir.convenience.replace_all_uses_with(table, cast.outputs[0])
    cast.replace_input_with(0, table)
    model.graph.insert_after(producer, cast)


def _give_rows(model: ir.Model, node: ir.Node, place: int) -> None:
    """Expand a table that all rows share: the operator needs one for each row of the batch."""
    table, x = node.inputs[place], node.inputs[0]
    assert table is not None
    assert x is not None
    assert x.shape is not None
    cosine = table.producer()  # of the angles; the rewriter leaves its type and shape open
    assert cosine is not None
    assert cosine.inputs[0] is not None
    table.shape, table.type = cosine.inputs[0].shape, cosine.inputs[0].type
    if table.shape is None or table.shape[0] != 1:
        return
    source = next((v for v in model.graph.inputs if v.shape is not None and v.shape[0] == x.shape[0]), None)
    if source is None:
        return
    rows = ir.node("Shape", [source], {"start": 0, "end": 1})
    ones = ir.node("Constant", [], {"value": ir.tensor([1, 1], dtype=ir.DataType.INT64)})
    sizes = ir.node("Concat", [rows.outputs[0], ones.outputs[0]], {"axis": 0})
    expand = ir.node("Expand", [table, sizes.outputs[0]])
    for number, new in enumerate((rows, ones, sizes, expand)):
        new.outputs[0].name = f"{node.outputs[0].name}.table{place}.{number}"
        new.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    expand.outputs[0].type = table.type
    expand.outputs[0].shape = ir.Shape([x.shape[0], *list(table.shape)[1:]])
    rows.outputs[0].shape, ones.outputs[0].shape, sizes.outputs[0].shape = ir.Shape([1]), ir.Shape([2]), ir.Shape([3])
    model.graph.insert_before(node, [rows, ones, sizes, expand])
    node.replace_input_with(place, expand.outputs[0])
