"""A stage of two cache attentions and nothing else, of any kind: what lowerings of cache attention are tested with."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from stageline.runtime.bundle.manifest import CacheSpec
from stageline.runtime.engines import Array, StageFile

SLOTS, CAPACITY = 4, 24
LAYERS = 2


@dataclass(frozen=True)
class Kind:
    """One kind of attention, its heads and sizes. `window`: of the first layer; the second one's is one longer."""

    heads: int
    kv_heads: int
    key_size: int
    value_size: int
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False

    @property
    def scale(self) -> float:
        return 1.3 / self.key_size**0.5  # not what an engine takes by itself

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Heads and size of each input of a layer."""
        return {
            "q": (self.heads, self.key_size),
            "k": (self.kv_heads, self.key_size),
            "v": (self.kv_heads, self.value_size),
        }

    def sinks_of(self, layer: int) -> Array:
        return np.random.default_rng(layer).normal(0, 2, self.heads).astype(np.float32)


KINDS = {
    "multi-head": Kind(4, 4, 8, 8),
    "grouped": Kind(4, 2, 16, 16),
    "multi-query": Kind(6, 1, 8, 8),
    "odd sizes": Kind(4, 2, 10, 10),
    "narrow values": Kind(4, 2, 24, 13),
    "wide values": Kind(2, 2, 6, 16),
    "window": Kind(4, 2, 8, 8, window=3),
    "window of one": Kind(4, 2, 8, 8, window=1),
    "softcap": Kind(4, 2, 8, 8, softcap=1.5),
    "sinks": Kind(4, 2, 8, 8, sinks=True),
    "all of them": Kind(6, 2, 12, 9, window=4, softcap=2.0, sinks=True),
}


def attention_stage(kind: Kind, folder: Path) -> StageFile:
    """The stage, saved in `folder`: inputs q0, k0, v0, q1, ... of (batch, heads, length, size), and the rows' lengths;
    outputs y0 and y1, of (batch, length, heads, size)."""

    def value(name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))

    lengths = [value(name, ir.DataType.INT64, "batch") for name in ("past_lengths", "new_lengths")]
    inputs, nodes, outputs, initializers = [*lengths], [], [], []
    for layer in range(LAYERS):
        made = [
            value(f"{name}{layer}", ir.DataType.FLOAT, "batch", heads, "length", size)
            for name, (heads, size) in kind.shapes.items()
        ]
        inputs += made
        read = [*made, *lengths]
        if kind.sinks:
            sink = value(f"sinks{layer}", ir.DataType.FLOAT, kind.heads)
            sink.const_value = ir.tensor(kind.sinks_of(layer), name=sink.name)
            initializers.append(sink)
            read.append(sink)
        attributes: dict[str, float | int | str] = {"scale": kind.scale, "cache": f"layer{layer}"}
        if kind.window is not None:
            attributes["window"] = kind.window + layer
        if kind.softcap is not None:
            attributes["softcap"] = kind.softcap
        output = value(f"y{layer}", ir.DataType.FLOAT, "batch", "length", kind.heads, kind.value_size)
        nodes.append(ir.node("CacheAttention", read, attributes, domain="stageline", outputs=[output]))
        outputs.append(output)
    opsets = {"": 23, "stageline": 1}
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=initializers, opset_imports=opsets, name="stage")
    file = folder / "stage.onnx"
    ir.save(ir.Model(graph, ir_version=10), file)
    sizes = {"heads": kind.kv_heads, "key_size": kind.key_size, "value_size": kind.value_size}
    return StageFile(0, file, folder, tuple(CacheSpec(name=f"layer{n}", **sizes) for n in range(LAYERS)))
