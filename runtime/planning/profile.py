"""What `measure.py` measured of a bundle's parts on a machine, stored as profiles/<machine>.json in the bundle.

The manifest does not list these files: they are optional, and only planning and rebalancing read them.
"""

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, Field
from stageline.models.errors import BundleError
from stageline.runtime.bundle.folder import Bundle
from stageline.runtime.engines.base import WeightDtype
from stageline.runtime.validation import Data, read_document
from stageline.runtime.workload import Shape

FOLDER = "profiles"


class Machine(Data):
    """What measurements hold for: the CPU or GPU, the cores, the engine, and what it quantises weights of matrix
    products to."""

    cpu: str
    cores: int = Field(validation_alias=AliasChoices("cores", "processors"), serialization_alias="processors")
    engine: str
    engine_version: str
    quantise: WeightDtype | None = Field(
        default=None, validation_alias=AliasChoices("quantise", "weights"), serialization_alias="weights"
    )

    @classmethod
    def here(cls, quantise: WeightDtype | None = None, engine: str = "onnxruntime") -> "Machine":
        """This machine with `engine`, opened with `quantise`."""
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
            cores=os.cpu_count() or 1,
            engine=engine,
            engine_version=version(engine),
            quantise=quantise,
        )

    @property
    def file(self) -> str:
        """The profile's file name."""
        return re.sub(r"[^a-z0-9]+", "-", str(self).lower()).strip("-") + ".json"

    @property
    def weights(self) -> str:
        """The precision of the weights, for people."""
        return f"{self.quantise} weights" if self.quantise else "weights that are not quantised"

    def same_but_weights(self, other: "Machine") -> bool:
        """Whether both are the same machine and engine, ignoring `quantise`."""
        return self.model_copy(update={"quantise": other.quantise}) == other

    def __str__(self) -> str:
        quantised = f", {self.weights}" if self.quantise else ""
        return f"{self.cpu}, {self.cores} cores, {self.engine} {self.engine_version}{quantised}"


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
    """By what share stages, each on its own cores, take longer for each other stage that runs at the same time."""

    threads: int = Field(ge=1)
    batch: int = Field(ge=1)
    length: int = Field(ge=1)
    past: int = Field(ge=0)
    share: float = Field(ge=0)


class MachineProfile(Data):
    """What was measured on a machine. `handover_s`: a micro-batch from one worker to the next. `host_step_s` and
    `host_row_s`: the time of generation's driver for a step, and for each of its rows."""

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
        """All shapes."""
        for batch in self.batches:
            for length in self.lengths:
                yield from (Shape(batch, length, past) for past in self.pasts)

    def corners(self) -> list[Shape]:
        """The shapes of minimal and maximal sizes."""
        ends = [sorted({min(values), max(values)}) for values in (self.batches, self.lengths, self.pasts)]
        return [Shape(*corner) for corner in itertools.product(*ends)]


def write_profile(bundle: Bundle, profile: MachineProfile) -> Path:
    """Write the profile into the bundle, to a temporary file that is then renamed, and return its path."""
    folder = bundle.path / FOLDER
    folder.mkdir(exist_ok=True)
    file = folder / profile.machine.file
    aside = folder / f".{file.name}.{os.getpid()}"
    aside.write_text(profile.model_dump_json(indent=1, by_alias=True))
    return aside.replace(file)


def command(folder: Path, quantise: WeightDtype | None, engine: str = "onnxruntime") -> str:
    """The command that makes such a profile."""
    chosen = "" if engine == "onnxruntime" else f" --engine {engine}"
    return f"stageline profile {folder}{chosen}" + (f" --quantise {quantise}" if quantise else "")


def has_profile(folder: Path) -> bool:
    """Whether the bundle holds a profile of any machine."""
    return any((folder / FOLDER).glob("*.json"))


def read_profile(folder: Path, machine: Machine) -> tuple[MachineProfile, str | None]:
    """The profile of `machine` in the bundle's folder, or the nearest other one with a warning that names both.

    The same machine with another `quantise` is nearer than another machine with the same: the parts' shares of the
    time, the measured threads and the host's times stay similar. BundleError if there is no profile, or one is not
    valid.
    """
    files = sorted((folder / FOLDER).glob("*.json"))
    wanted = command(folder, machine.quantise, machine.engine)
    if not files:
        raise BundleError(f"bundle {folder} has no profile of any machine; make one with: {wanted}")
    own = folder / FOLDER / machine.file
    candidates = [own] if own in files else files
    profile = min(
        (read_document(MachineProfile, file, "run stageline profile again") for file in candidates),
        key=lambda p: (not p.machine.same_but_weights(machine), p.machine.quantise != machine.quantise),
    )
    if profile.machine == machine:
        return profile, None
    if profile.machine.same_but_weights(machine):
        message = f"the profile is for {profile.machine.weights}, not for {machine.weights}"
    else:
        message = f"the profile is from another machine ({profile.machine}), not from this one ({machine})"
    return profile, f"{message}: times may be far off; run {wanted}"
