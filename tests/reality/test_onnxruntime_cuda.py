"""The published onnxruntime-gpu opens every architecture on CUDA libraries that do nothing.

No operator of data is left to the CPU, and the calls of a step are counted.

Those of the parity tests are looked at as these left them in STAGELINE_PARITY (make test does so).
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_stubs
import pytest
from llamas import THREE_BLOCKS, TIED
from wheels import unpacked

pytestmark = [pytest.mark.reality, pytest.mark.slow]
HERE = Path(__file__).parent
# What only computes shapes, of which the host holds the numbers.
SHAPES = {"Shape", "Size", "Squeeze", "Unsqueeze", "Reshape", "Concat", "Gather", "Add", "Sub", "Mul", "Div", "Slice"}
WAITS = {"cuEventSynchronize", "cuStreamSynchronize", "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy",
         "cudaEventSynchronize"}  # fmt: skip
TO_HOST = {"cuMemcpyDtoHAsync_v2", "cudaMemcpyAsync to the host", "cudaMemcpy"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process with onnxruntime-gpu in place of onnxruntime, and the stubs in place of CUDA."""
    pytest.importorskip("cuda.bindings.driver", reason="CUDA for Python is not installed")
    if cuda_stubs.compiler() is None:
        pytest.skip("there is no C compiler")
    onnxruntime, stubs = unpacked("onnxruntime-gpu"), tmp_path_factory.mktemp("stubs")
    headers = [unpacked(f"nvidia-cuda-{part}") / "nvidia/cu13/include" for part in ("runtime", "crt")]
    cuda_stubs.make(stubs, onnxruntime / "onnxruntime/capi/libonnxruntime_providers_cuda.so", headers)
    path = os.pathsep.join([str(onnxruntime), str(HERE.parent / "helpers")])
    return {**os.environ, "PYTHONPATH": path, "LD_LIBRARY_PATH": str(stubs)}


@pytest.fixture(scope="module")
def looked_at(environment: dict[str, str]) -> Callable[..., list[dict[str, Any]]]:
    def look(*bundles: str) -> list[dict[str, Any]]:
        command = [sys.executable, str(HERE / "on_stubs.py"), *bundles]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        found = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(found) == len([one for one in bundles if one != "steps"]), done.stdout + done.stderr
        return found

    return look


def check(found: dict[str, Any]) -> None:
    assert "error" not in found, found
    assert set(found["on_cpu"]) <= SHAPES, found
    if "needs_cudnn" in found:
        return
    assert not TO_HOST - {"cuMemcpyDtoHAsync_v2"} & set(found["captured"]), found
    copies = {"cuMemcpyHtoDAsync_v2", "cuMemcpyDtoDAsync_v2"}
    assert set(found["run"]) <= {"cuGraphLaunch", *copies, *WAITS, *TO_HOST}, found
    assert found["run"]["cuGraphLaunch"] == found["stages"], found


def test_one_step_a_token_and_one_wait_a_step_whatever_the_number_of_stages(
    looked_at: Callable[..., list[dict[str, Any]]], export_once: Callable[..., Path]
) -> None:
    bundle = export_once(THREE_BLOCKS)
    for stages, found in zip((1, 2, 3), looked_at("steps", *(f"{bundle}:{n}" for n in (1, 2, 3))), strict=True):
        check(found)
        tokens = 40
        assert found["decode_steps"] == tokens - 1, found  # of 8 requests, the first token is of the prompt
        calls = found["generation"]
        steps = found["decode_steps"] + 1  # the prompts, of 24 tokens, are one step
        assert sum(calls.get(name, 0) for name in WAITS) == steps, found
        assert sum(calls.get(name, 0) for name in TO_HOST) == steps, found
        assert calls["cuGraphLaunch"] == steps * (stages + 1), found  # the sampler is one more
        assert calls["cuMemcpyHtoDAsync_v2"] == steps * stages, found


@pytest.mark.parametrize("quantise", ["int8", "int4"])
def test_quantised_weights_open_in_the_type_of_the_bundle(
    quantise: str, environment: dict[str, str], export_once: Callable[..., Path]
) -> None:
    code = (
        "import sys; from stageline.runtime.pipeline import Pipeline\n"
        "with Pipeline.open(sys.argv[1], engine='onnxruntime-cuda', quantise=sys.argv[2]) as pipeline:\n"
        "    print(len(pipeline.generate([3, 4], max_tokens=3).result(60).choices[0].token_ids))"
    )
    command = [sys.executable, "-c", code, str(export_once(TIED, stages=2)), quantise]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "3\n", done.stderr


def test_every_architecture_is_placed_on_the_gpu(looked_at: Callable[..., list[dict[str, Any]]]) -> None:
    kept = sorted(Path(os.environ.get("STAGELINE_PARITY", "nowhere")).glob("*/manifest.json"))
    if not kept:
        pytest.skip("the parity tests have left no bundles: make test, or set STAGELINE_PARITY for both")
    wrong = []
    for found in looked_at(*(f"{manifest.parent}:1" for manifest in kept)):
        try:
            check(found)
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong, "\n".join(wrong)
    assert len(kept) >= 30


def start(environment: dict[str, str], **changes: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "stageline.runtime.engines.cuda_provider"]
    return subprocess.run(command, env={**environment, **changes}, capture_output=True, text=True, check=False)


def test_the_provider_starts_or_names_the_library_that_it_lacks(environment: dict[str, str], tmp_path: Path) -> None:
    assert start(environment).returncode == 0
    for library in Path(environment["LD_LIBRARY_PATH"]).glob("*.so.*"):
        if library.name != "libcublas.so.13":
            (tmp_path / library.name).symlink_to(library)
    lacking = start(environment, LD_LIBRARY_PATH=str(tmp_path))
    assert lacking.returncode == 1
    assert lacking.stdout == ""
    assert lacking.stderr.startswith("ONNX Runtime could not start CUDA on cuda:0: Failed to load libcublas.so.13")
    assert lacking.stderr.count("\n") == 1


def test_cuda_is_found_where_pip_puts_it(environment: dict[str, str], tmp_path: Path) -> None:
    onnxruntime, *others = environment["PYTHONPATH"].split(os.pathsep)
    (tmp_path / "onnxruntime").symlink_to(Path(onnxruntime) / "onnxruntime")
    for folder, names in (("cu13", ("cublas", "cudart", "curand")), ("cudnn", ("cudnn",))):
        made = tmp_path / "nvidia" / folder / "lib"
        made.mkdir(parents=True)
        for library in Path(environment["LD_LIBRARY_PATH"]).glob("*.so.*"):
            if any(name in library.name for name in names):
                (made / library.name).symlink_to(library)
    driver = tmp_path / "driver"
    driver.mkdir()
    (driver / "libcuda.so.1").symlink_to(Path(environment["LD_LIBRARY_PATH"]) / "libcuda.so.1")
    path = os.pathsep.join([str(tmp_path), *others])
    done = start(environment, PYTHONPATH=path, LD_LIBRARY_PATH=str(driver))
    assert done.returncode == 0, done.stderr
