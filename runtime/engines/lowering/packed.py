"""Packed weights where a stage is opened: each becomes an initializer whose values are unpacked when they are read."""

import onnx_ir as ir
from stageline.models.packing import dequantised, groups
from stageline.models.packing.base import Groups
from stageline.models.tensors import PackedEntry, Packing
from stageline.runtime.bundle.packed import DOMAIN, is_dequantise, packing_of, parts_of
from stageline.runtime.engines.base import StageFile
from stageline.runtime.engines.lowering.external import in_file, read_stored


class Packed(ir.LazyTensor):
    """A quantised weight as a tensor of float32. Nothing of it is in memory until `numpy` or `groups` reads it, each
    time anew."""

    __slots__ = ("packing", "parts")

    def __init__(self, name: str, packing: Packing, parts: dict[str, ir.ExternalTensor]) -> None:
        super().__init__(self._read, ir.DataType.FLOAT, ir.Shape(packing.shape), name=name)
        self.packing, self.parts = packing, parts

    @classmethod
    def of(cls, entry: PackedEntry) -> "Packed":
        """A packed weight of a checkpoint or a bundle."""
        return cls(entry.name, entry.packing, {role: in_file(part) for role, part in entry.parts.items()})

    def groups(self) -> Groups | None:
        """The weight as whole numbers in groups; None if it is of another kind."""
        return groups(self.packing, {role: read_stored(part) for role, part in self.parts.items()})

    def _read(self) -> ir.TensorProtocol:
        arrays = {role: read_stored(part) for role, part in self.parts.items()}
        return ir.tensor(dequantised(self.packing, arrays), name=self.name)


def open_stage(stage: StageFile) -> ir.Model:
    """The graph of a stage, its weights where they lie. Packed ones are initializers of float32 (`Packed`), followed by
    a Cast where the graph computes in another type."""
    model = ir.load(stage.file)
    ir.external_data.set_base_dir(model.graph, stage.folder)
    unpack(model)
    return model


def unpack(model: ir.Model) -> None:
    """Put initializers in place of the operators that unpack weights. Each has its parts to itself."""
    graph = model.graph
    for node in [node for node in graph if is_dequantise(node)]:
        value, parts = node.outputs[0], parts_of(node)
        packed = Packed(str(value.name), packing_of(node), {role: _stored(part) for role, part in parts.items()})
        weight = ir.Value(name=value.name, shape=value.shape, type=ir.TensorType(packed.dtype), const_value=packed)
        value.name = f"{weight.name}.unpacked"
        graph.register_initializer(weight)
        wanted = weight
        if value.dtype is not None and value.dtype != packed.dtype:
            cast = ir.node("Cast", [weight], {"to": value.dtype})
            wanted = cast.outputs[0]
            wanted.name, wanted.shape, wanted.type = (
                f"{weight.name}.{value.dtype.name.lower()}",
                value.shape,
                value.type,
            )
            graph.insert_before(node, cast)
        ir.convenience.replace_all_uses_with(value, wanted, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        for part in parts.values():
            del graph.initializers[str(part.name)]
    if not any(node.domain == DOMAIN for node in graph):
        graph.opset_imports.pop(DOMAIN, None)


def has_packed(model: ir.Model) -> bool:
    """Whether the model has packed weights, as initializers."""
    return any(isinstance(value.const_value, Packed) for value in model.graph.initializers.values())


def _stored(part: ir.Value) -> ir.ExternalTensor:
    assert isinstance(part.const_value, ir.ExternalTensor)
    return part.const_value
