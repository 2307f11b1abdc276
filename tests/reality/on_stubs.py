"""Opens bundles in the CUDA provider of the published onnxruntime-gpu, on CUDA libraries that do nothing.

Prints as JSON which operators are left to the CPU, and the calls of steps. Run by test_onnxruntime_cuda.py.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_stubs
import numpy as np
from stageline.models.errors import EngineError
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.signature import Signature
from stageline.runtime.devices.cuda import open_gpus
from stageline.runtime.engines import StageFile
from stageline.runtime.engines.cuda_provider import cuda_runtime
from stageline.runtime.engines.lowering.external import root_of
from stageline.runtime.engines.lowering.onnxruntime import lowered_for_cuda
from stageline.runtime.pipeline import Pipeline

COUNTED, TOKENS = 10, 40
NEW = {"kernel", "cuStreamBeginCapture_v2", "cuMemHostAlloc", "cuMemAlloc_v2", "cudaMalloc"}


def on_cpu(bundle: Bundle) -> dict[str, int]:
    """The operators of all stages that the CUDA provider leaves to the CPU."""
    ort, left = cuda_runtime(), Counter[str]()
    for number, stage in enumerate(bundle.manifest.stages):
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        folder = str(root_of(bundle.path))
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        file = StageFile(number, bundle.path / stage.file, bundle.path, stage.caches)
        providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        session = ort.InferenceSession(lowered_for_cuda(file, None).proto, options, providers=providers)
        for part in session.get_provider_graph_assignment_info():
            if not part.ep_name.startswith("CUDA"):
                left.update(node.op_type for node in part.get_nodes())
    return dict(left)


def random_inputs(bundle: Bundle) -> dict[str, Any]:
    rng, inputs = np.random.default_rng(0), {}
    for spec in Signature.of(bundle.manifest).inputs:
        shape = [{"batch": 3, "length": 9}[d] if isinstance(d, str) else d for d in spec.shape]
        if spec.name == "input_ids":
            inputs[spec.name] = rng.integers(3, bundle.manifest.vocabulary or 9, shape)
        elif "mask" in spec.name or "type" in spec.name:
            inputs[spec.name] = np.ones(shape, np.int64)
        else:
            inputs[spec.name] = rng.standard_normal(shape).astype(np.float32)
    return inputs


def per(count: int, before: Counter[str]) -> dict[str, float]:
    """Calls since `before`, per step."""
    return {name: calls / count for name, calls in (cuda_stubs.calls() - before).items()}


def looked_at(path: Path, stages: int, counts_steps: bool) -> dict[str, Any]:
    bundle = Bundle.open(path)
    found: dict[str, Any] = {"stages": stages, "on_cpu": on_cpu(bundle)}
    with Pipeline.open(path, engine="onnxruntime-cuda", devices=["cuda:0"]) as pipeline:
        if stages != len(bundle.manifest.stages):
            pipeline.recut(stages)
        inputs = random_inputs(bundle)
        try:
            pipeline.run(inputs)
        except EngineError as error:
            if "CUDNN" not in str(error):
                raise
            return {**found, "needs_cudnn": True}  # a convolution, whose engines cuDNN itself would describe
        before = cuda_stubs.calls()
        pipeline.run(inputs)  # the second run is captured for the first time: the provider makes all its calls
        found["captured"] = per(1, before)
        found["run"] = warm(lambda: [pipeline.run(inputs) for _ in range(COUNTED)], COUNTED)
        if bundle.manifest.cached:
            texts = [[3 + n, 4, 5] for n in range(8)]

            def generate(tokens: int) -> None:
                steps = pipeline.stats().stages[0].amounts["decode"].runs
                for future in [pipeline.generate(text, max_tokens=tokens) for text in texts]:
                    future.result(60)
                found["decode_steps"] = pipeline.stats().stages[0].amounts["decode"].runs - steps

            if counts_steps:
                found["generation"] = warm(lambda: generate(TOKENS), 1)
            else:
                generate(3)
    return found


def warm(work: Callable[[], object], count: int) -> dict[str, float]:
    """Calls per step of `work`, of `count` steps, once it makes nothing new: how many values are held at once, and so
    how many bindings and buffers there are, depends on the threads."""
    for _ in range(20):
        before = cuda_stubs.calls()
        work()
        counted = per(count, before)
        if not NEW & set(counted):
            break
    return counted


def main() -> None:
    """Arguments: `steps`, if the steps of generation are to be counted, and PATH:STAGES of each bundle."""
    open_gpus([(0, 0)], (0,))[0].close()
    counts_steps = sys.argv[1] == "steps"
    for argument in sys.argv[1 + counts_steps :]:
        path, _, stages = argument.rpartition(":")
        try:
            found = looked_at(Path(path), int(stages), counts_steps)
        except Exception as error:  # said of this bundle, and the others are looked at
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"bundle": argument, **found}), flush=True)


if __name__ == "__main__":
    main()
