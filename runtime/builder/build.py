"""Building a bundle's engines: existing ones are kept, missing ones are built, each in a process of its own."""

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from stageline.models.errors import BundleError, EngineError
from stageline.models.tensors import PackedEntry
from stageline.runtime.builder.memory import at_a_time, check_fits
from stageline.runtime.builder.network import REVISION
from stageline.runtime.builder.processes import Answer, Workers
from stageline.runtime.builder.profiles import narrowed, profiles_of
from stageline.runtime.builder.worker import Request, Result
from stageline.runtime.bundle.float32_nodes import check_float32_nodes
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.manifest import FileEntry
from stageline.runtime.devices.cpu import allowed_cores
from stageline.runtime.engines.base import StageFile
from stageline.runtime.engines.tensorrt.flavour import Flavour, check_buildable
from stageline.runtime.engines.tensorrt.guard import is_current, weight_digests
from stageline.runtime.engines.tensorrt.lower import (
    QUANTISED,
    Lowered,
    Precision,
    computed_precision,
    float32_nodes,
    lower,
)
from stageline.runtime.engines.tensorrt.records import EngineRecord, OptimizationProfile, Options
from stageline.runtime.engines.tensorrt.store import FOLDER, EngineStore, locked
from stageline.runtime.engines.tensorrt.targets import gpu_here
from stageline.runtime.workload import Workload

_GENERATIONS = {"sm75": "Turing", "sm80": "Ampere", "sm86": "Ampere"}
_LACKING: dict[Precision, tuple[str, ...]] = {"bf16": ("sm75",), "fp8": ("sm75", "sm80", "sm86"), "int4": ("sm75",)}
"""Precision -> targets that TensorRT does not compile it for."""


@dataclass(frozen=True)
class WantedEngine:
    """One kind of engine to build for every stage. `flavour` builds it; `target` is never `here`."""

    flavour: Flavour
    target: str
    precision: Precision


@dataclass(frozen=True)
class BuildOutcome:
    """The outcome for one engine. `record` is None if it could not be built, and `error` is the reason. `built` is
    False if it existed already."""

    stage: int
    wanted: WantedEngine
    record: EngineRecord | None
    built: bool
    error: str | None = None


@dataclass(frozen=True)
class BuildProgress:
    """Progress of the build of an engine: TensorRT's name of the phase, and its steps."""

    stage: int
    wanted: WantedEngine
    phase: str
    step: int
    steps: int


@dataclass(frozen=True)
class _Job:
    number: int
    wanted: WantedEngine
    lowered: Lowered
    key: str
    weights_sha256: str | None
    profiles: tuple[OptimizationProfile, ...]
    file: str
    """Path of the plan in the bundle."""


def build(
    bundle: Bundle,
    wanted: Sequence[WantedEngine],
    workload: Workload,
    options: Options,
    *,
    jobs: int | None = None,
    max_bytes: float | None = None,
    progress: Callable[[BuildProgress], None] = lambda step: None,
    done: Callable[[BuildOutcome], None] = lambda outcome: None,
) -> list[BuildOutcome]:
    """Build the missing engines of all stages, `jobs` at a time (None: as many as cores and memory allow), and return
    the outcome for each, stage by stage. `progress` and `done` are called on other threads. Builds together stay within
    `max_bytes` of host memory (None: what is available), by the estimates of stageline.runtime.builder.memory.

    An engine is kept once it is built, whatever happens to the others. A refusal by TensorRT is an outcome. BundleError
    if the disk is full or another build is running. EngineError, and nothing is built, if a build alone would take more
    than `max_bytes`.
    """
    for kind in wanted:
        check(kind, options, bundle.manifest.dtype)
        if float32_nodes(bundle.manifest, kind.precision):
            check_float32_nodes(bundle)
    with locked(bundle.path) as store:
        todo: list[_Job] = []
        outcomes: list[BuildOutcome] = []
        for job in _jobs(bundle, wanted, workload, options):
            found = job if isinstance(job, BuildOutcome) else _present(store, bundle, job)
            if isinstance(found, _Job):
                todo.append(found)
            else:
                outcomes.append(found)
                done(found)
        if todo:
            kinds = [(job.number, job.wanted.precision) for job in todo]
            if max_bytes is not None:
                check_fits(bundle, kinds, max_bytes)
            building = _Building(store, bundle, workload, options, progress)
            outcomes += building.build_all(todo, at_a_time(bundle, kinds, jobs, max_bytes), done)
    order = {kind: place for place, kind in enumerate(wanted)}
    return sorted(outcomes, key=lambda outcome: (outcome.stage, order[outcome.wanted]))


