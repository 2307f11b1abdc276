"""One trace of the model with its blocks marked, as an ONNX graph without weights.

Each block's arguments and results pass through marker operators, so that the graph shows where a block begins and ends.
Of each kind of block the first and the last are traced; the blocks between are replaced by their input.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import optimizer
from stageline.exporter import exact_constants
from stageline.exporter.blocks import Call
from stageline.exporter.cache_task import CacheTask
from stageline.exporter.failure import reason_of
from stageline.exporter.functional import without_retracing
from stageline.exporter.functions import without_unknown
from stageline.exporter.scan_graph import lower_scans
from stageline.exporter.skeleton import Input, RefusedError, Task
from stageline.models.errors import ExportError
from torch.utils import _pytree

OPSET = 23
MARK = ("stageline", "Mark")


@dataclass(frozen=True)
class Trace:
    """The marked graph, which blocks in it are real, and how many tokens in a row it holds for: beyond `longest` the
    model's code goes another way (None: it does not)."""

    model: ir.Model
    real: frozenset[int]
    longest: int | None


def _mark(tensor: torch.Tensor, tag: str) -> torch.Tensor:
    return torch.onnx.ops.symbolic(
        "::".join(MARK), [tensor], attrs={"tag": tag}, dtype=tensor.dtype, shape=tensor.shape, version=1
    )


def _is_marked(leaf: Any) -> bool:
    """Whether it is a tensor that an ONNX operator can take. Complex ones (Llama 4's rotary embeddings) are shared by
    all blocks, and the marks of what is shared are removed in any case."""
    return isinstance(leaf, torch.Tensor) and not leaf.is_complex()


class _Marks:
    """Replaces the forward of every block by one that marks, or skips, each call."""

    def __init__(self, stack: list[Call], kinds: list[int], real: frozenset[int]):
        self.stack, self.kinds, self.real = stack, kinds, real
        self.at = 0
        self.shape_of_output: dict[int, tuple[list[Any], Any]] = {}

    def __enter__(self) -> "_Marks":
        for call in self.stack:
            if "forward" not in vars(call.block):
                call.block.forward = self._forward(call.block.forward)
        return self

    def __exit__(self, *exception: object) -> None:
        for call in self.stack:
            vars(call.block).pop("forward", None)

    def _forward(self, original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            index = self.at
            self.at += 1
            leaves, spec = _pytree.tree_flatten((args, kwargs))
            if index not in self.real:
                output, output_spec = self.shape_of_output[self.kinds[index]]
                hidden = leaves[self.stack[index].chain or 0]
                return _pytree.tree_unflatten([hidden, *output[1:]], output_spec)
            leaves = [_mark(x, f"in.{index}.{i}") if _is_marked(x) else x for i, x in enumerate(leaves)]
            args, kwargs = _pytree.tree_unflatten(leaves, spec)
            output, output_spec = _pytree.tree_flatten(original(*args, **kwargs))
            output = [_mark(x, f"out.{index}.{i}") if isinstance(x, torch.Tensor) else x for i, x in enumerate(output)]
            self.shape_of_output[index] = (output, output_spec)
            return _pytree.tree_unflatten(output, output_spec)

        return forward


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what torch logs while it traces, which is about its own insides; what goes wrong is raised as well."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def representatives(kinds: list[int]) -> frozenset[int]:
    """The first and the last block of each kind."""
    last = {kind: index for index, kind in enumerate(kinds)}
    return frozenset(kinds) | frozenset(last.values())


def trace(
    task: Task | CacheTask,
    samples: tuple[torch.Tensor, ...],
    stack: list[Call],
    kinds: list[int],
    real: frozenset[int],
    buffers: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> Trace:
    """Trace `task` with blocks marked; those not in `real` are replaced by their input. `buffers` are buffers of the
    task, by name, with the values that they have in float32."""
    free = tuple(
        {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in task.inputs
    )
    with quiet(), _Marks(stack, kinds, real), torch.no_grad(), exact_constants.remembered():
        try:
            program = torch.export.export(task, samples, dynamic_shapes=(free,), strict=False)
            exported = torch.onnx.export(
                without_retracing(without_unknown(program)),
                dynamo=True,
                optimize=False,
                opset_version=OPSET,
                verbose=False,
            )
        except RefusedError:
            raise
        except Exception as error:
            raise ExportError(f"{type(task.model).__name__} cannot be traced: {reason_of(error)}") from error
    assert exported is not None
    model = exported.model
    name_borders(model, task.inputs, task.output_names)
    for initializer in model.graph.initializers.values():
        if isinstance(getattr(initializer.const_value, "raw", None), torch._subclasses.FakeTensor):
            initializer.const_value = None  # the optimiser must not look at data that is not there
    exact_constants.restore(model, buffers)
    with quiet():
        optimizer.optimize_ir(model, num_iterations=2, onnx_shape_inference=False, should_fold=exact_constants.folds)
    lower_scans(model)  # after the optimiser, whose time grows with the square of the number of slices
    return Trace(model, real, _longest(program, task.inputs))


def _longest(program: torch.export.ExportedProgram, inputs: tuple[Input, ...]) -> int | None:
    """The smallest upper bound that the tracer found for the length of an input."""
    nodes = {node.name: node for node in program.graph.nodes}
    bounds = [
        program.range_constraints[size.node.expr].upper
        for name, spec in zip(program.graph_signature.user_inputs, inputs, strict=True)
        for size, dimension in zip(nodes[str(name)].meta["val"].shape, spec.shape, strict=True)
        if dimension == "length" and isinstance(size, torch.SymInt) and size.node.expr in program.range_constraints
    ]
    return min((int(bound) for bound in bounds if bound.is_Integer), default=None)


def name_borders(model: ir.Model, inputs: tuple[Input, ...], outputs: tuple[str, ...]) -> None:
    """Give inputs, outputs and free dimensions their own names in place of the tracer's."""
    symbols: dict[str, str] = {}
    for value, spec in zip(model.graph.inputs, inputs, strict=True):
        value.name = spec.name
        assert value.shape is not None
        for size, name in zip(value.shape, spec.shape, strict=True):
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                symbols[size.value] = str(name)
    for value, name in zip(model.graph.outputs, outputs, strict=True):
        value.name = name
    values = [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape(
                [symbols.get(d.value, d.value) if isinstance(d, ir.SymbolicDim) and d.value else d for d in value.shape]
            )
