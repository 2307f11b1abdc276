"""Verifying engines on GPUs: each stage against ONNX Runtime in float32, with ONNX Runtime's values as inputs.

Without a GPU, the stages lowered for TensorRT can run on the CPU instead, each value rounded to its type. A token's
error is a fraction of how large ONNX Runtime's values are (stageline.exporter.verify.scale). 9 of 10 tokens must be
within the tolerance: a few are beyond any half precision. In SmolLM2 torch itself, in bfloat16, is off by more than a
token's largest value at some (benchmarks/tensorrt_precision.py).

If weights are quantised, an engine is compared with the same stage and the same weights, computed in float32. What
quantising itself changes is shown, and not judged.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir
from stageline.exporter.verify.random_inputs import random_inputs
from stageline.exporter.verify.scale import token_errors
from stageline.models.errors import EngineError
from stageline.runtime.builder.emulate import EmulatedStage
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.signature import Signature
from stageline.runtime.devices import open_devices
from stageline.runtime.devices.base import on_host
from stageline.runtime.devices.cpu import CpuDevice, allowed_cores
from stageline.runtime.engines import Array, Device, Engine, StageFile, engine_factory
from stageline.runtime.engines.tensorrt.engine import open_tensorrt
from stageline.runtime.engines.tensorrt.guard import checked_engine
from stageline.runtime.engines.tensorrt.lower import (
    QUANTISED,
    Precision,
    computed_precision,
    default_precision,
    float32_nodes,
    lower,
    lower_exactly,
)
from stageline.runtime.engines.tensorrt.targets import gpu_here

TOLERANCE: dict[Precision, float] = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 6e-2}
"""By what is computed in. float32 leaves room for TF32 products, the halves for 11 and 8 bits at every operator."""
_SHARE = 0.9  # of the tokens must be within the tolerance
Progress = Callable[[str], None]
Shown = Literal["inside", "quantised"]


@dataclass(frozen=True)
class EngineComparison:
    """One value of one stage. The errors are those of its tokens: the median, the largest of the better nine tenths,
    the largest."""

    stage: int
    value: str
    precision: Precision
    median_error: float
    p90_error: float
    max_error: float
    tolerance: float
    shown: Shown | None = None
    """Why the value is only shown and not judged: it does not leave the stage, or the error is what quantised weights
    add."""

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance, and no value is infinite or NaN that should not be."""
        finite = self.max_error < np.inf
        return self.shown is not None or (finite and self.p90_error <= self.tolerance)


def verify_engines(path: Path, precision: Precision | None, *, seed: int, progress: Progress) -> list[EngineComparison]:
    """Compare the TensorRT engines that fit this machine's GPU, of `precision` (None: the last built), on inputs drawn
    from `seed`.

    EngineError if there is no GPU, or no engine for it.
    """
    gpu = gpu_here()
    if gpu is None:
        raise EngineError(
            "verifying TensorRT engines runs them: it needs an NVIDIA GPU with a driver, and this machine has none; "
            "--emulated compares the lowered stages on the CPU"
        )
    bundle = Bundle.open(path)

    def opened(file: StageFile, device: Device) -> tuple[Engine, Precision]:
        record = checked_engine(bundle, file.number, gpu, precision).record
        return open_tensorrt(file, device, precision=precision), record.precision

    return _on_gpu(bundle, opened, seed, progress)


def verify_cuda(path: Path, *, seed: int, progress: Progress) -> list[EngineComparison]:
    """Compare the stages in ONNX Runtime on the first GPU, on inputs drawn from `seed`. They are judged as engines that
    compute in the bundle's type, and in float16 where attention with a cache does.

    EngineError if there is no GPU, or ONNX Runtime does not use it.
    """
    bundle = Bundle.open(path)
    halves: dict[str, Precision] = {"float16": "fp16", "bfloat16": "bf16"}
    computes = halves.get(bundle.manifest.dtype, "fp16" if bundle.manifest.cached else "fp32")
    factory = engine_factory("onnxruntime-cuda")
    return _on_gpu(bundle, lambda file, device: (factory(file, device), computes), seed, progress)


def _on_gpu(
    bundle: Bundle, opened: Callable[[StageFile, Device], tuple[Engine, Precision]], seed: int, progress: Progress
) -> list[EngineComparison]:
    """Compare each stage, `opened` on the first GPU together with the precision that it is judged by."""
    comparisons = []
    for fed in reference(bundle, seed):
        progress(f"stage {fed.file.number + 1} of {len(bundle.manifest.stages)}")
        (device,) = open_devices(["cuda:0"], None)
        try:
            engine, precision = opened(fed.file, device)
            try:
                got = on_host(engine.run(fed.inputs, list(fed.outputs)), list(fed.outputs))
            finally:
                engine.close()
        finally:
            device.close()
        comparisons += _judged(fed, precision, got, _exactly(fed, precision))
    return comparisons


