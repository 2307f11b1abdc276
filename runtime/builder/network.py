"""From a lowered stage to TensorRT's network definition, and from that to a serialized engine."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from stageline.models.errors import EngineError
from stageline.runtime.builder.profiles import shapes
from stageline.runtime.bundle.manifest import BATCH, CacheSpec, TensorSpec
from stageline.runtime.engines.base import Array
from stageline.runtime.engines.lowering.cache_names import past_names
from stageline.runtime.engines.tensorrt.flavour import started
from stageline.runtime.engines.tensorrt.lower import Lowered
from stageline.runtime.engines.tensorrt.records import OptimizationProfile, Options
from stageline.runtime.engines.tensorrt.targets import HERE, PORTABLE

REVISION = 2
"""Raised when this module builds other engines from the same request: engines of before are then built again."""
Progress = Callable[[str, int, int], bool]
"""Called with a phase, a step and the number of steps; False ends the build."""


@dataclass
class Network:
    """A parsed network. It keeps the weights alive: TensorRT reads these arrays until the engine is built."""

    trt: Any
    logger: Any
    builder: Any
    definition: Any
    parser: Any
    weights: dict[str, Array]


def parse(trt: Any, lowered: Lowered, stripped: bool) -> Network:
    """Parse a lowered stage, strongly typed. EngineError with TensorRT's reason if it refuses."""
    logger = _logger(trt)
    builder = started(trt.Builder, logger, lambda: " ".join(logger.errors[:1]))
    strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    definition = builder.create_network(strongly_typed)
    parser = trt.OnnxParser(definition, logger)
    network = Network(trt, logger, builder, definition, parser, {} if stripped else _read(lowered))
    if not parser.load_model_proto(lowered.proto):
        raise EngineError(f"the parser refuses the graph: {_reason(network)}")
    for name, array in network.weights.items():
        if not parser.load_initializer(name, array.ctypes.data, array.nbytes):
            raise EngineError(f"the parser refuses the weight {name}: {_reason(network)}")
    if not parser.parse_model_proto():
        raise EngineError(_reason(network))
    for layer in _attentions(network):
        layer.attention.decomposable = True  # plain operators if there is no kernel for the type or head size
    return network


def build(
    network: Network,
    lowered: Lowered,
    target: str,
    capacity: int | None,
    profiles: tuple[OptimizationProfile, ...],
    options: Options,
    timings: bytes | None,
    progress: Progress,
) -> tuple[Any, bytes | None]:
    """The serialized engine, a buffer, and the updated timing cache (None if `timings` is None).

    EngineError with TensorRT's reason if it cannot be built.
    """
    trt = network.trt
    config = network.builder.create_builder_config()
    config.builder_optimization_level = options.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or reports would only have names of layers
    config.progress_monitor = _monitor(trt, progress)
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    for flag in _flags(trt, options):
        config.set_flag(getattr(trt.BuilderFlag, flag))
    _set_target(trt, config, target)
    timing_cache = None
    if timings is not None:
        timing_cache = config.create_timing_cache(timings)
        config.set_timing_cache(timing_cache, ignore_mismatch=False)
    inputs = [*lowered.inputs, *(spec for cache in lowered.caches for spec in _pasts(cache, capacity))]
    for profile in profiles:
        made = network.builder.create_optimization_profile()
        for spec in inputs:
            if any(isinstance(size, str) for size in spec.shape):
                made.set_shape(spec.name, *shapes(spec, profile))
        if config.add_optimization_profile(made) < 0:
            raise EngineError(f"TensorRT refuses the profile {profile.name}: {_reason(network)}")
    plan = network.builder.build_serialized_network(network.definition, config)
    if plan is None:
        raise EngineError(_reason(network))
    return plan, bytes(timing_cache.serialize()) if timing_cache is not None else None


def _read(lowered: Lowered) -> dict[str, Array]:
    return {name: _packed(weight.read(), weight.dtype) for name, weight in lowered.weights.items()}


def _packed(array: Array, dtype: ir.DataType) -> Array:
    """The array in TensorRT's layout: two values of 4 bits per byte."""
    return array if dtype.bitwidth >= 8 else np.frombuffer(ir.tensor(array, dtype=dtype).tobytes(), np.uint8)


def _pasts(cache: CacheSpec, capacity: int | None) -> Iterator[TensorSpec]:
    assert capacity is not None
    for name, size in zip(past_names(cache.name), (cache.key_size, cache.value_size), strict=True):
        yield TensorSpec(name=name, dtype="", shape=(BATCH, cache.heads, capacity, size))


def _flags(trt: Any, options: Options) -> Iterator[str]:
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # TensorRT-RTX: or a run may allocate, and not be captured
        yield "REQUIRE_USER_ALLOCATION"
    if options.weight_streaming:
        yield "WEIGHT_STREAMING"
    if options.version_compatible:
        yield "VERSION_COMPATIBLE"


def _set_target(trt: Any, config: Any, target: str) -> None:
    """TensorRT-RTX builds for a named target; TensorRT builds for this GPU and, if portable, for similar ones."""
    if not hasattr(config, "set_compute_capability"):
        if target == PORTABLE:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    elif target not in (PORTABLE, HERE):
        capability = getattr(trt.ComputeCapability, target.upper(), None)
        if capability is None:
            raise EngineError(
                f"TensorRT-RTX {trt.__version__} does not build for {target}; a newer one may: pip install --upgrade "
                "tensorrt-rtx"
            )
        config.num_compute_capabilities = 1
        config.set_compute_capability(capability, 0)


def _attentions(network: Network) -> Iterator[Any]:
    for place in range(network.definition.num_layers):
        layer = network.definition.get_layer(place)
        if layer.type == network.trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = network.trt.IAttentionInputLayer  # the bindings return every layer as a plain ILayer
            yield layer


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)

    return Logger()


def _monitor(trt: Any, progress: Progress) -> Any:
    class ProgressMonitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.steps[phase] = steps
            progress(phase, 0, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            return progress(phase, step + 1, self.steps[phase])

        def phase_finish(self, phase: str) -> None:
            progress(phase, self.steps[phase], self.steps.pop(phase))

    return ProgressMonitor()


def _reason(network: Network) -> str:
    """TensorRT's reason for a failure, in one line."""
    errors = [network.parser.get_error(place) for place in range(network.parser.num_errors)]
    lines = [f"{error.desc()} (at {error.node_name()})" if error.node_name() else error.desc() for error in errors]
    return " ".join((lines or network.logger.errors or ["TensorRT reports no reason"])[0].split())
