"""What this machine has for Stageline, and the command that installs what it lacks. `diagnose` never fails.

Versions come from the packages' metadata and GPUs from NVML, so nothing heavy is imported and no CUDA context is made:
whether ONNX Runtime starts on a GPU is tried in another process.
"""

import importlib
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from stageline.models.catalogue import CATALOGUE, default_root
from stageline.runtime.devices.cpu import allowed_cores
from stageline.runtime.devices.cuda.driver import too_old
from stageline.runtime.engines.tensorrt.flavour import FLAVOURS, TENSORRT, TENSORRT_RTX
from stageline.runtime.engines.tensorrt.targets import PORTABLE, RTX_TARGETS

_START_S = 60  # CUDA's first start on a machine takes seconds


@dataclass(frozen=True)
class CpuInfo:
    """The CPU, the cores that this process may use, and the machine's memory (None if the system does not show it)."""

    model: str
    cores: tuple[int, ...]
    memory_bytes: int | None
    available_bytes: int | None


@dataclass(frozen=True)
class MigDevice:
    """A part of a GPU that MIG divides, under NVML's name."""

    name: str
    uuid: str
    memory_bytes: int


@dataclass(frozen=True)
class GpuInfo:
    """An NVIDIA GPU. `mig`: its parts; empty if MIG is off."""

    index: int
    name: str
    uuid: str
    compute_capability: str
    memory_bytes: int
    free_bytes: int
    mig: tuple[MigDevice, ...]


@dataclass(frozen=True)
class NvidiaDriver:
    """The NVIDIA driver and the newest CUDA it runs. If no driver is found, both are None and `problem` says why."""

    version: str | None
    cuda: str | None
    problem: str | None


@dataclass(frozen=True)
class EngineStatus:
    """A package that an engine can use: `--engine` takes `name`. TensorRT comes in two packages, either will do.

    `version` is None if it is not installed; `install` is the command that installs it. `targets`: the GPUs that it
    builds for on this machine; empty if nothing is built ahead.
    """

    name: str
    package: str
    version: str | None
    runs_on: str
    targets: tuple[str, ...]
    install: str


@dataclass(frozen=True)
class Extra:
    """An optional part of Stageline: its packages with their versions, None for a package that is not installed."""

    name: str
    packages: Mapping[str, str | None]
    install: str

    @property
    def complete(self) -> bool:
        """Whether all packages are installed."""
        return None not in self.packages.values()


@dataclass(frozen=True)
class CheckpointStatus:
    """A reference checkpoint; `folder` is None until it is fetched."""

    name: str
    folder: str | None
    fetch: str


@dataclass(frozen=True)
class Diagnosis:
    """The whole diagnosis. `problems`: one line for each thing that is installed and will not work."""

    stageline: str
    python: str
    system: str
    cpu: CpuInfo
    driver: NvidiaDriver
    gpus: tuple[GpuInfo, ...]
    engines: tuple[EngineStatus, ...]
    extras: tuple[Extra, ...]
    checkpoints: tuple[CheckpointStatus, ...]
    problems: tuple[str, ...]


def diagnose() -> Diagnosis:
    """Look at this machine and this environment."""
    driver, gpus, problems = _nvidia()
    capabilities = tuple(sorted({f"sm{gpu.compute_capability.replace('.', '')}" for gpu in gpus}))
    return Diagnosis(
        _version("stageline") or "not installed",
        platform.python_version(),
        f"{platform.system()} {platform.release()} {platform.machine()}",
        _cpu(),
        driver,
        gpus,
        _engines(capabilities),
        tuple(_extras()),
        tuple(_checkpoints()),
        (*problems, *_clashes(driver), *(_cuda_provider() if gpus else ())),
    )


def _version(*packages: str) -> str | None:
    """The version of the first of these packages that is installed."""
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def _engines(capabilities: tuple[str, ...]) -> tuple[EngineStatus, ...]:
    cores, gpus, rtx_gpus = "CPU cores", "NVIDIA GPUs", "NVIDIA RTX GPUs"
    cpu, gpu, rtx, openvino = (f'pip install "stageline[{extra}]"' for extra in ("cpu", "gpu", "rtx", "openvino"))
    tensorrt, tensorrt_rtx = TENSORRT.version, TENSORRT_RTX.version
    anywhere = (*RTX_TARGETS, PORTABLE)
    return (
        # The GPU's package runs on the CPU as well.
        EngineStatus("onnxruntime", "onnxruntime", _version("onnxruntime", "onnxruntime-gpu"), cores, (), cpu),
        EngineStatus("openvino", "openvino", _version("openvino"), cores, (), openvino),
        EngineStatus("onnxruntime-cuda", "onnxruntime-gpu", _version("onnxruntime-gpu"), gpus, (), gpu),
        EngineStatus("tensorrt", "tensorrt", tensorrt, gpus, capabilities if tensorrt else (), gpu),
        EngineStatus("tensorrt", "tensorrt-rtx", tensorrt_rtx, rtx_gpus, anywhere if tensorrt_rtx else (), rtx),
    )


