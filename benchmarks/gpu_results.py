"""What the parts of gpu_proof.py share: figures that are on disk once they are known, and reasons to skip a part."""

import json
import resource
from pathlib import Path
from typing import Any

from stageline.models.errors import EngineError
from stageline.runtime.bench.energy import Meters, host_memory_bytes

ENGINE = "onnxruntime-cuda"
GPU = "cuda:0"


class MissingError(Exception):
    """What a part needs is not there; one line says what."""


class Results:
    """The figures of a part. `add` writes the whole file again, so that nothing is lost when the part ends."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.figures: list[dict[str, Any]] = []
        self._skipped: str | None = None

    def add(self, **figures: Any) -> None:
        """One row of figures, names with their units. A row with `ok` says whether a bound holds."""
        self.figures.append({name: round(v, 6) if isinstance(v, float) else v for name, v in figures.items()})
        print(json.dumps(self.figures[-1]), flush=True)
        self._write()

    def skip(self, why: str) -> None:
        """The part needs what is not there."""
        self._skipped = why
        self._write()

    def _write(self) -> None:
        skipped = {} if self._skipped is None else {"skipped": self._skipped}
        aside = self._file.with_name(f".{self._file.name}")
        aside.write_text(json.dumps({"figures": self.figures, **skipped}, indent=1))
        aside.replace(self._file)


class Memory:
    """Memory of the GPUs (all processes, by NVML) and of this process, from its making to `add`."""

    def __init__(self, meters: Meters) -> None:
        self._meters = meters
        self._before = self._now()

    def add(self, results: Results, what: str) -> None:
        """Add a row: before, and now."""
        device, host = self._now()
        results.add(
            memory=what,
            device_before_mb=self._before[0],
            device_after_mb=device,
            host_before_mb=self._before[1],
            host_after_mb=host,
            host_peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        )

    def _now(self) -> tuple[float | None, float]:
        device = self._meters.device_memory_bytes() / 1e6 if self._meters.has_gpu else None
        return device, host_memory_bytes() / 1e6


def need_gpu() -> None:
    """MissingError without a driver, CUDA for Python or a GPU."""
    from stageline.runtime.devices.cuda.driver import load

    try:
        load()
    except EngineError as error:
        raise MissingError(str(error)) from error


def need_engine() -> None:
    """MissingError without a GPU or ONNX Runtime."""
    from stageline.runtime.engines import engine_factory

    need_gpu()
    try:
        engine_factory(ENGINE)
    except EngineError as error:
        raise MissingError(str(error)) from error


def need_materials(folder: Path) -> list[Path]:
    """The folders in a folder of the materials, by name. MissingError if there are none."""
    found = sorted(path.parent for path in folder.glob("*/manifest.json")) if folder.is_dir() else []
    if not found:
        raise MissingError(f"{folder} has no bundles; make them: python benchmarks/gpu_materials.py")
    return found


def need_torch() -> Any:
    """torch, with a GPU. MissingError without."""
    try:
        import torch
    except ImportError as error:
        raise MissingError("torch is not installed") from error
    if not torch.cuda.is_available():
        raise MissingError(f"torch {torch.__version__} sees no GPU")
    return torch
