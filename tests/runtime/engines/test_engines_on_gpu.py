"""The engines on a real GPU, against ONNX Runtime on a CPU. Run with: pytest -m gpu."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from real_gpu import need_gpus
from stageline.models.errors import EngineError
from stageline.runtime.builder.build import WantedEngine, build
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.engines import engine_factory
from stageline.runtime.engines.tensorrt.flavour import FLAVOURS, FlavourName
from stageline.runtime.engines.tensorrt.records import Options
from stageline.runtime.engines.tensorrt.targets import PORTABLE, gpu_here
from stageline.runtime.generation.request import GenerationRequest, Sampling
from stageline.runtime.pipeline import Pipeline
from stageline.runtime.workload import Workload

pytestmark = pytest.mark.gpu

SECONDS = 120
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
LOAD = Workload(micro_batch=4, length=32, slots=4, capacity=128)
PROMPTS = [[5, 8, 13], list(range(3, 40)), [7], [5, 8, 13, 21], list(range(60, 90))]
OPTIONS: dict[str, Any] = {"slots": 4, "capacity": 128, "prefill_chunk": 32}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four blocks in two stages."""
    need_gpus()
    for module in ("torch", "transformers", "onnxscript", "onnxruntime"):
        pytest.importorskip(module, reason=f"{module} is needed to make a model and its reference")
    from stageline.exporter.export import export
    from stageline.exporter.synthesize import synthesize

    folder = tmp_path_factory.mktemp("gpu")
    synthesize(CONFIG, folder / "checkpoint", seed=2, dtype="bfloat16")
    return export(folder / "checkpoint", folder / "bundle", stages=2).path


def greedy(pipeline: Pipeline) -> list[list[tuple[int, float]]]:
    """What each prompt goes on with: tokens and their log probabilities."""
    sampling = Sampling(max_tokens=16, logprobs=0)
    futures = [pipeline.submit(GenerationRequest(tuple(prompt), sampling)) for prompt in PROMPTS]
    choices = [future.result(SECONDS).choices[0] for future in futures]
    return [[(entry.token_id, entry.logprob) for entry in choice.logprobs] for choice in choices]


def check(bundle: Path, engine: str, atol: float) -> None:
    """Batches and generation on the GPU are near those of the CPU. In half precision the likeliest token may change
    places with the next; after that the texts are different ones, and no longer compared."""
    inputs = {"input_ids": np.random.default_rng(0).integers(0, 99, (7, 20))}
    with Pipeline.open(bundle, **OPTIONS) as pipeline:
        logits, wanted = pipeline.run(inputs)["logits"], greedy(pipeline)
    with Pipeline.open(bundle, engine=engine, devices=["cuda:0"], **OPTIONS) as pipeline:
        for _ in range(3):
            np.testing.assert_allclose(pipeline.run(inputs)["logits"], logits, atol=atol)
        for _ in range(2):
            same = 0
            for found, expected in zip(greedy(pipeline), wanted, strict=True):
                pairs = list(zip(found, expected, strict=False))
                alike = next((n for n, (one, other) in enumerate(pairs) if one[0] != other[0]), len(pairs))
                np.testing.assert_allclose(
                    [one[1] for one, _ in pairs[:alike]], [other[1] for _, other in pairs[:alike]], atol=atol
                )
                same += alike
            assert same >= 40, f"of 80 tokens {same} are alike"


@pytest.mark.parametrize("stripped", [False, True], ids=["whole", "stripped"])
@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_tensorrt_agrees_with_the_cpu(name: FlavourName, stripped: bool, decoder: Path, tmp_path: Path) -> None:
    flavour, gpu = FLAVOURS[name], gpu_here()
    if not flavour.installed:
        pytest.skip(str(flavour.missing()))
    assert gpu is not None
    bundle = Path(shutil.copytree(decoder, tmp_path / "bundle"))
    target = gpu.target if not flavour.builds_anywhere else PORTABLE
    if not flavour.runs(target, gpu):
        pytest.skip(f"{flavour.title} runs on {flavour.portable_means}, and this is {gpu}")
    (*outcomes,) = build(Bundle.open(bundle), [WantedEngine(flavour, target, "fp16")], LOAD, Options(stripped=stripped))
    assert [outcome.error for outcome in outcomes] == [None, None]
    check(bundle, "tensorrt", 0.1)


def test_onnxruntime_agrees_with_the_cpu(decoder: Path) -> None:
    try:
        engine_factory("onnxruntime-cuda")
        import onnxruntime as ort
    except (EngineError, ImportError) as error:
        pytest.skip(str(error))
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA: onnxruntime-gpu is not installed")
    check(decoder, "onnxruntime-cuda", 0.1)
