"""Cutting the marked graph into parts: a prologue, one graph for each distinct kind of block, an epilogue.

Every value has a level: it depends on constants only, on the sizes of dimensions, on the model's inputs (then it is
computed once, in the prologue, and shared), or on the hidden state (then it belongs to the block that needs it).
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass
from stageline.exporter.blocks import Call
from stageline.exporter.fuse import fuse_rotary
from stageline.exporter.trace import MARK, Trace
from stageline.models.errors import ExportError
from stageline.runtime.bundle.graph import size_read
from stageline.runtime.bundle.manifest import TensorSpec, Use

CONSTANT, SIZES, SHARED, CHAIN = range(4)
# Operators on sizes whose result is a scalar or a short list of sizes, so that repeating them in a block costs nothing.
_SIZE_OPERATORS = frozenset(
    {
        "Squeeze", "Unsqueeze", "Reshape", "Concat", "Cast", "CastLike", "Add", "Sub", "Mul", "Div", "Gather", "Slice",
        "Max", "Min", "Neg", "Identity", "Mod",
    }
)  # fmt: skip


class NotProvenError(Exception):
    """Two blocks that look alike have different graphs, so all blocks must be traced."""


@dataclass(frozen=True)
class PartGraph:
    """One part: its graph, and the specs of the graph's inputs (activations, then weights) and outputs."""

    model: ir.Model
    inputs: tuple[TensorSpec, ...]
    weights: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class _Region:
    """A region of the marked graph: its nodes in order, and what it reads, binds and computes."""

    nodes: list[ir.Node]
    reads: list[ir.Value]
    weights: list[ir.Value]
    outputs: list[ir.Value]


def cut(
    trace: Trace, stack: list[Call], kinds: list[int], weight_names: frozenset[str]
) -> tuple[tuple[PartGraph, ...], list[Use]]:
    """The distinct parts of the trace, and the model as a chain of uses of them: prologue, blocks, epilogue.

    `weight_names` are the initializers that come from the checkpoint; all others are constants. NotProvenError if
    stamping is not proven; ExportError if the graph cannot be cut at all.
    """
    model = trace.model
    _share(model, stack)
    graph = model.graph
    marks = {node.attributes["tag"].as_string(): node for node in graph if (node.domain, node.op_type) == MARK}
    ends = {node.outputs[0] for tag, node in marks.items() if tag.startswith("out.")}
    names: dict[ir.Value, str] = {value: str(value.name) for value in graph.inputs}
    real = sorted(trace.real)
    results: dict[int, list[ir.Value]] = {}
    for index in real:
        outputs = [marks[tag].outputs[0] for tag in marks if tag.startswith(f"out.{index}.")]
        results[index] = [value for value in outputs if value.uses()] or outputs[:1]
        if len(results[index]) > 1 and len(real) < len(stack):
            raise NotProvenError(f"block {index} passes on {len(results[index])} tensors")
        for position, value in enumerate(results[index]):
            names[value] = f"hidden.{index + 1}" if position == 0 else f"extra.{index + 1}.{position}"
    unread = [index for index in real if f"in.{index}.{stack[index].chain or 0}" not in marks]
    if 0 in unread:  # what only an unread hidden state needed was removed from the graph
        raise _no_chain(unread[-1], stack)
    hidden = marks[f"in.0.{stack[0].chain or 0}"].inputs[0]
    assert hidden is not None
    free = {d.value for d in hidden.shape or () if isinstance(d, ir.SymbolicDim)}
    level = _levels(graph, free, _own_weights(stack, weight_names))
    cutter = _Cutter(level, ends, weight_names)
    blocks = {index: cutter.region(results[index]) for index in real}
    epilogue = cutter.region(list(graph.outputs), through=False)
    names.setdefault(hidden, "hidden.0")
    shared = [v for region in (*blocks.values(), epilogue) for v in region.reads if v not in ends]
    for value in shared:
        names.setdefault(value, f"shared.{sum(n.startswith('shared.') for n in names.values())}")
    inputs = set(graph.inputs)
    prologue = cutter.prologue([v for v in dict.fromkeys(shared) if v not in inputs])
    _check_chain(blocks, ends, stack)
    parts = _Parts(model, names)
    uses = [
        parts.use(prologue, "prologue"),
        *_block_uses(parts, stack, kinds, blocks),
        parts.use(epilogue, "epilogue", writes=[str(value.name) for value in graph.outputs]),
    ]
    return tuple(parts.parts.values()), uses


