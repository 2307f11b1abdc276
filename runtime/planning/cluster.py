"""The devices to plan for (cores of this machine, kinds of the catalogue, or a cluster file) and their links."""

import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
from stageline.models.errors import StagelineError
from stageline.runtime.planning.calibrate import Speed, known_speed
from stageline.runtime.planning.cores import cores
from stageline.runtime.planning.device_kinds import DeviceKind, Positive, catalogue, device_kind
from stageline.runtime.planning.problem import Link
from stageline.runtime.validation import Data, first_error

NotNegative = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Kind:
    """Equal devices. `device` is None for this machine's CPU; each then has `threads` cores."""

    name: str
    device: DeviceKind | None
    names: tuple[str, ...]
    threads: int = 1

    @property
    def count(self) -> int:
        """Number of devices."""
        return len(self.names)


@dataclass(frozen=True)
class Cluster:
    """Kinds of devices and their links. `ordered`: each stage's device must come after that of the stage before."""

    kinds: tuple[Kind, ...]
    links: tuple[tuple[Link | None, ...], ...]
    ordered: bool = False

    @property
    def local(self) -> bool:
        """Whether any device is in this machine."""
        return any(kind.device is None for kind in self.kinds)


class _Wire(Data):
    gb_s: Positive
    latency_us: NotNegative = 0.0

    def link(self) -> Link:
        return Link(self.gb_s * 1e9, self.latency_us / 1e6)


class _LinkEntry(_Wire):
    source: str = pydantic.Field(alias="from")
    target: str = pydantic.Field(alias="to")


class _ClusterFile(Data):
    ordered: bool = False
    devices: list[dict[str, Any]] = pydantic.Field(min_length=1)
    links: tuple[_LinkEntry, ...] = ()
    network: _Wire | None = None


def parse_devices(text: str, handover_s: float = 0.0) -> Cluster:
    """The devices of `--devices`: `cpu:0,cpu:1` (a core each), `cpu:0+1` (one device of two cores), `cpu` (all cores),
    `2xL4,H100` (kinds of the catalogue). StagelineError for an unknown one.

    A link between two kinds is as fast as the slower of the two; cores of this machine hand over in `handover_s`.
    """
    names: dict[tuple[str, int], list[str]] = {}
    devices: dict[tuple[str, int], DeviceKind | None] = {}
    for word in text.split(","):
        found = re.fullmatch(r"\s*(?:(\d+)x)?([A-Za-z0-9:+-]+)\s*", word)
        if found is None or found[1] == "0":
            raise StagelineError(f"{word.strip()!r} is not a device; write cpu:0, cpu:0+1, cpu, H100 or 4xL4")
        count, name = int(found[1] or 1), found[2]
        if name.split(":")[0].lower() == "cpu":
            key, device = ("cpu", _threads(name)), None
        elif name.lower().startswith("cuda"):
            raise StagelineError(
                f"{name}: GPUs of this machine are not measured yet; name their kind: {', '.join(catalogue())}"
            )
        else:
            device = device_kind(name)
            key = (next(kind for kind, known in catalogue().items() if known is device), 1)
        devices[key] = device
        taken = names.setdefault(key, [])
        taken += [name if device is None else f"{key[0]}:{len(taken) + number}" for number in range(count)]
    kinds = tuple(Kind(key[0], devices[key], tuple(names[key]), key[1]) for key in names)
    return Cluster(kinds, tuple(tuple(_near(a, b, handover_s) for b in kinds) for a in kinds))


def unmeasured(cluster: Cluster, speed_of: Callable[[int, int], Speed | None] = known_speed) -> Cluster:
    """The cluster with a roofline of this machine's cores, for want of a profile.

    `speed_of`: what so many devices of so many cores reach side by side (default: what was measured before). Where it
    is not known they count as usual cores.
    """
    local = sum(kind.count for kind in cluster.kinds if kind.device is None)
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / max(1, local) / 1e9
    kinds = tuple(
        kind
        if kind.device is not None
        else replace(kind, device=cores(kind.threads, memory_gb, speed_of(local, kind.threads)))
        for kind in cluster.kinds
    )
    return replace(cluster, kinds=kinds)


def _threads(name: str) -> int:
    _, _, cores = name.partition(":")
    available = os.cpu_count() or 1
    if not cores:
        return available
    numbers = cores.split("+")
    if not all(number.isdigit() and int(number) < available for number in numbers):
        raise StagelineError(f"unknown device {name!r}; this machine has cores cpu:0 to cpu:{available - 1}")
    return len(numbers)


