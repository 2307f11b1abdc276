"""Baselines made of the bundle itself: the whole model as one stage, in ONNX Runtime or in OpenVINO.

The bundle is copied (weights linked where the disk allows it) and cut to one stage. A model that generates is driven by
Stageline's own scheduler, for a plain session has none; any other is called with static batches of what waits.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from stageline.models.errors import EngineError
from stageline.runtime.bench.contenders import EMBEDDING, CallContender, Contender, Outcome, PipelineContender
from stageline.runtime.bench.inputs import Item
from stageline.runtime.bundle import Bundle, recut
from stageline.runtime.engines import Array
from stageline.runtime.pipeline import Pipeline

ROWS = 32
"""The most rows that waiting requests are put together to."""


def onnxruntime_session(bundle: Path, rows: int, threads: int | None, slots: int, capacity: int | None) -> Contender:
    """One whole-model session of ONNX Runtime; `rows` are those of each request."""
    whole = _OneStage(bundle)
    try:
        if whole.bundle.manifest.cached:
            pipeline = Pipeline.open(whole.bundle.path, threads=threads, queue=4096, slots=slots, capacity=capacity)
            return PipelineContender("onnxruntime", pipeline, whole.close)
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        session = ort.InferenceSession(str(whole.file), options, providers=["CPUExecutionProvider"])
        outputs = _wanted([output.name for output in session.get_outputs()])
        run = lambda inputs: session.run(outputs, inputs)  # noqa: E731
        return CallContender("onnxruntime", _batched(run), max(1, ROWS // rows), whole.close)
    except BaseException:
        whole.close()
        raise


def openvino_model(bundle: Path, rows: int, threads: int | None) -> Contender:
    """One whole-model OpenVINO model on the processors, throughput hint, its own default precision.

    EngineError where OpenVINO is not installed or does not take the model.
    """
    try:
        import openvino as ov
    except ImportError as error:
        raise EngineError('OpenVINO is not installed: pip install "openvino>=2026.2"') from error
    whole = _OneStage(bundle)
    try:
        if whole.bundle.manifest.cached:
            raise EngineError(
                "OpenVINO itself has no generation loop; serve the model with OpenVINO and give its URL as a baseline"
            )
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "THROUGHPUT"}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        try:
            compiled = ov.Core().compile_model(str(whole.file), "CPU", settings)
        except RuntimeError as error:
            raise EngineError(f"OpenVINO does not take the model: {str(error).strip().splitlines()[0]}") from error
        outputs = _wanted([output.any_name for output in compiled.outputs])
        request = compiled.create_infer_request()

        def run(inputs: dict[str, Array]) -> list[Array]:
            results = request.infer(inputs)
            return [results[name] for name in outputs]

        return CallContender("openvino", _batched(run), max(1, ROWS // rows), whole.close)
    except BaseException:
        whole.close()
        raise


class _OneStage:
    """A copy of a bundle cut to one stage, in a temporary folder that it owns until `close()`."""

    def __init__(self, path: Path) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="stageline-bench-")
        try:
            copy = Path(shutil.copytree(path, Path(self._scratch.name) / "bundle", copy_function=_link))
            self.bundle: Bundle = recut(copy, 1)
        except BaseException:
            self.close()
            raise
        self.file = copy / self.bundle.manifest.stages[0].file

    def close(self) -> None:
        self._scratch.cleanup()


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _wanted(outputs: Sequence[str]) -> list[str]:
    return [EMBEDDING] if EMBEDDING in outputs else list(outputs)


def _batched(run: Callable[[dict[str, Array]], Any]) -> Callable[[Sequence[Item]], list[Outcome]]:
    """Waiting requests as one batch, padded on the right with zeros."""

    def call(items: Sequence[Item]) -> list[Outcome]:
        run(stacked(items))
        return [Outcome(perf_counter())] * len(items)

    return call


def stacked(items: Sequence[Item]) -> dict[str, Array]:
    """The inputs of all items as one batch, padded on the right with zeros."""
    first = items[0].inputs
    if len(items) == 1:
        return first
    made: dict[str, Array] = {}
    for name in first:
        arrays = [item.inputs[name] for item in items]
        if name in ("input_ids", "attention_mask", "token_type_ids"):
            most = max(one.shape[1] for one in arrays)
            arrays = [np.pad(one, ((0, 0), (0, most - one.shape[1]))) for one in arrays]
        made[name] = np.concatenate(arrays)
    return made
