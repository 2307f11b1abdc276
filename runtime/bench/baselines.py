"""Baselines made from the bundle itself: the whole model as one stage, in ONNX Runtime or in OpenVINO.

A copy of the bundle is cut to one stage. A model that generates is driven by Stageline's own scheduler,
because a plain session has none. Any other model gets one request at a time: in a batch, texts of different lengths
would be computed with their padding (measured: a third of the speed). Half-precision graphs become float32, as
Stageline's own engine for the CPU takes them: ONNX Runtime lacks kernels for others.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import onnx_ir as ir
from stageline.models.errors import EngineError
from stageline.runtime.bench.contenders import CallContender, Contender, PipelineContender, RequestOutcome
from stageline.runtime.bench.inputs import Item
from stageline.runtime.bundle.manifest import EMBEDDING
from stageline.runtime.bundle.recut import recut_copy
from stageline.runtime.engines import Array, StageFile
from stageline.runtime.engines.lowering.onnxruntime import lowered
from stageline.runtime.engines.lowering.session_weights import put_back
from stageline.runtime.options import PipelineOptions
from stageline.runtime.pipeline import Pipeline


def onnxruntime_session(bundle: Path, options: PipelineOptions) -> Contender:
    """The whole model in one ONNX Runtime session, on the CPU."""
    whole = _OneStage(bundle)
    try:
        if whole.bundle.manifest.cached:
            alone = PipelineOptions(threads=options.threads, queue=options.queue, slots=options.slots)
            return PipelineContender("onnxruntime", Pipeline.open(whole.bundle.path, alone), whole.close)
        import onnxruntime as ort

        session_options = ort.SessionOptions()
        session_options.intra_op_num_threads = options.threads or 0
        session = ort.InferenceSession(str(whole.file), session_options, providers=["CPUExecutionProvider"])
        outputs = _wanted([output.name for output in session.get_outputs()])
        run = lambda inputs: session.run(outputs, inputs)  # noqa: E731
        return CallContender("onnxruntime", one_by_one(run), 1, whole.close)
    except BaseException:
        whole.close()
        raise


def openvino_model(bundle: Path, options: PipelineOptions) -> Contender:
    """The whole model in OpenVINO on the CPU: throughput hint, default precision.

    EngineError if OpenVINO is not installed or rejects the model.
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
        if options.threads is not None:
            settings["INFERENCE_NUM_THREADS"] = options.threads
        try:
            compiled = ov.Core().compile_model(str(whole.file), "CPU", settings)
        except RuntimeError as error:
            raise EngineError(f"OpenVINO rejects the model: {str(error).strip().splitlines()[0]}") from error
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
    """A copy of a bundle cut to one stage, in a temporary folder that it owns until `close()`. `file`: its graph,
    without half precision unless it has caches."""

    def __init__(self, path: Path) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="stageline-bench-")
        try:
            self.bundle = recut_copy(path, Path(self._scratch.name) / "bundle", 1)
            self.file = self.bundle.path / self.bundle.manifest.stages[0].file
            if not self.bundle.manifest.cached:
                stage = StageFile(0, self.file, self.bundle.path, ())
                self.file = self.file.with_suffix(".float32.onnx")
                graph = lowered(stage, ir.DataType.FLOAT, None)
                self.file.write_bytes(put_back(graph.proto, graph.weights) if graph.weights else graph.proto)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._scratch.cleanup()


def _wanted(outputs: Sequence[str]) -> list[str]:
    return [EMBEDDING] if EMBEDDING in outputs else list(outputs)


def one_by_one(run: Callable[[dict[str, Array]], object]) -> Callable[[Sequence[Item]], list[RequestOutcome]]:
    """Adapt a function that computes one request to what a `CallContender` calls."""

    def call(items: Sequence[Item]) -> list[RequestOutcome]:
        outcomes = []
        for item in items:
            run(item.inputs)
            outcomes.append(RequestOutcome(perf_counter()))
        return outcomes

    return call
