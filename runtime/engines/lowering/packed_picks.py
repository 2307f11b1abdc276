"""Let `logits_at` name packed tokens: [picks, 1], of all that there are, in place of tokens of each row."""

import onnx_ir as ir
from stageline.runtime.bundle.manifest import LOGITS_AT, PICKS


def pick_tokens(graph: ir.Graph) -> None:
    """Rewrite a graph whose rows are tokens: what it gathers along its length it gathers along its rows."""
    picks = next((value for value in graph.inputs if value.name == LOGITS_AT), None)
    if picks is None:
        return
    for node in list(graph):
        if node.op_type == "GatherElements" and _depends_on(node.inputs[1], picks):
            _pick(graph, node, picks)
    picks.shape = ir.Shape([PICKS, 1])
    for value in graph.outputs:
        _, *dims = value.shape or [None]
        if any(str(size) == PICKS for size in dims):
            value.shape = ir.Shape([PICKS, *(1 if str(size) == PICKS else size for size in dims)])


def _pick(graph: ir.Graph, node: ir.Node, picks: ir.Value) -> None:
    """[tokens, 1, width] -> [picks, 1, width]."""
    whole = ir.node("Constant", [], {"value": ir.tensor([-1], dtype=ir.DataType.INT64)})
    flat = ir.node("Reshape", [picks, whole.outputs[0]])
    new = ir.node("Gather", [node.inputs[0], flat.outputs[0]], {"axis": 0})
    for made, name in ((whole, "whole"), (flat, "flat"), (new, "picked")):
        made.name = made.outputs[0].name = f"{node.outputs[0].name}.{name}"
    graph.insert_before(node, [whole, flat, new])
    old, result = node.outputs[0], new.outputs[0]
    result.type = old.type
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _depends_on(value: ir.Value | None, source: ir.Value) -> bool:
    found, todo = set(), [value]
    while todo:
        value = todo.pop()
        if value is None or value in found:
            continue
        if value is source:
            return True
        found.add(value)
        producer = value.producer()
        todo += producer.inputs if producer is not None else ()
    return False