def _share(model: ir.Model, stack: list[Call]) -> None:
    """Remove the markers of what the blocks share, so that what they compute from it alone is computed once."""
    for node in list(model.graph):
        if (node.domain, node.op_type) != MARK:
            continue
        side, block, leaf = node.attributes["tag"].as_string().split(".")
        if side == "in" and stack[int(block)].chain not in (None, int(leaf)):
            assert node.inputs[0] is not None
            ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
            model.graph.remove(node, safe=True)
    fuse_rotary(model)
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)


def _own_weights(stack: list[Call], weight_names: frozenset[str]) -> frozenset[str]:
    """The weights of blocks. What is computed with them belongs to a block and is never hoisted, even if no hidden
    state takes part (DeBERTa projects its table of relative positions in each block)."""
    prefixes = tuple({call.module + "." for call in stack})
    return frozenset(name for name in weight_names if name.startswith(prefixes))


def _levels(graph: ir.Graph, free: set[str | None], own_weights: frozenset[str]) -> dict[ir.Value, int]:
    """What each value depends on; see the module's first lines."""
    level: dict[ir.Value, int] = dict.fromkeys(graph.inputs, SHARED)
    for name, value in graph.initializers.items():
        level[value] = CHAIN if name in own_weights else CONSTANT
    for node in graph:
        if any(
            attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            for attribute in node.attributes.values()
        ):
            raise ExportError(
                f"operator {node.name} ({node.op_type}) holds a graph of its own; blocks with control flow "
                "cannot be cut"
            )
        if node.op_type.startswith("Random") or node.op_type in ("Bernoulli", "Multinomial"):
            raise ExportError(
                f"operator {node.name} ({node.op_type}) draws random numbers, so no two runs of the model agree; "
                "export a model that does not"
            )
        if (node.domain, node.op_type) == MARK:
            mine = CHAIN
        else:
            mine = max((level[v] for v in node.inputs if v is not None), default=CONSTANT)
            if (mine == SHARED and size_read(node) in free and size_read(node) is not None) or (
                mine == SIZES and node.op_type in _SIZE_OPERATORS
            ):
                mine = SIZES
            elif mine == SIZES:
                mine = SHARED
        for value in node.outputs:
            level[value] = mine
    return level


class _Cutter:
    """Collects the region of the graph that computes wanted values."""

    def __init__(self, level: dict[ir.Value, int], ends: set[ir.Value], weights: frozenset[str]):
        self.level, self.ends, self.weight_names = level, ends, weights

    def region(self, outputs: list[ir.Value], through: bool = True) -> _Region:
        """A block or the epilogue: stops at the blocks before it and at shared values. `through` is False if an output
        may itself be a block's result (an epilogue that does nothing)."""

        def is_read(value: ir.Value) -> bool:
            if value in self.ends:
                return not (through and value in wanted)
            return self.level[value] == SHARED and value.dtype is not None and value.shape is not None

        wanted = set(outputs)
        return self._collect(outputs, is_read, sizes=True)

    def prologue(self, outputs: list[ir.Value]) -> _Region:
        """Everything that the shared values need."""
        return self._collect(outputs, lambda value: False, sizes=False)

    def _collect(self, outputs: list[ir.Value], is_read: Callable[[ir.Value], bool], sizes: bool) -> _Region:
        """Walk from `outputs` to what `is_read`, to graph inputs and initializers. With `sizes` a node that reads the
        size of a dimension needs nothing: any tensor of the region will have it."""
        nodes: dict[ir.Node, None] = {}
        reads: dict[ir.Value, None] = {}
        weights: dict[ir.Value, None] = {}

        def visit(value: ir.Value) -> None:
            node = value.producer()
            if value.is_initializer():
                if value.name in self.weight_names:
                    weights[value] = None
            elif node is None or is_read(value):
                reads[value] = None
            elif node not in nodes:
                if not (sizes and self.level[value] == SIZES and size_read(node) is not None):
                    for source in node.inputs:
                        if source is not None:
                            visit(source)
                nodes[node] = None

        for value in outputs:
            visit(value)
        return _Region(list(nodes), list(reads), list(weights), outputs)


def _check_chain(blocks: dict[int, _Region], ends: set[ir.Value], stack: list[Call]) -> None:
    for index, region in blocks.items():
        if index and not any(value in ends for value in region.reads):
            raise _no_chain(index, stack)


