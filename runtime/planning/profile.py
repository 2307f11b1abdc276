"""Measuring a bundle's parts on this machine: small stages in the engine, stored as profiles/<machine>.json.

Ranges of blocks are stitched as stages (each kind of block alone, quarters, halves, the whole) and timed, pinned to as
many processors as threads, for micro-batches of several shapes: the median of the runs, and the lower median of two
passes, since what disturbs a run only adds to it. A range that begins later is fed with what the blocks before it give.
The file is not listed in the manifest: a bundle may hold such files, and only the planner reads it.
"""

import itertools
import os
import re
import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from time import perf_counter
from typing import Literal

import numpy as np
import onnx_ir as ir
import pydantic
from stageline.models.errors import BundleError, StagelineError
from stageline.runtime.bundle import Bundle
from stageline.runtime.devices.base import on_host
from stageline.runtime.devices.cpu import CpuDevice, allowed_cores, start_worker
from stageline.runtime.engines import Array, Engine, StageFile, engine_factory
from stageline.runtime.engines.base import CacheSize
from stageline.runtime.manifest import Manifest
from stageline.runtime.planning.cost import Shape
from stageline.runtime.stitch import Plan, stitch

FOLDER = "profiles"
_PASSES, _WARM_UP_RUNS, _FEWEST_RUNS, _MOST_RUNS, _POINT_S = 2, 2, 5, 40, 0.2
_WHOLE_LIMIT_BYTES = 8e9  # of weights: beyond it no range longer than a quarter is opened
_FEW_BLOCKS = 12
_HANDOVERS = 400


