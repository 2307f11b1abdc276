"""Energy and memory of the machine, from RAPL and NVML; notes name what cannot be read."""

import importlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

RAPL = Path("/sys/class/powercap")


class Meters:
    """The counters of this machine. `notes` name those it lacks. Owns NVML until `close()`."""

    def __init__(self, rapl: Path = RAPL) -> None:
        self.notes: list[str] = []
        self._joules: list[Callable[[], float]] = []
        self._gpus: list[Any] = []
        self._nvml: Any = None
        self._open_rapl(rapl)
        self._open_nvml()

    @property
    def measures_energy(self) -> bool:
        """Whether any energy counter can be read."""
        return bool(self._joules)

    @property
    def has_gpu(self) -> bool:
        """Whether NVML sees a GPU."""
        return bool(self._gpus)

    def energy_j(self) -> float:
        """The sum of all counters; only differences are meaningful."""
        return sum(read() for read in self._joules)

    def device_memory_bytes(self) -> int:
        """Memory used on all GPUs, by any process."""
        return sum(int(self._nvml.nvmlDeviceGetMemoryInfo(gpu).used) for gpu in self._gpus)

    def close(self) -> None:
        """Release NVML."""
        if self._nvml is not None:
            self._nvml.nvmlShutdown()
            self._nvml = None

    def _open_rapl(self, folder: Path) -> None:
        domains = sorted(folder.glob("*-rapl:[0-9]")) + sorted(folder.glob("*-rapl:[0-9][0-9]"))  # packages, not parts
        if not domains:
            self.notes.append("no energy of the CPU: this system has no RAPL counters")
        for domain in domains:
            try:
                self._joules.append(_Wrapping(domain))
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else str(error)
                self.notes.append(f"no energy of {domain.name}: its RAPL counter cannot be read ({reason})")

    def _open_nvml(self) -> None:
        try:
            pynvml: Any = importlib.import_module("pynvml")
        except ImportError:
            self.notes.append("no energy of GPUs: nvidia-ml-py is not installed")
            return
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:
            return  # no GPU
        self._nvml = pynvml
        for number in range(pynvml.nvmlDeviceGetCount()):
            gpu = pynvml.nvmlDeviceGetHandleByIndex(number)
            self._gpus.append(gpu)
            try:
                pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
            except pynvml.NVMLError as error:
                self.notes.append(f"no energy of GPU {number}: {error}")
                continue
            self._joules.append(partial(_gpu_joules, pynvml, gpu))


def _gpu_joules(nvml: Any, gpu: Any) -> float:
    return float(nvml.nvmlDeviceGetTotalEnergyConsumption(gpu)) / 1e3


class _Wrapping:
    """A RAPL counter in joules that continues when the system's counter wraps."""

    def __init__(self, domain: Path) -> None:
        self._file = domain / "energy_uj"
        self._range = int((domain / "max_energy_range_uj").read_text())
        self._last, self._wraps = int(self._file.read_text()), 0

    def __call__(self) -> float:
        now = int(self._file.read_text())
        self._wraps += now < self._last
        self._last = now
        return (now + self._wraps * self._range) / 1e6


def host_memory_bytes() -> int:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