def _no_chain(index: int, stack: list[Call]) -> ExportError:
    return ExportError(
        f"block {index} ({stack[index].module}) does not depend on the blocks before it; looked for a hidden state "
        "that runs through all blocks and did not find one"
    )


def _spec(value: ir.Value, name: str) -> TensorSpec:
    if value.dtype is None or value.shape is None:
        raise ExportError(f"value {value.name} crosses a cut, but has no type or shape in the trace")
    shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
    return TensorSpec(name=name, dtype=np.dtype(value.dtype.numpy()).name, shape=shape)


def _canonical(region: _Region, local: Mapping[ir.Value, str]) -> str:
    """A digest that is equal for two regions exactly when their graphs are the same except the names of values."""
    numbers: dict[ir.Value, str] = {value: f"read{i}" for i, value in enumerate(region.reads)}
    lines = []

    def name(value: ir.Value | None) -> str:
        if value is None:
            return "-"
        if value in numbers:
            return numbers[value]
        if value in local:
            return "weight " + local[value] + str(value.dtype) + str(value.shape)
        if value.const_value is None:
            raise ExportError(
                f"{value.name} is a tensor that the model keeps from an earlier call; a model with memory cannot be cut"
            )
        return "constant " + _constant(value.const_value)

    for count, node in enumerate(region.nodes):
        attributes = []
        for key in sorted(node.attributes):
            attribute = node.attributes[key]
            if key == "tag" and (node.domain, node.op_type) == MARK:
                continue
            plain = attribute.type != ir.AttributeType.TENSOR
            attributes.append(f"{key}={attribute.value if plain else _constant(attribute.as_tensor())}")
        size = size_read(node)
        inputs = [f"size {size}"] if size is not None else [name(v) for v in node.inputs]
        lines.append(f"{node.domain}:{node.op_type}({', '.join(inputs)}){attributes}")
        for i, value in enumerate(node.outputs):
            numbers[value] = f"node{count}.{i}"
    lines.append(str([numbers[v] for v in region.outputs]))
    lines.append(str([(str(v.dtype), str(v.shape)) for v in region.reads]))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _constant(tensor: ir.TensorProtocol) -> str:
    return f"{tensor.dtype}{tuple(tensor.shape)}{hashlib.sha256(tensor.tobytes()).hexdigest()}"


def _local_weights(region: _Region, module: str) -> dict[ir.Value, str]:
    """Names of a region's weights, relative to its module if they belong to it."""
    prefix = module + "."
    return {
        v: str(v.name).removeprefix(prefix) if str(v.name).startswith(prefix) else "/" + str(v.name)
        for v in region.weights
    }


class _Parts:
    """Collects the distinct part graphs. `names` are the whole model's names of the values that cross cuts."""

    def __init__(self, source: ir.Model, names: Mapping[ir.Value, str]):
        self.source, self.names = source, names
        self.parts: dict[str, PartGraph] = {}  # by digest

    def use(self, region: _Region, label: str, call: Call | None = None, writes: Sequence[str] = ()) -> Use:
        """The region as a use of a part, new or known: two uses have one part if their graphs are equal."""
        local = _local_weights(region, call.module if call else "")
        digest = _canonical(region, local)
        if digest not in self.parts:
            self.parts[digest] = PartGraph(
                _graph(region, local, label, self.source),
                inputs=tuple(_spec(v, f"in{i}") for i, v in enumerate(region.reads)),
                weights=tuple(_spec(v, local[v]) for v in region.weights),
                outputs=tuple(_spec(v, f"out{i}") for i, v in enumerate(region.outputs)),
            )
        return Use(
            part=list(self.parts).index(digest),
            reads={f"in{i}": self.names[v] for i, v in enumerate(region.reads)},
            writes={f"out{i}": name for i, name in enumerate(writes or [self.names[v] for v in region.outputs])},
            weights={local[v]: str(v.name) for v in region.weights},
            module=call.module if call else "",
            call=call.count if call else 0,
        )


