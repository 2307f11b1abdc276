"""What the doctor finds: on this machine, and on made-up ones with GPUs."""

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from stageline.runtime import doctor
from stageline.runtime.devices.cpu import allowed_cores
from stageline.runtime.doctor import NvidiaDriver, diagnose, read_nvml
from stageline.runtime.engines import ENGINES
from stageline.runtime.engines.tensorrt import flavour


class FakeNvml:
    """A driver of CUDA 13.2 over the given GPUs; one that is None does not answer."""

    class NVMLError(Exception):
        pass

    def __init__(self, *gpus: dict[str, Any] | None) -> None:
        self.gpus = gpus
        self.open = 0

    def nvmlInit(self) -> None:  # noqa: N802
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "595.71.05"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:  # noqa: N802
        return 13020

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:  # noqa: N802
        gpu = self.gpus[index]
        if gpu is None:
            raise self.NVMLError("GPU is lost")
        return gpu

    def nvmlDeviceGetCudaComputeCapability(self, handle: dict[str, Any]) -> tuple[int, int]:  # noqa: N802
        major, minor = handle["capability"]
        return major, minor

    def nvmlDeviceGetMemoryInfo(self, handle: dict[str, Any]) -> Any:  # noqa: N802
        return SimpleNamespace(total=handle["total"], free=handle["total"] // 2)

    def nvmlDeviceGetName(self, handle: dict[str, Any]) -> str:  # noqa: N802
        return str(handle["name"])

    def nvmlDeviceGetUUID(self, handle: dict[str, Any]) -> str:  # noqa: N802
        return f"GPU-{handle['name']}"

    def nvmlDeviceGetMigMode(self, handle: dict[str, Any]) -> list[int]:  # noqa: N802
        if "mig" not in handle:
            raise self.NVMLError("Not Supported")
        return [int(bool(handle["mig"])), 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: dict[str, Any]) -> int:  # noqa: N802
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: dict[str, Any], index: int) -> Any:  # noqa: N802
        if index >= len(handle["mig"]):
            raise self.NVMLError("Not Found")
        return handle["mig"][index]


def gpu(name: str, capability: tuple[int, int], **more: Any) -> dict[str, Any]:
    return {"name": name, "capability": capability, "total": 80 << 30, **more}


def test_this_machine_is_reported_as_it_is() -> None:
    found = diagnose()
    assert found.cpu.cores == allowed_cores()
    assert found.cpu.memory_bytes == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert found.python == ".".join(map(str, sys.version_info[:3]))
    (onnxruntime,) = (engine for engine in found.engines if engine.name == "onnxruntime")
    import onnxruntime as ort

    assert onnxruntime.version == ort.__version__
    (cpu,) = (extra for extra in found.extras if extra.name == "cpu")
    assert cpu.complete
    assert cpu.packages == {"onnxruntime": ort.__version__}


def test_every_engine_is_in_the_report() -> None:
    assert {engine.name for engine in diagnose().engines} == set(ENGINES)


def test_what_is_absent_has_a_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise flavour.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "_version", lambda *packages: None)
    monkeypatch.setattr(flavour, "version", absent)
    monkeypatch.setenv("STAGELINE_CHECKPOINTS", "/nowhere")
    found = diagnose()
    assert {engine.version for engine in found.engines} == {None}
    assert all(engine.install.startswith("pip install") for engine in found.engines)
    assert [checkpoint.folder for checkpoint in found.checkpoints] == [None, None]
    assert found.checkpoints[0].fetch == "stageline models fetch minilm"


def test_two_onnxruntimes_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda *packages: "1.32.0" if "onnxruntime" in packages[0] else None)
    (problem,) = diagnose().problems
    assert "onnxruntime and onnxruntime-gpu are both installed" in problem


def test_an_old_driver_is_a_problem() -> None:
    (problem,) = (line for line in doctor._clashes(NvidiaDriver("535.1", "12.2", None)) if "driver is for" in line)
    assert problem == "the NVIDIA driver is for CUDA 12.2, and Stageline needs one for 12.8 or newer; update the driver"
    assert not [line for line in doctor._clashes(NvidiaDriver("595.1", "13.2", None)) if "driver is for" in line]


def test_gpus_are_read_through_nvml() -> None:
    nvml = FakeNvml(gpu("RTX 4090", (8, 9)), gpu("H100", (9, 0), mig=[gpu("H100 MIG 1g.10gb", (9, 0))]))
    driver, gpus, problems = read_nvml(nvml)
    assert (driver.version, driver.cuda, driver.problem) == ("595.71.05", "13.2", None)
    assert [(g.index, g.compute_capability, len(g.mig)) for g in gpus] == [(0, "8.9", 0), (1, "9.0", 1)]
    assert gpus[1].mig[0].name == "H100 MIG 1g.10gb"
    assert problems == ()
    assert nvml.open == 0


def test_a_gpu_that_does_not_answer_does_not_hide_the_others() -> None:
    driver, gpus, problems = read_nvml(FakeNvml(None, gpu("L4", (8, 9), mig=[])))
    assert driver.version == "595.71.05"
    assert [(g.index, g.name) for g in gpus] == [(1, "L4")]
    assert problems == ("GPU 0 does not answer: GPU is lost",)


def test_without_a_driver_the_reason_is_reported() -> None:
    class NoDriver(FakeNvml):
        def nvmlInit(self) -> None:  # noqa: N802
            raise self.NVMLError("NVML Shared Library Not Found")

    driver, gpus, _ = read_nvml(NoDriver())
    assert driver.version is None
    assert driver.problem == "no NVIDIA driver (NVML Shared Library Not Found)"
    assert gpus == ()


def test_nothing_heavy_is_imported() -> None:
    heavy = "[n for n in ('torch', 'onnxruntime', 'tensorrt_rtx', 'cuda.core', 'transformers') if n in sys.modules]"
    code = f"import sys; from stageline.runtime.doctor import diagnose; diagnose(); print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_onnxruntime_that_does_not_start_on_the_gpu_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here onnxruntime has no CUDA: that is what the process which tries it says."""
    monkeypatch.setattr(doctor, "_version", lambda *packages: "1.31.1" if "onnxruntime-gpu" in packages else None)
    assert list(doctor._cuda_provider()) == [
        'this ONNX Runtime has no CUDA: pip uninstall onnxruntime, then pip install "stageline[gpu]"'
    ]