def verify_emulated(
    path: Path, precision: Precision | None, *, layers: bool, seed: int, progress: Progress
) -> list[EngineComparison]:
    """Compare the stages as lowered for `precision` (None: the bundle's default), run on the CPU, on inputs drawn from
    `seed`. With `layers` every value inside them is compared as well, with the same value of the stage lowered for
    float32."""
    comparisons = []
    bundle = Bundle.open(path)
    precision = precision or default_precision(bundle.manifest.dtype)
    for fed in reference(bundle, seed):
        number = fed.file.number
        progress(f"stage {number + 1} of {len(bundle.manifest.stages)}")
        wide = float32_nodes(bundle.manifest, precision)
        lowered = lower(fed.file, precision, fed.length, stripped=False, wide=wide)
        inside: list[str] = []
        if layers:
            exact = lower_exactly(fed.file, precision, fed.length)
            inside = sorted((floats_of(lowered.proto) & floats_of(exact.proto)) - set(fed.outputs))
        got = EmulatedStage(lowered, fed.rows, fed.length, inside).run(fed.inputs)
        exactly = _exactly(fed, precision, inside)
        comparisons += _judged(fed, precision, got, exactly)
        comparisons += [
            fed.compared(name, precision, got[name], exactly[name], "inside")
            for name in inside
            if got[name].ndim and got[name].size
        ]
    return comparisons


def _exactly(fed: "FedStage", precision: Precision, inside: Sequence[str] = ()) -> Mapping[str, Array]:
    """The stage's outputs in float32 with the weights of `precision`, and the values `inside` it."""
    if not inside and precision not in QUANTISED:
        return fed.outputs
    lowered = lower_exactly(fed.file, precision, fed.length)
    return EmulatedStage(lowered, fed.rows, fed.length, inside).run(fed.inputs)


def _judged(
    fed: "FedStage", precision: Precision, got: Mapping[str, Array], exactly: Mapping[str, Array]
) -> list[EngineComparison]:
    """Outputs against ONNX Runtime's; those of quantised weights against `exactly`, and then what quantising adds."""
    judged = fed.outputs if precision not in QUANTISED else exactly
    comparisons = [fed.compared(name, precision, got[name], judged[name]) for name in fed.outputs]
    if precision in QUANTISED:
        comparisons += [fed.compared(n, precision, got[n], want, "quantised") for n, want in fed.outputs.items()]
    return comparisons


def compare(
    stage: int,
    name: str,
    precision: Precision,
    activations: str,
    got: Array,
    want: Array,
    real: Array | None,
    shown: Shown | None = None,
) -> EngineComparison:
    """Judge one value of an engine of `precision`, of a bundle with `activations`: [rows, length, ...] without the
    places where `real` is 0. NaN counts as an infinite error."""
    if real is not None and want.shape[:2] == real.shape:
        got, want = got[real == 1], want[real == 1]
    errors = token_errors(got, want)
    p90 = float(np.quantile(errors, _SHARE, method="lower"))
    tolerance = TOLERANCE[computed_precision(precision, activations)]
    return EngineComparison(
        stage, name, precision, float(np.median(errors)), p90, float(errors.max()), tolerance, shown
    )


@dataclass(frozen=True)
class FedStage:
    """A stage, its inputs, and ONNX Runtime's outputs for them in float32. `real` [rows, length] is 0 at padding."""

    file: StageFile
    inputs: dict[str, Array]
    outputs: dict[str, Array]
    real: Array | None
    rows: int
    activations: str

    @property
    def length(self) -> int:
        """Tokens in a row."""
        return next((array.shape[1] for array in self.inputs.values() if array.ndim == 2), 1)

    def compared(
        self, name: str, precision: Precision, got: Array, want: Array, shown: Shown | None = None
    ) -> EngineComparison:
        """One of its values, as an engine of `precision` has it."""
        return compare(self.file.number, name, precision, self.activations, got, want, self.real, shown)


def reference(bundle: Bundle, seed: int) -> list[FedStage]:
    """Every stage with inputs drawn from `seed`: those of a stage are the outputs of the ones before it."""
    inputs = random_inputs(bundle.manifest, seed)
    values = Signature.of(bundle.manifest).check_inputs(inputs)[0]
    result = []
    for number, stage in enumerate(bundle.manifest.stages):
        file = StageFile(number, bundle.path / stage.file, bundle.path, stage.caches)
        names = [spec.name for spec in stage.outputs]
        engine = engine_factory("onnxruntime")(file, CpuDevice(allowed_cores()), None, bundle.manifest.exact)
        try:
            outputs = on_host(engine.run(values, names), names)
        finally:
            engine.close()
        rows = len(next(iter(inputs.values())))
        result.append(FedStage(file, dict(values), outputs, inputs.get("attention_mask"), rows, bundle.manifest.dtype))
        values.update(outputs)
    return result


def floats_of(proto: bytes) -> set[str]:
    """The floating values that a lowered graph computes."""
    graph = ir.from_proto(onnx.ModelProto.FromString(proto)).graph
    found = {str(v.name) for node in graph for v in node.outputs if v.dtype is not None and v.dtype.is_floating_point()}
    return {name for name in found if not name.endswith(".present")}
