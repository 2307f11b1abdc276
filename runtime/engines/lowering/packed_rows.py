"""Look up rows of packed weights (embeddings) without unpacking the whole table: only the rows that are read are."""

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from stageline.models.packing.base import Groups
from stageline.runtime.engines.lowering.packed import Packed


def look_up(model: ir.Model) -> None:
    """Replace each Gather of rows of a packed weight, in place, where its groups divide a row."""
    for node in list(model.graph):
        table = node.inputs[0] if node.op_type == "Gather" and not node.domain else None
        rows = "axis" not in node.attributes or node.attributes["axis"].as_int() == 0
        if table is None or not rows or not isinstance(table.const_value, Packed) or len(table.const_value.shape) != 2:
            continue
        groups = table.const_value.groups()
        if groups is not None and _divides(groups):
            _Lookup(model.graph, node, groups).replace()


def table_bytes(groups: Groups) -> int | None:
    """Bytes of a table whose rows are looked up so; None if it is unpacked."""
    rows, columns = groups.values.shape
    if not _divides(groups):
        return None
    return int(rows * (columns // 2 if _two_in_a_byte(groups) else columns) + 8 * groups.scales.size)


def _divides(groups: Groups) -> bool:
    return groups.order is None and groups.values.shape[1] % groups.group == 0


def _two_in_a_byte(groups: Groups) -> bool:
    return groups.bits <= 4 and groups.values.shape[1] % 2 == 0


class _Lookup:
    """Rows of whole numbers, times their scales, plus their offsets. Numbers of up to four bits lie two in a byte: one
    of the first half of a row, one of the second."""

    def __init__(self, graph: ir.Graph, node: ir.Node, groups: Groups) -> None:
        self.graph, self.node, self.groups, self.made = graph, node, groups, 0
        assert node.inputs[1] is not None
        self.ids: ir.Value = node.inputs[1]

    def replace(self) -> None:
        rows, columns = self.groups.values.shape
        before = [0] * len(self.ids.shape or ())
        grouped = np.array([*before, columns // self.groups.group, self.groups.group], np.int64)
        value = self.add("Reshape", [self.add("Cast", [self.numbers()], to=ir.DataType.FLOAT), self.constant(grouped)])
        for operator, numbers in (("Mul", self.groups.scales), ("Add", self.groups.offsets)):
            value = self.add(operator, [value, self.rows_of(numbers.reshape(rows, -1, 1))])
        whole = self.add("Reshape", [value, self.constant(np.array([*before, columns], np.int64))])
        old = self.node.outputs[0]
        whole.name, whole.shape, whole.type = old.name, old.shape, old.type
        ir.convenience.replace_all_uses_with(old, whole, replace_graph_outputs=True)
        self.graph.remove(self.node, safe=True)

    def numbers(self) -> ir.Value:
        """uint8 [..., columns]"""
        values = self.groups.values
        if not _two_in_a_byte(self.groups):
            return self.rows_of(values)
        half = values.shape[1] // 2
        both = self.rows_of(values[:, :half] | values[:, half:] << 4)
        low = self.add("BitwiseAnd", [both, self.constant(np.array(15, np.uint8))])
        high = self.add("BitShift", [both, self.constant(np.array(4, np.uint8))], direction="RIGHT")
        return self.add("Concat", [low, high], axis=-1)

    def rows_of(self, table: NDArray[Any]) -> ir.Value:
        return self.add("Gather", [self.constant(table), self.ids], axis=0)

    def constant(self, array: NDArray[Any]) -> ir.Value:
        name = f"{self.node.name}.table.{self.count()}"
        data = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(data.dtype), const_value=data)
        self.graph.register_initializer(value)
        return value

    def add(self, operator: str, inputs: list[ir.Value], **attributes: int | str) -> ir.Value:
        """The output of a new operator before the node."""
        new = ir.node(operator, inputs, attributes, name=f"{self.node.name}.{operator.lower()}.{self.count()}")
        new.outputs[0].name = f"{new.name}.out"
        self.graph.insert_before(self.node, new)
        return new.outputs[0]

    def count(self) -> int:
        self.made += 1
        return self.made
