"""A process that builds one engine: `python -m stageline.runtime.builder.worker REQUEST`, the request a JSON document.

It is a process of its own because TensorRT's builder keeps memory, may crash, and cannot be interrupted. It prints a
JSON line for each step of the build and one with the result. When nobody reads them any more, it ends.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from stageline.models.errors import StagelineError
from stageline.runtime.builder import network
from stageline.runtime.builder.report import EngineReport, of_engine, of_network
from stageline.runtime.bundle.folder import file_sha256
from stageline.runtime.bundle.manifest import FileEntry
from stageline.runtime.engines.base import StageFile
from stageline.runtime.engines.tensorrt.flavour import FLAVOURS, FlavourName
from stageline.runtime.engines.tensorrt.lower import Precision, lower
from stageline.runtime.engines.tensorrt.records import OptimizationProfile, Options
from stageline.runtime.engines.tensorrt.targets import gpu_here

_EVERY_S = 0.1


class Request(BaseModel):
    """One engine to build. `plan`, `report` and `timings` are paths to write; `known_timings` is one to read."""

    stage: StageFile
    flavour: FlavourName
    target: str
    precision: Precision
    float32_nodes: tuple[str, ...] = ()
    capacity: int
    profiles: tuple[OptimizationProfile, ...]
    options: Options
    plan: Path
    report: Path
    timings: Path | None = None
    known_timings: Path | None = None


class Result(BaseModel):
    """The files that were written. The `path` of each entry is the name in the request."""

    plan: FileEntry
    report: FileEntry
    timings: FileEntry | None
    build_s: float
    peak_bytes: int


def build(request: Request, progress: network.Progress) -> Result:
    """Build the engine and write it and its report. EngineError with TensorRT's reason, or OSError."""
    begin = time.perf_counter()
    trt = FLAVOURS[request.flavour].load()
    stripped = request.options.stripped
    lowered = lower(request.stage, request.precision, request.capacity, stripped, request.float32_nodes)
    if stripped:
        for weight in lowered.weights.values():
            weight.read()  # a value that would be refused at load is refused now
    parsed = network.parse(trt, lowered, stripped)
    known = b""
    if request.known_timings is not None:
        known = request.known_timings.read_bytes()
    plan, timings = network.build(
        parsed,
        lowered,
        request.target,
        request.capacity,
        request.profiles,
        request.options,
        known if request.timings is not None else None,
        progress,
    )
    entry = _written(request.plan, plan)
    report = _report(trt, parsed, lowered, plan, request.options)
    timed = _written(request.timings, timings) if request.timings is not None and timings is not None else None
    return Result(
        plan=entry,
        report=_written(request.report, report.model_dump_json(indent=1).encode()),
        timings=timed,
        build_s=time.perf_counter() - begin,
        peak_bytes=_peak_bytes(),
    )


def _peak_bytes() -> int:
    """The most memory that this process has had resident. getrusage would count that of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def _report(trt: Any, parsed: network.Network, lowered: Any, plan: Any, options: Options) -> EngineReport:
    if gpu_here() is not None:
        runtime = trt.Runtime(parsed.logger)
        runtime.engine_host_code_allowed = options.version_compatible  # this process built the plan
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is not None:  # None: built for another GPU
            return of_engine(trt, engine, lowered)
    return of_network(parsed, lowered)


def _written(path: Path, data: Any) -> FileEntry:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(path=path.name, size_bytes=path.stat().st_size, sha256=file_sha256(path))


def main() -> None:
    """Build the request in the first argument."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # TensorRT writes to stdout as well
    last = [0.0]

    def send(document: dict[str, Any]) -> None:
        try:
            print(json.dumps(document), file=out, flush=True)
        except OSError:  # nobody reads: the parent process has ended
            os._exit(1)

    def progress(phase: str, step: int, steps: int) -> bool:
        now = time.monotonic()
        if now - last[0] >= _EVERY_S:
            last[0] = now
            send({"phase": phase, "step": step, "steps": steps})
        return True

    try:
        send({"result": build(Request.model_validate_json(sys.argv[1]), progress).model_dump()})
    except StagelineError as error:
        send({"error": str(error)})
    except OSError as error:
        send({"os_error": error.strerror or str(error)})


if __name__ == "__main__":
    main()