def check(wanted: WantedEngine, options: Options, activations: str) -> None:
    """EngineError if the flavour cannot build such engines of a bundle with `activations`."""
    flavour = wanted.flavour
    if flavour.too_old is not None:
        raise EngineError(flavour.too_old)
    check_buildable(flavour, wanted.target, gpu_here())
    for precision in (wanted.precision, computed_precision(wanted.precision, activations)):
        if wanted.target in _LACKING.get(precision, ()):
            raise EngineError(
                f"{wanted.target} ({_GENERATIONS[wanted.target]}) does not compute in {precision}; "
                "choose --precision fp16"
            )
    if options.stripped and wanted.precision in QUANTISED:
        raise EngineError(
            f"--stripped reads weights unchanged from the bundle, and {wanted.precision} quantises them; leave it "
            "out, or choose --precision fp16"
        )
    if options.version_compatible and not flavour.version_compatible:
        raise EngineError(f"{flavour.title} builds no version-compatible engines: it has no lean runtime; leave it out")


def stale(bundle: Bundle, store: EngineStore) -> set[str]:
    """The plan files of engines of stages that the bundle no longer has."""
    return {record.plan.path for record in store.manifest.engines if not is_current(record, bundle.manifest)}


def _jobs(
    bundle: Bundle, wanted: Sequence[WantedEngine], workload: Workload, options: Options
) -> list["_Job | BuildOutcome"]:
    manifest, digests = bundle.manifest, _digests(bundle)
    result: list[_Job | BuildOutcome] = []
    for number, stage in enumerate(manifest.stages):
        file = StageFile(number, bundle.path / stage.file, bundle.path, stage.caches)

        @cache
        def lowered(precision: Precision, file: StageFile = file) -> Lowered:
            wide = float32_nodes(manifest, precision)
            return lower(file, precision, workload.capacity, options.stripped, wide)

        for kind in wanted:
            try:
                graph = lowered(kind.precision)
                profiles = narrowed(profiles_of(manifest, workload), graph.inputs)
            except EngineError as error:
                result.append(BuildOutcome(number, kind, None, False, str(error)))
                continue
            sources = dict.fromkeys(str(weight.tensor.name) for weight in graph.weights.values())
            weights = None if options.stripped else digests(tuple(sources))
            key = _key(kind, graph, weights, profiles, options)
            blocks = f"{stage.first_block:03}-{stage.last_block:03}"
            name = f"{FOLDER}/{blocks}.{kind.target}.{kind.precision}.{key[:8]}.plan"
            result.append(_Job(number, kind, graph, key, weights, profiles, name))
    return result


