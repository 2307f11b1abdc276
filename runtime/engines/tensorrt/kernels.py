"""The kernels that TensorRT-RTX compiled for this GPU, kept beside the engine so that the next start compiles none.

They are code, as the engine is: they are read only if the engines' manifest lists them for this plan, version and model
of GPU, and their digest is the listed one. TensorRT-RTX itself refuses those of another driver. Whatever is missing, it
compiles again; so a bundle that cannot be written, or is being built, is no error.
"""

import hashlib
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from stageline.models.errors import BundleError, EngineError
from stageline.runtime.bundle.manifest import FileEntry
from stageline.runtime.engines.tensorrt.guard import open_checked
from stageline.runtime.engines.tensorrt.records import EngineRecord, KernelsRecord
from stageline.runtime.engines.tensorrt.store import locked, read_engines

_one_at_a_time = threading.Lock()  # stages of a pipeline close together, and the store's lock does not wait


@dataclass(frozen=True)
class CompiledKernels:
    """Where the kernels of an engine on a model of GPU (`gpu`: its name and target) are kept."""

    bundle: Path
    engine: EngineRecord
    gpu: str

    def read(self) -> bytes | None:
        """What was kept, if it is as it was written; else None."""
        kept = self._listed()
        if kept is None:
            return None
        with suppress(EngineError, OSError), open_checked(self.bundle, kept.file, "the kernels", "") as file:
            return file.read()
        return None

    def keep(self, kernels: bytes) -> None:
        """Keep these for the next start, if that is possible and they are new."""
        digest = hashlib.sha256(kernels).hexdigest()
        file = FileEntry(path=self._path(), size_bytes=len(kernels), sha256=digest)
        with _one_at_a_time, suppress(BundleError, OSError):
            if self.read() != kernels:
                with locked(self.bundle) as store:
                    store.put_kernels(self._record(file), kernels)

    def _listed(self) -> KernelsRecord | None:
        kernels = read_engines(self.bundle).kernels
        return next((one for one in kernels if one == self._record(one.file)), None)

    def _record(self, file: FileEntry) -> KernelsRecord:
        return KernelsRecord(
            file=file, plan_sha256=str(self.engine.plan.sha256), version=self.engine.version, gpu=self.gpu
        )

    def _path(self) -> str:
        key = hashlib.sha256(f"{self.engine.plan.sha256} {self.engine.version} {self.gpu}".encode()).hexdigest()
        return f"{self.engine.plan.path.removesuffix('.plan')}.{key[:8]}.kernels"