def _near(a: Kind, b: Kind, handover_s: float) -> Link:
    """The link between devices of one machine."""
    if a.device is None and b.device is None:
        return Link(latency_s=handover_s)
    sides = [kind.device for kind in (a, b) if kind.device is not None]
    return Link(min(side.peer_gb_s for side in sides) * 1e9, max(side.peer_latency_us for side in sides) / 1e6)


def read_cluster(path: Path) -> Cluster:
    """The cluster of a file (docs/how-to/plan.md specifies it). StagelineError in one line if it is not valid."""
    try:
        data = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StagelineError(f"{path} is not a TOML file: {error}") from error
    file = _valid(_ClusterFile, data, path, "")
    kinds = tuple(kind for entry in file.devices for kind in _kinds(entry, path, file.ordered))
    entries = list(dict.fromkeys(kind.name for kind in kinds))
    repeated = [name for name in entries if sum(entry.get("name") == name for entry in file.devices) > 1]
    if repeated:
        raise StagelineError(f"{path}: two devices are called {repeated[0]!r}; give each its own name, or a count")
    given: dict[tuple[str, str], Link] = {}
    for link in file.links:
        for end in (link.source, link.target):
            if end not in entries:
                raise StagelineError(f"{path}: a link leads to unknown device {end!r}; known: {', '.join(entries)}")
        given[link.source, link.target] = link.link()
    if file.ordered:
        _refuse_circle(path, [pair for pair in given if pair[0] != pair[1]])
    else:
        given = {**{(b, a): link for (a, b), link in given.items()}, **given}

    def between(a: Kind, b: Kind) -> Link | None:
        own = _near(a, b, 0.0) if a.name == b.name else None
        return given.get((a.name, b.name)) or own or (file.network.link() if file.network else None)

    for place, a in enumerate(kinds):
        for b in kinds[place + 1 : place + 2] if file.ordered else kinds[place + 1 :]:
            if between(a, b) is None:
                raise StagelineError(
                    f"{path}: no link from {a.name!r} to {b.name!r}; "
                    "give one under [[links]], or one for all as [network]"
                )
    return Cluster(kinds, tuple(tuple(between(a, b) for b in kinds) for a in kinds), file.ordered)


def _kinds(entry: Mapping[str, Any], path: Path, ordered: bool) -> list[Kind]:
    own = dict(entry)
    name, kind, count = own.pop("name", None), own.pop("kind", None), own.pop("count", 1)
    if not isinstance(name, str) or not name:
        raise StagelineError(f"{path}: a device has no name")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise StagelineError(f"{path}: device {name!r} has count {count!r}; give at least 1")
    try:
        base = device_kind(str(kind)).model_dump() if kind is not None else _DEFAULTS
    except StagelineError as error:
        raise StagelineError(f"{path}: device {name!r}: {error}") from error
    device = _valid(DeviceKind, {**base, **own}, path, f"device {name!r}: ")
    names = [name if count == 1 else f"{name}:{number}" for number in range(count)]
    if ordered:
        return [Kind(name, device, (one,)) for one in names]
    return [Kind(name, device, tuple(names))]


_DEFAULTS: dict[str, Any] = {
    "source": "the cluster file",
    "compute_efficiency": 0.6,
    "memory_efficiency": 0.75,
    "launch_us": 20.0,
    "peer_latency_us": 10.0,
    "idle_w": 0.0,
    "busy_w": 1e-9,
    "price_per_h": 0.0,
}
_Model = TypeVar("_Model", bound=pydantic.BaseModel)


def _valid(model: type[_Model], data: Mapping[str, Any], path: Path, where: str) -> _Model:
    try:
        return model.model_validate(data)
    except pydantic.ValidationError as error:
        raise StagelineError(f"{path}: {where}{first_error(error)}") from error


def _refuse_circle(path: Path, pairs: Sequence[tuple[str, str]]) -> None:
    """StagelineError if links of ordered devices form a cycle."""
    after: dict[str, list[str]] = {}
    for a, b in pairs:
        after.setdefault(a, []).append(b)

    def walk(trail: list[str], done: set[str]) -> None:
        for name in after.get(trail[-1], []):
            if name in trail:
                circle = [*trail[trail.index(name) :], name]
                raise StagelineError(
                    f"{path}: links form a cycle: {' -> '.join(circle)}; "
                    "ordered devices lead from the first stage to the last"
                )
            if name not in done:
                walk([*trail, name], done)
        done.add(trail[-1])

    done: set[str] = set()
    for name in list(after):
        if name not in done:
            walk([name], done)
