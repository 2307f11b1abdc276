"""Baselines made of the bundle itself: the whole model as one stage, in ONNX Runtime or in OpenVINO.

The bundle is copied (weights linked where the disk allows it) and cut to one stage. A model that generates is driven by
Stageline's own scheduler, for a plain session has none; any other is called with one request after the other: put
together, texts of unlike lengths would be computed with their padding (measured: a third of the speed).
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from stageline.models.errors import EngineError
from stageline.runtime.bench.contenders import CallContender, Contender, PipelineContender, RequestOutcome
from stageline.runtime.bench.inputs import Item
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.manifest import EMBEDDING
from stageline.runtime.bundle.recut import recut
from stageline.runtime.engines import Array
from stageline.runtime.pipeline import Pipeline


def onnxruntime_session(bundle: Path, threads: int | None, slots: int) -> Contender:
    """One whole-model session of ONNX Runtime."""
    whole = _OneStage(bundle)
    try:
        if whole.bundle.manifest.cached:
            pipeline = Pipeline.open(whole.bundle.path, threads=threads, queue=4096, slots=slots)
            return PipelineContender("onnxruntime", pipeline, whole.close)
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        session = ort.InferenceSession(str(whole.file), options, providers=["CPUExecutionProvider"])
        outputs = _wanted([output.name for output in session.get_outputs()])
        run = lambda inputs: session.run(outputs, inputs)  # noqa: E731
        return CallContender("onnxruntime", one_by_one(run), 1, whole.close)
    except BaseException:
        whole.close()
        raise


def openvino_model(bundle: Path, threads: int | None) -> Contender:
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

        return CallContender("openvino", one_by_one(run), 1, whole.close)
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


def one_by_one(run: Callable[[dict[str, Array]], object]) -> Callable[[Sequence[Item]], list[RequestOutcome]]:
    """What a `CallContender` calls, of a function that computes one request."""

    def call(items: Sequence[Item]) -> list[RequestOutcome]:
        outcomes = []
        for item in items:
            run(item.inputs)
            outcomes.append(RequestOutcome(perf_counter()))
        return outcomes

    return call