def _block_uses(parts: _Parts, stack: list[Call], kinds: list[int], blocks: Mapping[int, _Region]) -> list[Use]:
    """A use for each block: of those in `blocks` their own, of the others that of the first block of their kind.

    NotProvenError if blocks were left out and two traced ones of a kind differ.
    """
    traced = {index: parts.use(region, f"block-{index}", stack[index]) for index, region in sorted(blocks.items())}
    if len(traced) == len(stack):
        return list(traced.values())
    for index, use in traced.items():
        first = traced[kinds[index]]
        if (use.part, _led(use, 0).reads) != (first.part, _led(first, 0).reads):
            raise NotProvenError(f"blocks {kinds[index]} and {index} look alike but their graphs differ")
    # The hidden state skipped the blocks that were left out; lead it through every block in order.
    uses = []
    for index, call in enumerate(stack):
        kind = kinds[index]
        use = traced[index] if index in traced else _stamped(traced[kind], stack[kind].module, call, index)
        uses.append(_led(use, index))
    return uses


def _led(use: Use, index: int) -> Use:
    """The use, reading the hidden state that block `index` reads."""
    reads = {k: f"hidden.{index}" if v.startswith("hidden.") else v for k, v in use.reads.items()}
    return use.model_copy(update={"reads": reads})


def _stamped(use: Use, module: str, call: Call, index: int) -> Use:
    """The use of a block in `module` moved to block `index`, which is `call`."""
    prefix = module + "."
    return Use(
        part=use.part,
        reads=use.reads,
        writes=dict.fromkeys(use.writes, f"hidden.{index + 1}"),
        weights={
            k: call.module + "." + v.removeprefix(prefix) if v.startswith(prefix) else v for k, v in use.weights.items()
        },
        module=call.module,
        call=call.count,
    )


def _graph(region: _Region, local: Mapping[ir.Value, str], label: str, source: ir.Model) -> ir.Model:
    """A region as a model of its own: inputs in0, in1, ..., then its weights under their local names."""
    new: dict[ir.Value, ir.Value] = {}
    inputs: list[ir.Value] = []
    for i, value in enumerate(region.reads):
        new[value] = _border(value, f"in{i}")
        inputs.append(new[value])
    for value in region.weights:
        new[value] = _border(value, local[value])
        inputs.append(new[value])
    constants: list[ir.Value] = []
    nodes = []
    for node in region.nodes:
        size = size_read(node)
        if size is not None and node.inputs[0] not in new:
            nodes.append(_size_of(node, size, region.reads, new))
            continue
        mapped: list[ir.Value | None] = []
        for read in node.inputs:
            if read is not None and read not in new:
                new[read] = ir.Value(name=read.name, shape=read.shape, type=read.type, const_value=read.const_value)
                constants.append(new[read])
            mapped.append(None if read is None else new[read])
        if (node.domain, node.op_type) == MARK:
            copy = ir.node("Identity", mapped)
        else:
            copy = ir.Node(
                node.domain, node.op_type, mapped, list(node.attributes.values()), num_outputs=len(node.outputs)
            )
        copy.name = node.name
        for old, value in zip(node.outputs, copy.outputs, strict=True):
            value.name, value.type, value.shape = old.name, old.type, old.shape
            new[old] = value
        nodes.append(copy)
    outputs = []
    for i, value in enumerate(region.outputs):
        end = ir.node("Identity", [new[value]])
        end.outputs[0].name, end.outputs[0].type, end.outputs[0].shape = f"out{i}", value.type, value.shape
        nodes.append(end)
        outputs.append(end.outputs[0])
    graph = ir.Graph(
        inputs, outputs, nodes=nodes, initializers=constants, opset_imports=dict(source.graph.opset_imports), name=label
    )
    if not any(node.domain == MARK[0] for node in nodes):
        graph.opset_imports.pop(MARK[0], None)
    return ir.Model(graph, ir_version=source.ir_version, producer_name="stageline")


def _border(value: ir.Value, name: str) -> ir.Value:
    return ir.Value(name=name, shape=value.shape, type=value.type)


def _size_of(node: ir.Node, size: str, reads: list[ir.Value], new: dict[ir.Value, ir.Value]) -> ir.Node:
    """A Shape node that reads the same size from a tensor that the region has."""
    for value in reads:
        for axis, dimension in enumerate(value.shape or ()):
            if isinstance(dimension, ir.SymbolicDim) and dimension.value == size:
                copy = ir.node("Shape", [new[value]], {"start": axis, "end": axis + 1})
                copy.outputs[0].name, copy.outputs[0].type = node.outputs[0].name, ir.TensorType(ir.DataType.INT64)
                new[node.outputs[0]] = copy.outputs[0]
                return copy
    raise ExportError(
        f"the size of dimension {size!r} is needed after a cut but no tensor that crosses it has that dimension"
    )