class _Data(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class Machine(_Data):
    """What measurements hold for."""

    cpu: str
    processors: int
    engine: str
    engine_version: str

    @classmethod
    def here(cls) -> "Machine":
        """This machine with the engine onnxruntime."""
        try:
            info = Path("/proc/cpuinfo").read_text()
        except OSError:
            info = ""
        fields = [
            re.search(rf"^{name}\s*:\s*(.+)$", info, re.MULTILINE) for name in ("model name", "model", "stepping")
        ]
        name, model, stepping = (found[1] if found else "?" for found in fields)
        cpu = f"{name} (model {model}, stepping {stepping})"
        return cls(cpu=cpu, processors=os.cpu_count() or 1, engine="onnxruntime", engine_version=version("onnxruntime"))

    @property
    def file(self) -> str:
        """The profile's file name."""
        return re.sub(r"[^a-z0-9]+", "-", str(self).lower()).strip("-") + ".json"

    def __str__(self) -> str:
        return f"{self.cpu}, {self.processors} processors, {self.engine} {self.engine_version}"


class Point(_Data):
    """The median time of a stage of blocks `first` to `end` - 1 for a micro-batch."""

    threads: int = pydantic.Field(ge=1)
    batch: int = pydantic.Field(ge=1)
    length: int = pydantic.Field(ge=1)
    past: int = pydantic.Field(ge=0)
    first: int = pydantic.Field(ge=0)
    end: int = pydantic.Field(ge=1)
    seconds: float = pydantic.Field(gt=0)
    runs: int = pydantic.Field(ge=1)


class Profile(_Data):
    """What was measured on a machine. `handover_s` is that of a micro-batch from a worker to the next."""

    format: Literal["stageline-profile"] = "stageline-profile"
    version: Literal[1] = 1
    machine: Machine
    handover_s: float
    points: tuple[Point, ...] = pydantic.Field(min_length=1)


@dataclass(frozen=True)
class Grid:
    """The micro-batches to measure: every batch with every length and every past."""

    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    pasts: tuple[int, ...] = (0,)

    def shapes(self) -> Iterator[Shape]:
        """All of them."""
        for batch in self.batches:
            for length in self.lengths:
                yield from (Shape(batch, length, past) for past in self.pasts)


def default_grids(manifest: Manifest) -> list[Grid]:
    """Whole rows; and, for a model with caches, steps of one token."""
    longest = manifest.max_positions or 512
    lengths = tuple(sorted({min(length, longest) for length in (16, 32, 64, 128)}))
    if not manifest.cached:
        return [Grid((1, 4, 16), lengths)]
    pasts = tuple(sorted({min(past, longest - 1) for past in (32, 256)}))
    return [Grid((1, 4), lengths[:3]), Grid((1, 4, 16), (1,), pasts)]


def measure(
    bundle: Bundle,
    threads: Sequence[int] = (1, 2),
    grids: Sequence[Grid] | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Profile:
    """Time the bundle's parts for each number of threads that this machine has processors for."""
    cores = allowed_cores()
    grids = default_grids(bundle.manifest) if grids is None else grids
    able = [count for count in threads if count <= len(cores)]
    lowest: dict[tuple[int, ...], Point] = {}
    for number, count, (first, end) in itertools.product(range(_PASSES), able, ranges(bundle)):
        progress(f"pass {number + 1} of {_PASSES}: {count} threads, blocks {first} to {end - 1}")
        for point in _on_worker(cores[:count], partial(_range_points, bundle, first, end, cores[:count], grids)):
            key = (count, point.batch, point.length, point.past, first, end)
            lowest[key] = min(point, lowest.get(key, point), key=lambda one: one.seconds)
    points = tuple(lowest.values())
    if not points:
        raise StagelineError(f"no wanted number of threads fits {len(cores)} processors")
    return Profile(machine=Machine.here(), handover_s=_handover_s(cores), points=points)


def ranges(bundle: Bundle) -> list[tuple[int, int]]:
    """The ranges of blocks to measure: parts of the model from both ends and its middle, and each kind of block alone
    where there are several, or few blocks.

    A block alone stays in the processor's caches from run to run, in a long stage it does not: a long model is measured
    in long ranges, since its stages are long.
    """
    n, uses = bundle.manifest.blocks, bundle.manifest.uses
    quarter, half = max(1, n // 4), max(1, n // 2)
    middle = range(1, n - 1) if n > 2 else range(n)
    kinds = {uses[block + 1].part: (block, block + 1) for block in reversed(middle)}
    found = list(kinds.values()) if len(kinds) > 1 or n < _FEW_BLOCKS else []
    found += [(0, quarter), (n - quarter, n)]
    if sum(entry.size_bytes for entry in bundle.tensors.values()) <= _WHOLE_LIMIT_BYTES:
        found += [(0, n), (0, half), (n - half, n), (quarter, max(quarter + 1, n - quarter))]
    return [(first, end) for first, end in dict.fromkeys(found) if end <= n]


def save(bundle: Bundle, profile: Profile) -> Path:
    """Write the profile into the bundle, aside and then renamed; the path of its file."""
    folder = bundle.path / FOLDER
    folder.mkdir(exist_ok=True)
    file = folder / profile.machine.file
    aside = folder / f".{file.name}.{os.getpid()}"
    aside.write_text(profile.model_dump_json(indent=1))
    return aside.replace(file)


def load(folder: Path, machine: Machine) -> tuple[Profile, str | None]:
    """The profile of `machine` in the bundle's folder, or another's with a warning that names both machines.

    BundleError where there is none, or one that is not valid.
    """
    files = sorted((folder / FOLDER).glob("*.json"))
    if not files:
        raise BundleError(f"bundle {folder} has no profile of any machine; make one with: stageline profile {folder}")
    own = folder / FOLDER / machine.file
    file = own if own in files else files[0]
    try:
        profile = Profile.model_validate_json(file.read_bytes())
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise BundleError(
            f"{file} is no valid profile ({place}: {first['msg']}); run stageline profile again"
        ) from error
    if profile.machine == machine:
        return profile, None
    return profile, (
        f"the profile is of another machine ({profile.machine}), not of this one ({machine}): times may be far off; "
        f"run stageline profile {folder}"
    )


def _on_worker(cores: tuple[int, ...], work: Callable[[], list[Point]]) -> list[Point]:
    """Run `work` on a thread pinned to `cores` and give what it gives or raises."""
    found: SimpleQueue[list[Point] | BaseException] = SimpleQueue()

    def told() -> None:
        try:
            found.put(work())
        except BaseException as error:
            found.put(error)

    start_worker("profile", cores, told)
    result = found.get()
    if isinstance(result, BaseException):
        raise result
    return result


def _range_points(bundle: Bundle, first: int, end: int, cores: tuple[int, ...], grids: Sequence[Grid]) -> list[Point]:
    """The times of one range for all shapes; called on the thread that runs the engines."""
    shapes = [shape for grid in grids for shape in grid.shapes()]
    cache = None
    if bundle.manifest.cached:
        cache = CacheSize(max(s.batch for s in shapes), max(s.past + s.length for s in shapes), "float32")
    parts = bundle.parts()
    points = []
    with tempfile.TemporaryDirectory() as scratch:
        before = _open(bundle, parts, 0, first, cores, cache, Path(scratch)) if first else None
        engine = _open(bundle, parts, first, end, cores, cache, Path(scratch))
        for shape in shapes:
            values = _model_inputs(bundle.manifest, shape)
            if before is not None:
                values.update(_run(before, values, before.output_names, cache))
            seconds, runs = _median_s(partial(_run, engine, values, engine.output_names, cache))
            points.append(
                Point(
                    threads=len(cores), batch=shape.batch, length=shape.length, past=shape.past,
                    first=first, end=end, seconds=seconds, runs=runs,
                )
            )  # fmt: skip
        for opened in (engine, before):
            if opened is not None:
                opened.close()
    return points


def _open(
    bundle: Bundle,
    parts: Sequence[ir.Model],
    first: int,
    end: int,
    cores: tuple[int, ...],
    cache: CacheSize | None,
    scratch: Path,
) -> Engine:
    """The engine of a stage of blocks `first` to `end` - 1."""
    counts = [count for count in (first, end - first, bundle.manifest.blocks - end) if count]
    number = 1 if first else 0
    model, stage = stitch(Plan.of(bundle.manifest, parts, counts), number, bundle.tensors, bundle.path)
    file = scratch / f"{first}-{end}.onnx"
    file.write_bytes(ir.to_proto(model).SerializeToString())
    return engine_factory("onnxruntime")(StageFile(number, file, bundle.path, stage.caches), CpuDevice(cores), cache)


def _run(
    engine: Engine, values: Mapping[str, Array], outputs: Sequence[str], cache: CacheSize | None
) -> dict[str, Array]:
    given = engine.run(values, outputs) if cache is None else engine.step(values, outputs, 0)
    return on_host(given, outputs)


def _model_inputs(manifest: Manifest, shape: Shape) -> dict[str, Array]:
    """Full rows of random tokens or pixels."""
    random = np.random.default_rng(0)
    sizes = shape.sizes()
    known = {"attention_mask": 1, "token_type_ids": 0, "past_lengths": shape.past, "new_lengths": shape.length}
    values: dict[str, Array] = {}
    for spec in manifest.inputs:
        dims = [d if isinstance(d, int) else sizes.get(d, 64) for d in spec.shape]
        if spec.name in known:
            values[spec.name] = np.full(dims, known[spec.name], spec.dtype)
        elif spec.name == "logits_at":
            last = np.arange(shape.length - dims[1], shape.length)
            values[spec.name] = np.broadcast_to(last, dims).astype(spec.dtype)
        elif spec.dtype.startswith("int"):
            values[spec.name] = random.integers(0, manifest.vocabulary or 2, dims).astype(spec.dtype)
        else:
            values[spec.name] = random.standard_normal(dims).astype("float32")
    return values


def _median_s(run: Callable[[], object]) -> tuple[float, int]:
    for _ in range(_WARM_UP_RUNS):
        run()
    taken: list[float] = []
    while len(taken) < _FEWEST_RUNS or (sum(taken) < _POINT_S and len(taken) < _MOST_RUNS):
        began = perf_counter()
        run()
        taken.append(perf_counter() - began)
    return statistics.median(taken), len(taken)


def _handover_s(cores: Sequence[int]) -> float:
    """Half of what a message takes to another pinned thread and back, the median."""
    there: SimpleQueue[object] = SimpleQueue()
    back: SimpleQueue[object] = SimpleQueue()

    def echo() -> None:
        for message in iter(there.get, None):
            back.put(message)

    taken: list[float] = []

    def send() -> None:
        for _ in range(_HANDOVERS):
            began = perf_counter()
            there.put(taken)
            back.get()
            taken.append((perf_counter() - began) / 2)
        there.put(None)

    workers: list[threading.Thread] = [start_worker("echo", cores[-1:], echo), start_worker("send", cores[:1], send)]  # type: ignore[arg-type]
    for worker in workers:
        worker.join()
    return statistics.median(taken)
