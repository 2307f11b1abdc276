"""What an engine consists of: from the engine inspector if a driver can load it, else from the network definition."""

import json
from collections import Counter
from typing import Any, Literal

from stageline.runtime.builder.network import Network
from stageline.runtime.bundle.manifest import TensorSpec
from stageline.runtime.engines.tensorrt.lower import Lowered
from stageline.runtime.validation import Data


class Layer(Data):
    """One layer: its kind, and the types and shapes of its outputs (-1: free)."""

    name: str
    kind: str
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


class EngineReport(Data):
    """The layers of an engine. If `source` is the network, they are the layers before TensorRT fuses them, and the
    scratch memory of each profile (`memory_bytes`) is not known."""

    source: Literal["engine", "network"]
    layers: tuple[Layer, ...]
    kinds: dict[str, int]
    dtypes: dict[str, int]
    weight_bytes: int
    memory_bytes: tuple[int, ...] | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def of_network(network: Network, lowered: Lowered) -> EngineReport:
    """The report of a parsed network."""
    layers = []
    for place in range(network.definition.num_layers):
        layer = network.definition.get_layer(place)
        outputs = [layer.get_output(at) for at in range(layer.num_outputs)]
        layers.append(
            Layer(
                name=layer.name,
                kind=layer.type.name,
                dtypes=tuple(tensor.dtype.name for tensor in outputs),
                shapes=tuple(tuple(tensor.shape) for tensor in outputs),
            )
        )
    return _report("network", layers, lowered, None)


def of_engine(trt: Any, engine: Any, lowered: Lowered) -> EngineReport:
    """The report of a loaded engine: the layers after fusion, and the memory of each profile."""
    information = json.loads(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))
    layers = []
    for described in information.get("Layers", []):
        if isinstance(described, str):  # built with layer names only
            layers.append(Layer(name=described, kind="", dtypes=(), shapes=()))
            continue
        outputs = described.get("Outputs", [])
        layers.append(
            Layer(
                name=described.get("Name", ""),
                kind=described.get("LayerType", ""),
                # TensorRT 10 says "Row major linear FP16 format" in one field, TensorRT 11 and RTX have two.
                dtypes=tuple(str(out.get("Datatype") or out.get("Format/Datatype", "")) for out in outputs),
                shapes=tuple(tuple(output.get("Dimensions", ())) for output in outputs),
            )
        )
    profiles = range(engine.num_optimization_profiles)
    memory = tuple(int(engine.get_device_memory_size_for_profile_v2(profile)) for profile in profiles)
    return _report("engine", layers, lowered, memory)


def _report(
    source: Literal["engine", "network"], layers: list[Layer], lowered: Lowered, memory: tuple[int, ...] | None
) -> EngineReport:
    return EngineReport(
        source=source,
        layers=tuple(layers),
        kinds=dict(Counter(one.kind for one in layers).most_common()),
        dtypes=dict(Counter(dtype for one in layers for dtype in one.dtypes).most_common()),
        weight_bytes=sum(weight.size_bytes for weight in lowered.weights.values()),
        memory_bytes=memory,
        inputs=lowered.inputs,
        outputs=lowered.outputs,
    )
