"""The program that torch.export gives, as torch's ONNX exporter wants it, without tracing it anew.

That exporter runs every program twice more through torch's tracer, to replace what changes tensors in place and what
ONNX has no function for. A model's inference has next to none of either, and the two runs are a fifth to two fifths of
an export's time. A program of plain functions that ONNX has is therefore given to it as it is.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch

_aten = torch.ops.aten
_OF_SIZES = frozenset({operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod,
                       operator.neg, operator.ge, operator.gt, operator.le, operator.lt, operator.eq,
                       operator.ne})  # fmt: skip
_COMPOSITE = frozenset(
    {
        _aten.reshape.default,
        _aten.contiguous.default,
        _aten.flatten.using_ints,
        _aten.chunk.default,
        _aten.expand_as.default,
    }
)  # torch would take them apart, though ONNX has functions for them
_CASTS = frozenset({_aten.to.dtype, _aten.to.device, _aten.to.dtype_layout, _aten.to.other})
_SAME = {_aten.__and__.Tensor: _aten.bitwise_and.Tensor, _aten.__or__.Tensor: _aten.bitwise_or.Tensor}
_CHECKS = frozenset({_aten._assert_tensor_metadata.default, _aten.sym_constrain_range_for_size.default})


def without_retracing(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program, which decomposes itself by rewriting nodes where it is of plain functions; changed in place."""
    by_tracing: Callable[..., torch.export.ExportedProgram] = program.run_decompositions

    def run_decompositions(
        table: dict[torch._ops.OperatorBase, Callable[..., Any]] | None = None, **options: Any
    ) -> torch.export.ExportedProgram:
        if table is None or options or not _is_plain(program.graph_module, table):
            return by_tracing(table, **options)
        _simplify(program.graph_module)
        return program

    program.run_decompositions = run_decompositions
    return program


def _is_plain(graph_module: torch.fx.GraphModule, table: Mapping[Any, Any]) -> bool:
    """Whether nothing in the graph changes a tensor, and nothing has to be replaced by what is in `table`."""
    known = torch.export.default_decompositions()
    allowed = _OF_SIZES | _COMPOSITE | _CASTS | _CHECKS | _SAME.keys()
    for node in graph_module.graph.nodes:
        target = node.target
        if node.op != "call_function" or target in allowed or _does_nothing(node):
            continue
        if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable or target in table:
            return False
        if target._can_decompose() and target not in known:
            return False
    return True


def _does_nothing(node: torch.fx.Node) -> bool:
    """Dropout at inference, and what torch.tensor ends with."""
    return node.target is _aten.detach_.default or (node.target is _aten.dropout.default and not node.args[2])


def _simplify(graph_module: torch.fx.GraphModule) -> None:
    """Take away what does nothing (checks, dropouts, casts to the same type), and write the rest by ONNX's names."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _CHECKS:
            graph.erase_node(node)
        elif node.target in _SAME:
            node.target = _SAME[node.target]
        elif node.target in _CASTS or _does_nothing(node):
            given, dtype = node.args[0], node.meta["val"].dtype
            if given.meta["val"].dtype != dtype:
                node.target, node.args, node.kwargs = _aten._to_copy.default, (given,), {"dtype": dtype}
            elif any(user.op == "output" for user in node.users):  # the program's signature has its name
                node.target, node.args, node.kwargs = _aten.clone.default, (given,), {}
            else:
                node.replace_all_uses_with(given)
                graph.erase_node(node)
    graph.eliminate_dead_code()
    graph_module.recompile()
