"""Chooses the engine of a bundle that may be loaded here, and checks its file before TensorRT reads it.

An engine file is code. It is loaded only if the engines' manifest lists it with its digest, and if it was built for
this GPU with this TensorRT from this stage.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from stageline.models.errors import EngineError
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.bundle.manifest import FileEntry, Manifest
from stageline.runtime.engines.tensorrt.flavour import FLAVOURS, Flavour
from stageline.runtime.engines.tensorrt.lower import Precision, float32_nodes
from stageline.runtime.engines.tensorrt.records import EngineRecord
from stageline.runtime.engines.tensorrt.store import read_engines
from stageline.runtime.engines.tensorrt.targets import PORTABLE, TargetGpu


@dataclass(frozen=True)
class CheckedEngine:
    """An engine of stage `number` that fits; `opened` checks its file as well."""

    bundle: Bundle
    number: int
    record: EngineRecord

    @property
    def flavour(self) -> Flavour:
        """The TensorRT that it was built with."""
        return FLAVOURS[self.record.flavour]

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """Its file, open at the start: the very file whose place, size and digest were compared. EngineError in one
        line if they are not those of the manifest."""
        advice = rebuild(self.bundle, self.record.target, self.record.precision)
        with open_checked(self.bundle.path, self.record.plan, f"the engine of stage {self.number}", advice) as file:
            yield file


def checked_engine(bundle: Bundle, number: int, gpu: TargetGpu, precision: Precision | None = None) -> CheckedEngine:
    """The engine of stage `number` for `gpu` in `precision` (None: in any, the one built last). One that was built for
    the GPU's own target is preferred to a portable one.

    EngineError in one line if there is none: what the nearest one was built for, and how to rebuild it.
    """
    stage = bundle.manifest.stages[number]
    records = [record for record in read_engines(bundle.path).engines if is_current(record, bundle.manifest)]
    records = [record for record in records if record.stage == stage.file]
    problems = [(record, _problem(record, bundle, gpu, precision)) for record in reversed(records)]
    fitting = [record for record, problem in problems if problem is None]
    if not fitting:
        raise EngineError(_refusal(number, bundle, gpu, precision, problems))
    return CheckedEngine(bundle, number, min(fitting, key=lambda record: record.target == PORTABLE))


def is_current(record: EngineRecord, manifest: Manifest) -> bool:
    """Whether the engine was built from the graph of one of the bundle's current stages."""
    digests = {entry.path: entry.sha256 for entry in manifest.files}
    return any(stage.file == record.stage for stage in manifest.stages) and digests[record.stage] == record.graph_sha256


def weight_digests(manifest: Manifest) -> dict[str, str]:
    """The digests of the weight files in the manifest."""
    entries = {entry.path: entry for entry in manifest.files}
    return {name: str(entries[name].sha256 or entries[name].header_sha256) for name in manifest.weight_files}


@contextmanager
def open_checked(bundle: Path, entry: FileEntry, what: str, advice: str) -> Iterator[BinaryIO]:
    """A listed file, open at its start, after its place, size and digest were checked. Another file that is renamed to
    its place meanwhile is not read."""
    path = bundle / entry.path
    if not path.resolve().is_relative_to(bundle.resolve()):
        raise EngineError(f"{what}: {entry.path} is outside the bundle. {advice}")
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise EngineError(f"{what}: {entry.path} is missing. {advice}") from error
    with file:
        size = os.fstat(file.fileno()).st_size
        if size != entry.size_bytes:
            how = "is truncated" if size < entry.size_bytes else "was changed"
            raise EngineError(f"{what}: {entry.path} {how}: {size} bytes, {entry.size_bytes} were built. {advice}")
        if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
            raise EngineError(f"{what}: {entry.path} was changed since it was built (SHA-256 differs). {advice}")
        file.seek(0)
        yield file


def rebuild(bundle: Bundle, target: str, precision: Precision | None) -> str:
    """Advice: the command that builds it again."""
    return f"Rebuild: stageline build {bundle.path} --target {target}" + (
        f" --precision {precision}" if precision else ""
    )


_Check = Callable[[EngineRecord, Bundle, TargetGpu, Precision | None], str | None]


def _target(record: EngineRecord, bundle: Bundle, gpu: TargetGpu, precision: Precision | None) -> str | None:
    flavour = FLAVOURS[record.flavour]
    if flavour.runs(record.target, gpu):
        return None
    here = f"this GPU is {gpu.target} ({gpu.name})"
    return f"{here}, and such engines run on {flavour.portable_means}" if record.target == PORTABLE else here


def _version(record: EngineRecord, bundle: Bundle, gpu: TargetGpu, precision: Precision | None) -> str | None:
    flavour = FLAVOURS[record.flavour]
    here = flavour.version
    if here is None:
        return f'{flavour.title} is not installed: pip install "stageline[{flavour.extra}]"'
    if here == record.version or (record.options.version_compatible and _forward(record.version, here)):
        return None
    return f"{flavour.title} {here} is installed here"


def _weights(record: EngineRecord, bundle: Bundle, gpu: TargetGpu, precision: Precision | None) -> str | None:
    if record.options.stripped or record.weight_files == weight_digests(bundle.manifest):
        return None
    return "the bundle's weights have changed since"


def _precision(record: EngineRecord, bundle: Bundle, gpu: TargetGpu, precision: Precision | None) -> str | None:
    return None if precision in (None, record.precision) else f"{precision} is requested"


def _float32_nodes(record: EngineRecord, bundle: Bundle, gpu: TargetGpu, precision: Precision | None) -> str | None:
    if record.float32_nodes == float32_nodes(bundle.manifest, record.precision):
        return None
    return "the bundle keeps other nodes in float32 now"


_CHECKS: tuple[_Check, ...] = (_target, _version, _weights, _float32_nodes, _precision)
"""In order: the engine that fails the last of them is the nearest one."""


def _problem(
    record: EngineRecord, bundle: Bundle, gpu: TargetGpu, precision: Precision | None
) -> tuple[int, str] | None:
    """The first check that the engine fails, and why."""
    for place, check in enumerate(_CHECKS):
        reason = check(record, bundle, gpu, precision)
        if reason is not None:
            return place, reason
    return None


def _refusal(
    number: int,
    bundle: Bundle,
    gpu: TargetGpu,
    precision: Precision | None,
    problems: Iterable[tuple[EngineRecord, tuple[int, str] | None]],
) -> str:
    advice = rebuild(bundle, gpu.target, precision)
    nearest: tuple[int, str] | None = None
    for record, problem in problems:
        if problem is not None and (nearest is None or problem[0] > nearest[0]):
            flavour = FLAVOURS[record.flavour].title
            built = (
                f"stage {number} was built for {record.target} in {record.precision} with {flavour} {record.version}"
            )
            nearest = problem[0], f"{built}; {problem[1]}. {advice}"
    if nearest is None:
        return f"stage {number} has no TensorRT engine in {bundle.path}. {advice.replace('Rebuild', 'Build')}"
    return nearest[1]


def _forward(built: str, here: str) -> bool:
    """Whether a version-compatible engine of version `built` runs on `here`: the same major version, not an older
    one."""
    was, now = (tuple(int(part) for part in version.split(".")[:3]) for version in (built, here))
    return was[0] == now[0] and was <= now
