"""Running one block of a bundle that is too large to be run whole, as a stage of its own, on random values."""

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from stageline.exporter.verify.random_inputs import drawn_inputs
from stageline.exporter.verify.scale import token_errors
from stageline.models.errors import ExportError
from stageline.runtime import words
from stageline.runtime.bundle.crossing import Crossing
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.manifest import LENGTH, NEW_LENGTHS, PAST_LENGTHS, Manifest, Stage, uses_of
from stageline.runtime.bundle.signature import Signature
from stageline.runtime.bundle.stitch import stitch
from stageline.runtime.devices.base import on_host
from stageline.runtime.devices.cpu import CpuDevice, allowed_cores
from stageline.runtime.engines import Array, CacheSize, StageFile, engine_factory

_TOLERANCE = 1e-4  # between a row as a whole and in two steps, both in float32 with the same weights
_SHORT = 5


def run_one_block(bundle: Bundle, long: int, most_bytes: int) -> str:
    """Run the smallest stage of one block for rows of 1, 5 and `long` tokens, and with a cache in two steps; returns
    what was run, in words. A block of more than `most_bytes` in float32 is not run.

    EngineError if it does not run, ExportError if its values are not finite, or change with the steps.
    """
    sizes = _sizes(bundle)
    number = min(sizes, key=sizes.__getitem__)
    if sizes[number] > most_bytes:
        return f"not run: the smallest stage of one block has {words.size(sizes[number])} in float32"
    manifest = bundle.manifest
    crossing = Crossing.of(manifest, bundle.parts(), [1] * manifest.blocks)
    model, stage = stitch(crossing, number, bundle.tensors, bundle.path)
    with tempfile.TemporaryDirectory(prefix="stageline-") as folder:
        file = Path(folder) / stage.file
        ir.save(model, file)
        engine = engine_factory("onnxruntime")(
            StageFile(number, file, bundle.path, stage.caches),
            CpuDevice(allowed_cores()),
            _cache(stage, long),
            quantise=manifest.exact,
        )
    names = [spec.name for spec in stage.outputs]
    rng = np.random.default_rng(0)
    try:
        for lengths in ((1,), (_SHORT, 1), (long,)):
            inputs = _inputs(manifest, stage, rng, np.array(lengths))
            whole = on_host(engine.run(inputs, names), names)
            for name in names:
                if not np.isfinite(whole[name]).all():
                    raise ExportError(f"block {number} gives {name} that is not finite for {max(lengths)} tokens")
        if stage.caches:
            steps = [_part(stage, inputs, 0, long - 1), _part(stage, inputs, long - 1, long)]
            last = [on_host(engine.step(each, names, 0), names) for each in steps][-1]
            error = max(float(token_errors(last[name][:, -1], whole[name][:, -1]).max()) for name in names)
            if not error <= _TOLERANCE:
                raise ExportError(f"block {number} gives a token after {long - 1} in its cache another value ({error})")
    finally:
        engine.close()
    steps_said = " and with a cache" if stage.caches else ""
    return (
        f"ran block {number} alone, on rows of 1, {_SHORT} and {long} tokens{steps_said}: the model has "
        f"{words.size(4 * bundle.parameters)} in float32"
    )


def _sizes(bundle: Bundle) -> dict[int, int]:
    """Bytes of each block's stage in float32."""
    return {
        number: sum(
            4 * math.prod(bundle.tensors[name].shape)
            for name in {w for use in uses_of(bundle.manifest.uses, number, number + 1) for w in use.weights.values()}
        )
        for number in range(bundle.manifest.blocks)
    }


def _cache(stage: Stage, capacity: int) -> CacheSize | None:
    return CacheSize(1, capacity) if stage.caches else None


def _inputs(manifest: Manifest, stage: Stage, rng: np.random.Generator, lengths: Array) -> dict[str, Array]:
    """The model's inputs for rows of `lengths` tokens, and random values for the others: noise, true, or zero."""
    given, sizes = Signature.of(manifest).check_inputs(drawn_inputs(manifest, rng, lengths))
    for spec in stage.inputs:
        if spec.name in given:
            continue
        unknown = [size for size in spec.shape if isinstance(size, str) and size not in sizes]
        if unknown:
            raise ExportError(f"{spec.name} has a dimension {unknown[0]!r} that no input of the model has")
        shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
        if spec.dtype == "bool":
            given[spec.name] = np.ones(shape, np.bool_)
        elif "float" in spec.dtype:
            given[spec.name] = rng.standard_normal(shape, dtype=np.float32)
        else:
            given[spec.name] = np.zeros(shape, spec.dtype)
    return given


def _part(stage: Stage, inputs: Mapping[str, Array], first: int, end: int) -> dict[str, Array]:
    """The inputs of a step of one row's tokens `first` to `end` - 1."""
    shapes = {spec.name: spec.shape for spec in stage.inputs}
    cut = {
        name: array[tuple(slice(first, end) if size == LENGTH else slice(None) for size in shapes[name])]
        for name, array in inputs.items()
        if name in shapes
    }
    lengths = {PAST_LENGTHS: np.array([first]), NEW_LENGTHS: np.array([end - first])}
    return {**cut, **lengths}
