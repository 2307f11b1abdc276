"""The command lines that run, inspect, reduce and build an ejected stage, and the page that explains them."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stageline.exporter.eject.samples import Sample
from stageline.exporter.verify.scale import typical
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.engines import Array
from stageline.runtime.engines.tensorrt.lower import Lowered, Precision

_TOLERANCE: Mapping[Precision, float] = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 6e-2}
"""Of an output's typical magnitude, and of each value."""
_HALVES_STAT = ["--check-error-stat", "quantile", "--error-quantile", "0.9"]  # some tokens are beyond any half


@dataclass(frozen=True)
class Lines:
    """Command lines for one stage, to be run in its folder. `tensorrt` is None for a stage with caches, since TensorRT
    updates those in place and Polygraphy's runner gives each output memory of its own."""

    onnxruntime: str
    inspect: str
    reduce: str
    trtexec: str
    tensorrt: str | None


def lines_of(name: str, lowered: Lowered, samples: Sequence[Sample], precision: Precision) -> Lines:
    """The lines for the stage in `name`.onnx, with the sizes of its first sample and the tolerances of `precision`."""
    model, first = f"{name}.onnx", samples[0]
    loaded = ["--load-inputs", f"{name}.inputs.json", "--load-outputs", f"{name}.outputs.json"]
    judged = [*loaded, *_tolerances(lowered, first.outputs, precision)]
    shapes = {key: (_least(lowered, key, array), array.shape) for key, array in first.inputs.items()}
    ranges = [
        word
        for kind, place in (("min", 0), ("opt", 1), ("max", 1))
        for word in (f"--trt-{kind}-shapes", *(f"{key}:{list(pair[place])}" for key, pair in shapes.items()))
    ]
    profile = [
        f"--{kind}Shapes=" + ",".join(f"{key}:{'x'.join(map(str, pair[place]))}" for key, pair in shapes.items())
        for kind, place in (("min", 0), ("opt", 1), ("max", 1))
    ]
    build_only = ["--skipInference"] if lowered.caches else []
    check = ["--check", "polygraphy", "run", "polygraphy_debug.onnx", "--onnxrt", "--load-inputs"]
    return Lines(
        onnxruntime=shlex.join(["polygraphy", "run", model, "--onnxrt", *judged]),
        inspect=shlex.join(["polygraphy", "inspect", "model", model, "--show", "layers"]),
        reduce=shlex.join(
            ["polygraphy", "debug", "reduce", model, "-o", f"{name}.reduced.onnx", "--mode", "bisect"]
            + ["--load-inputs", f"{name}.inputs.json", *check, f"{name}.inputs.json"]
        ),
        trtexec=shlex.join(
            ["trtexec", f"--onnx={model}", "--stronglyTyped", *profile, *build_only, f"--saveEngine={name}.plan"]
        ),
        tensorrt=None
        if lowered.caches
        else shlex.join(["polygraphy", "run", model, "--trt", "--strongly-typed", *ranges, *judged]),
    )


def _tolerances(lowered: Lowered, outputs: Mapping[str, Array], precision: Precision) -> list[str]:
    """Polygraphy's options: tolerances in proportion to how large each output is; all caches have one."""
    part = _TOLERANCE[precision]
    named = {spec.name for spec in lowered.outputs}
    scales = {name: typical(array[array.any(-1)]) for name, array in outputs.items()}  # without empty places of caches
    caches = [scale for name, scale in scales.items() if name not in named]
    each = [f"{name}:{part * scale:.2g}" for name, scale in scales.items() if name in named]
    rest = [f"{part * max(caches):.2g}"] if caches else []
    return ["--rtol", f"{part:g}", "--atol", *rest, *each, *([] if precision == "fp32" else _HALVES_STAT)]


def _least(lowered: Lowered, name: str, array: Array) -> tuple[int, ...]:
    """The smallest shape of an input: 1 for each free dimension."""
    for spec in lowered.inputs:
        if spec.name == name:
            return tuple(1 if isinstance(size, str) else size for size in spec.shape)
    return (1, *array.shape[1:])  # a cache


def readme(bundle: Bundle, precision: Precision, stages: Sequence[Lines]) -> str:
    """README.md of the folder."""
    manifest = bundle.manifest
    text = [
        f"# {bundle.path.name}: {manifest.architecture}, {manifest.task}, computed in {precision}",
        "",
        "Each stage is an ONNX model (`stageN.onnx`, weights in `stageN.weights`) as TensorRT gets it from",
        "`stageline build`. `stageN.inputs.json` are two samples; a stage's inputs are the outputs of those before it.",
        "`stageN.outputs.json` are what ONNX Runtime computes for them from the bundle, in float32 on CPU cores. Run",
        "the lines in this folder.",
    ]
    if precision == "bf16":
        text += ["", "ONNX Runtime has no bfloat16 kernels for CPUs: the lines with --onnxrt need the precision fp32."]
    for number, lines in enumerate(stages):
        text += ["", f"## Stage {number}"]
        for title, line in (
            ("Compare ONNX Runtime with the expected outputs", lines.onnxruntime),
            ("List the nodes", lines.inspect),
            ("Find the smallest model that still fails in ONNX Runtime", lines.reduce),
            ("Compare TensorRT with the expected outputs", lines.tensorrt),
            ("Build with TensorRT, and time it unless there are caches", lines.trtexec),
        ):
            if line is not None:
                text += ["", f"{title}:", "", f"    {line}"]
    return "\n".join([*text, ""])
