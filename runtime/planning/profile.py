"""What was measured on a machine: a bundle's parts, stored as profiles/<machine>.json in the bundle.

The file is not listed in the manifest: a bundle may hold such files, and only the planner reads it. `measuring.py`
measures.
"""

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from pydantic import Field
from stageline.models.errors import BundleError
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.engines.base import WeightDtype
from stageline.runtime.validation import Data, read_document
from stageline.runtime.workload import Shape

FOLDER = "profiles"


class Machine(Data):
    """What measurements hold for; `weights`: what the engine quantised those of matrix products to, None for as they
    are."""

    cpu: str
    processors: int
    engine: str
    engine_version: str
    weights: WeightDtype | None = None

    @classmethod
    def here(cls, weights: WeightDtype | None = None) -> "Machine":
        """This machine with the engine onnxruntime and such weights."""
        try:
            info = Path("/proc/cpuinfo").read_text()
        except OSError:
            info = ""
        fields = [
            re.search(rf"^{name}\s*:\s*(.+)$", info, re.MULTILINE) for name in ("model name", "model", "stepping")
        ]
        name, model, stepping = (found[1] if found else "?" for found in fields)
        cpu = f"{name} (model {model}, stepping {stepping})"
        return cls(
            cpu=cpu,
            processors=os.cpu_count() or 1,
            engine="onnxruntime",
            engine_version=version("onnxruntime"),
            weights=weights,
        )

    @property
    def file(self) -> str:
        """The profile's file name."""
        return re.sub(r"[^a-z0-9]+", "-", str(self).lower()).strip("-") + ".json"

    @property
    def weights_told(self) -> str:
        """The weights in words."""
        return f"{self.weights} weights" if self.weights else "weights as they are"

    def same_but_weights(self, other: "Machine") -> bool:
        """Whether both are one machine with one engine, whatever the weights."""
        return self.model_copy(update={"weights": other.weights}) == other

    def __str__(self) -> str:
        quantised = f", {self.weights_told}" if self.weights else ""
        return f"{self.cpu}, {self.processors} processors, {self.engine} {self.engine_version}{quantised}"


class Point(Data):
    """The median time of a stage of blocks `first` to `end` - 1 for a micro-batch."""

    threads: int = Field(ge=1)
    batch: int = Field(ge=1)
    length: int = Field(ge=1)
    past: int = Field(ge=0)
    first: int = Field(ge=0)
    end: int = Field(ge=1)
    seconds: float = Field(gt=0)
    runs: int = Field(ge=1)


class Contention(Data):
    """By what share stages take longer for each other stage that runs meanwhile, each on its own processors."""

    threads: int = Field(ge=1)
    batch: int = Field(ge=1)
    length: int = Field(ge=1)
    past: int = Field(ge=0)
    share: float = Field(ge=0)


class MachineProfile(Data):
    """What was measured on a machine. `handover_s` is that of a micro-batch from a worker to the next, `host_step_s`
    what the driver of generation takes for a step besides, and `host_row_s` for each row of it."""

    format: Literal["stageline-profile"] = "stageline-profile"
    version: Literal[2] = 2
    machine: Machine
    handover_s: float = Field(ge=0)
    host_step_s: float = Field(default=0.0, ge=0)
    host_row_s: float = Field(default=0.0, ge=0)
    points: tuple[Point, ...] = Field(min_length=1)
    contention: tuple[Contention, ...] = ()


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

    def corners(self) -> list[Shape]:
        """The least and the largest of each."""
        ends = [sorted({min(values), max(values)}) for values in (self.batches, self.lengths, self.pasts)]
        return [Shape(*corner) for corner in itertools.product(*ends)]


def save(bundle: Bundle, profile: MachineProfile) -> Path:
    """Write the profile into the bundle, aside and then renamed; the path of its file."""
    folder = bundle.path / FOLDER
    folder.mkdir(exist_ok=True)
    file = folder / profile.machine.file
    aside = folder / f".{file.name}.{os.getpid()}"
    aside.write_text(profile.model_dump_json(indent=1))
    return aside.replace(file)


def command(folder: Path, weights: WeightDtype | None) -> str:
    """What to type to have such a profile."""
    return f"stageline profile {folder}" + (f" --quantise {weights}" if weights else "")


def load(folder: Path, machine: Machine) -> tuple[MachineProfile, str | None]:
    """The profile of `machine` in the bundle's folder, or the nearest other one with a warning that names both.

    The same machine with other weights is nearer than another machine with these: the parts' shares of the time, the
    threads that were measured and what the host takes stay much the same. BundleError where there is none, or one that
    is not valid.
    """
    files = sorted((folder / FOLDER).glob("*.json"))
    wanted = command(folder, machine.weights)
    if not files:
        raise BundleError(f"bundle {folder} has no profile of any machine; make one with: {wanted}")
    own = folder / FOLDER / machine.file
    candidates = [own] if own in files else files
    profile = min(
        (read_document(MachineProfile, file, "run stageline profile again") for file in candidates),
        key=lambda p: (not p.machine.same_but_weights(machine), p.machine.weights != machine.weights),
    )
    if profile.machine == machine:
        return profile, None
    if profile.machine.same_but_weights(machine):
        told = f"the profile is of {profile.machine.weights_told}, not of {machine.weights_told}"
    else:
        told = f"the profile is of another machine ({profile.machine}), not of this one ({machine})"
    return profile, f"{told}: times may be far off; run {wanted}"