def _clashes(driver: NvidiaDriver) -> Iterator[str]:
    if _version("onnxruntime") and _version("onnxruntime-gpu"):
        yield (
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files; uninstall both, then "
            "install only onnxruntime-gpu: it runs on the CPU as well"
        )
    yield from (flavour.too_old for flavour in FLAVOURS.values() if flavour.too_old)
    if driver.cuda and (old := too_old(tuple(map(int, driver.cuda.split("."))))):
        yield old
    on_gpus = _version("onnxruntime-gpu") or any(flavour.installed for flavour in FLAVOURS.values())
    if driver.version and on_gpus and not _version("cuda-bindings"):
        yield 'a driver and an engine for GPUs are installed, but not CUDA for Python: pip install "stageline[gpu]"'


def _cuda_provider() -> Iterator[str]:
    """Why ONNX Runtime does not start on the first GPU. A process of its own tries it, which CUDA may take along."""
    if not _version("onnxruntime-gpu"):
        return
    command = [sys.executable, "-m", "stageline.runtime.engines.cuda_provider"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_START_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        yield f"ONNX Runtime did not start CUDA within {_START_S} s"
        return
    if done.returncode:
        yield (done.stderr.strip().splitlines() or [f"ONNX Runtime's CUDA ended with {done.returncode}"])[-1]


def _extras() -> Iterator[Extra]:
    """The extras of pyproject.toml, from the metadata of the installed package."""
    packages: dict[str, dict[str, str | None]] = {}
    for requirement in (metadata.requires("stageline") if _version("stageline") else None) or []:
        found = re.match(r"([\w.-]+).*\bextra\s*==\s*[\"']([\w-]+)[\"']", requirement)
        if found and found[2] != "dev":
            packages.setdefault(found[2], {})[found[1]] = _version(found[1])
    for name, versions in packages.items():
        yield Extra(name, versions, f'pip install "stageline[{name}]"')


def _checkpoints() -> Iterator[CheckpointStatus]:
    for name in CATALOGUE:
        folder = default_root() / name
        yield CheckpointStatus(name, str(folder) if folder.is_dir() else None, f"stageline models fetch {name}")


def _cpu() -> CpuInfo:
    info, memory = _text("/proc/cpuinfo"), _text("/proc/meminfo")
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    sizes = [re.search(rf"^{name}:\s*(\d+) kB$", memory, re.MULTILINE) for name in ("MemTotal", "MemAvailable")]
    total, available = (int(size[1]) * 1024 if size else None for size in sizes)
    return CpuInfo(model[1] if model else platform.machine(), allowed_cores(), total, available)


def _text(file: str) -> str:
    try:
        return Path(file).read_text()
    except OSError:
        return ""


def _nvidia() -> tuple[NvidiaDriver, tuple[GpuInfo, ...], tuple[str, ...]]:
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        there = Path("/proc/driver/nvidia/version").exists()
        found = "a driver is installed, but its version cannot be read" if there else "not looked for"
        return NvidiaDriver(None, None, f"{found}: pip install nvidia-ml-py"), (), ()
    return read_nvml(nvml)


def read_nvml(nvml: Any) -> tuple[NvidiaDriver, tuple[GpuInfo, ...], tuple[str, ...]]:
    """The driver, the GPUs, and a line for each GPU that does not answer. `nvml`: pynvml, or a stand-in for it."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return NvidiaDriver(None, None, f"no NVIDIA driver ({error})"), (), ()
    try:
        cuda = nvml.nvmlSystemGetCudaDriverVersion_v2()  # 13020 is 13.2
        driver = NvidiaDriver(nvml.nvmlSystemGetDriverVersion(), f"{cuda // 1000}.{cuda % 1000 // 10}", None)
        gpus, problems = [], []
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                gpus.append(_gpu(nvml, index))
            except nvml.NVMLError as error:
                problems.append(f"GPU {index} does not answer: {error}")
        return driver, tuple(gpus), tuple(problems)
    except nvml.NVMLError as error:
        return NvidiaDriver(None, None, f"the NVIDIA driver does not answer ({error})"), (), ()
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: Any, index: int) -> GpuInfo:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    name, uuid = nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetUUID(handle)
    return GpuInfo(index, name, uuid, f"{major}.{minor}", memory.total, memory.free, tuple(_mig(nvml, handle)))


def _mig(nvml: Any, handle: Any) -> Iterator[MigDevice]:
    try:
        mode, _pending = nvml.nvmlDeviceGetMigMode(handle)
        count = nvml.nvmlDeviceGetMaxMigDeviceCount(handle) if mode else 0
    except nvml.NVMLError:  # a GPU that cannot be divided
        return
    for place in range(count):
        try:
            part = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, place)
            memory_bytes = nvml.nvmlDeviceGetMemoryInfo(part).total
            yield MigDevice(nvml.nvmlDeviceGetName(part), nvml.nvmlDeviceGetUUID(part), memory_bytes)
        except nvml.NVMLError:  # no part at this place
            continue