def _key(
    kind: WantedEngine,
    lowered: Lowered,
    weights: str | None,
    profiles: tuple[OptimizationProfile, ...],
    options: Options,
) -> str:
    """The digest of everything that an engine file depends on. The lowered graph covers the stage's graph, the
    precision, the capacity of caches, and the code that lowers."""
    document = {
        "graph": hashlib.sha256(lowered.proto).hexdigest(),
        "weights": weights,
        "flavour": kind.flavour.module,
        "version": kind.flavour.version,
        "target": kind.target,
        "profiles": [profile.model_dump(by_alias=True) for profile in profiles],
        "options": options.model_dump(),
        "revision": REVISION,
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _digests(bundle: Bundle) -> Callable[[tuple[str, ...]], str]:
    """A function from names of tensors to the digest of their values; each tensor is read once."""

    @cache
    def of_tensor(name: str) -> bytes:
        entry = bundle.tensors[name]
        digest = hashlib.sha256(f"{entry.dtype} {entry.shape}".encode())
        if isinstance(entry, PackedEntry):
            digest.update(f"{entry.packing.method} {sorted(entry.packing.settings.items())}".encode())
        parts = entry.parts.values() if isinstance(entry, PackedEntry) else [entry]
        for part in parts:
            with part.file.open("rb") as file:
                file.seek(part.offset)
                left = part.size_bytes
                while left and (data := file.read(min(left, 1 << 24))):
                    digest.update(data)
                    left -= len(data)
        return digest.digest()

    @cache
    def of_tensors(names: tuple[str, ...]) -> str:
        with ThreadPoolExecutor(len(allowed_cores())) as pool:
            digests = list(pool.map(of_tensor, names))
        together = hashlib.sha256()
        for name, digest in zip(names, digests, strict=True):
            together.update(name.encode() + b"\0" + digest)
        return together.hexdigest()

    return of_tensors


def _present(store: EngineStore, bundle: Bundle, job: _Job) -> "_Job | BuildOutcome":
    """The existing engine if its file is intact, its record updated for the weight files; else the job."""
    for record in store.manifest.engines:
        if record.key == job.key and is_current(record, bundle.manifest) and _whole(bundle.path, record.plan):
            files = weight_digests(bundle.manifest)
            wide = float32_nodes(bundle.manifest, record.precision)
            if (record.weight_files, record.float32_nodes) != (files, wide):
                record = record.model_copy(update={"weight_files": files, "float32_nodes": wide})
                store.put(record)
            return BuildOutcome(job.number, job.wanted, record, False)
    return job


def _whole(bundle: Path, entry: FileEntry) -> bool:
    file = bundle / entry.path
    if not file.is_file() or file.stat().st_size != entry.size_bytes:
        return False
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == entry.sha256


class _Building:
    """The running builds for one bundle."""

    def __init__(
        self,
        store: EngineStore,
        bundle: Bundle,
        workload: Workload,
        options: Options,
        progress: Callable[[BuildProgress], None],
    ) -> None:
        self.store, self.bundle, self.workload, self.options, self.progress = store, bundle, workload, options, progress
        self.workers = Workers()
        self.lock = threading.Lock()  # around the store

    def build_all(self, todo: Sequence[_Job], jobs: int, done: Callable[[BuildOutcome], None]) -> list[BuildOutcome]:
        def one(job: _Job) -> BuildOutcome:
            outcome = self.build(job)
            done(outcome)
            return outcome

        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(one, job) for job in todo]
            try:
                return [future.result() for future in as_completed(futures)]
            except BaseException:  # the disk is full, or the user pressed ^C
                pool.shutdown(wait=False, cancel_futures=True)
                self.workers.stop()
                raise

    def build(self, job: _Job) -> BuildOutcome:
        """Build one engine and keep it. BundleError if it cannot be written."""
        report = job.file.removesuffix(".plan") + ".json"
        timings = f"{job.file}.timings" if job.wanted.flavour.keeps_timings else None
        written = [path for path in (job.file, report, timings) if path is not None]
        try:
            answer = self.workers.run(self.request(job, *written), lambda step: self.progress(_step(job, step)))
            if "error" in answer:
                return BuildOutcome(job.number, job.wanted, None, False, str(answer["error"]))
            if "os_error" in answer:
                raise self.not_written(str(answer["os_error"]))
            result = Result.model_validate(answer["result"])
            record = self.record(job, result, report)
            with self.lock:
                self.store.keep(job.file)
                self.store.keep(report)
                self.store.put(record)
                if timings is not None and result.timings is not None:
                    self.store.put_timings(timings, _timings(job.wanted), result.timings)
        except OSError as error:
            raise self.not_written(error.strerror or str(error)) from error
        finally:
            for path in written:
                self.store.aside(path).unlink(missing_ok=True)
        return BuildOutcome(job.number, job.wanted, record, True)

    def request(self, job: _Job, plan: str, report: str, timings: str | None = None) -> Request:
        stage = self.bundle.manifest.stages[job.number]
        return Request(
            stage=StageFile(job.number, self.bundle.path / stage.file, self.bundle.path, stage.caches),
            flavour=job.wanted.flavour.name,
            target=job.wanted.target,
            precision=job.wanted.precision,
            float32_nodes=float32_nodes(self.bundle.manifest, job.wanted.precision),
            capacity=self.workload.capacity,
            profiles=job.profiles,
            options=self.options,
            plan=self.store.aside(plan),
            report=self.store.aside(report),
            timings=self.store.aside(timings) if timings is not None else None,
            known_timings=self.known_timings(job.wanted),
        )

    def record(self, job: _Job, result: Result, report: str) -> EngineRecord:
        stage, caches = self.bundle.manifest.stages[job.number], job.lowered.caches
        graph = next(entry for entry in self.bundle.manifest.files if entry.path == stage.file)
        return EngineRecord(
            stage=stage.file,
            plan=result.plan.model_copy(update={"path": job.file}),
            report=result.report.model_copy(update={"path": report}),
            key=job.key,
            graph_sha256=str(graph.sha256),
            weights_sha256=job.weights_sha256,
            weight_files=weight_digests(self.bundle.manifest),
            flavour=job.wanted.flavour.name,
            version=str(job.wanted.flavour.version),
            target=job.wanted.target,
            precision=job.wanted.precision,
            float32_nodes=float32_nodes(self.bundle.manifest, job.wanted.precision),
            computes=str(job.lowered.computes.numpy()),
            options=self.options,
            profiles=job.profiles,
            inputs=job.lowered.inputs,
            outputs=job.lowered.outputs,
            weights=job.lowered.weight_specs if self.options.stripped else (),
            capacity=self.workload.capacity if caches else None,
            caches=caches,
            build_s=result.build_s,
            peak_bytes=result.peak_bytes,
        )

    def known_timings(self, wanted: WantedEngine) -> Path | None:
        """The stored timing cache, if its file is intact."""
        entry = next((kept for kept in self.store.manifest.timings if kept.path == _timings(wanted)), None)
        return self.bundle.path / entry.path if entry is not None and _whole(self.bundle.path, entry) else None

    def not_written(self, reason: str) -> BundleError:
        return BundleError(
            f"cannot write engines into {self.bundle.path}: {reason}; finished engines are kept: run the same "
            "command again to continue"
        )


def _step(job: _Job, answer: Answer) -> BuildProgress:
    return BuildProgress(
        job.number, job.wanted, str(answer["phase"]), int(str(answer["step"])), int(str(answer["steps"]))
    )


def _timings(wanted: WantedEngine) -> str:
    """The file of the timing cache of a flavour, version and target."""
    return f"{FOLDER}/{wanted.flavour.name}-{wanted.flavour.version}.{wanted.target}.timings"
