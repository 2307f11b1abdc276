"""Times of an engine's layers as a document: profiles/layers/<machine and engine>.json in the bundle.

The manifest does not list these files: they are optional, and only people read them.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field
from stageline.models.errors import BundleError
from stageline.runtime.bundle.folder import Bundle, removed_on_failure
from stageline.runtime.planning.profile import FOLDER as PROFILES
from stageline.runtime.planning.profile import Machine
from stageline.runtime.validation import Data, read_document
from stageline.runtime.words import counted

FOLDER = f"{PROFILES}/layers"


class Layer(Data):
    """One layer of the graph that an engine runs, under the engine's own names: `seconds` is the mean of a run's,
    `precision` what it computes in."""

    name: str
    kind: str
    precision: str
    seconds: float = Field(ge=0)


class StageGraph(Data):
    """A stage of blocks `first` to `end` - 1 as its engine holds it: bytes of its weights by their type, and of its
    caches."""

    first: int = Field(ge=0)
    end: int = Field(ge=1)
    weights: dict[str, int]
    cache_bytes: int = Field(ge=0)


class StageTimes(Data):
    """A stage's run on one micro-batch: the mean time of all of it, and its layers in the order of the engine."""

    seconds: float = Field(gt=0)
    layers: tuple[Layer, ...]


class StepTimes(Data):
    """The stages' times for a micro-batch of `batch` rows of `length` new tokens, after `past` tokens in the cache:
    means of `runs` runs."""

    batch: int = Field(ge=1)
    length: int = Field(ge=1)
    past: int = Field(ge=0)
    runs: int = Field(ge=1)
    stages: tuple[StageTimes, ...] = Field(min_length=1)

    @property
    def seconds(self) -> float:
        """The time of one micro-batch through all stages, one after the other."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def layer_seconds(self) -> float:
        """The part of it that the engine says its layers took."""
        return sum(layer.seconds for stage in self.stages for layer in stage.layers)

    @property
    def shape(self) -> str:
        """The micro-batch, for people."""
        past = f" after {self.past:,}" if self.past else ""
        return f"{counted(self.batch, 'row')} of {counted(self.length, 'token')}{past}"


class LayerProfile(Data):
    """All layers of a bundle's stages on `machine`, which names the engine; the stages shared `threads` cores and ran
    one at a time."""

    format: Literal["stageline-layers"] = "stageline-layers"
    version: Literal[1] = 1
    machine: Machine
    threads: int = Field(ge=1)
    stages: tuple[StageGraph, ...] = Field(min_length=1)
    steps: tuple[StepTimes, ...] = Field(min_length=1)

    @property
    def engine(self) -> str:
        """The engine, its version and its weights, for people."""
        quantised = f", {self.machine.quantise} weights" if self.machine.quantise else ""
        return f"{self.machine.engine} {self.machine.engine_version}{quantised}"

    @property
    def blocks(self) -> list[int]:
        """The number of blocks of each stage."""
        return [stage.end - stage.first for stage in self.stages]

    @property
    def weights(self) -> dict[str, int]:
        """Bytes of all stages' weights by type, the most first."""
        found: dict[str, int] = {}
        for stage in self.stages:
            for dtype, count_bytes in stage.weights.items():
                found[dtype] = found.get(dtype, 0) + count_bytes
        return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def heaviest(step: StepTimes, count: int) -> list[tuple[int, Layer]]:
    """The `count` layers that take the most time, longest first, with the number of their stage."""
    layers = [(number, layer) for number, stage in enumerate(step.stages) for layer in stage.layers]
    return sorted(layers, key=lambda pair: -pair[1].seconds)[:count]


_FAMILIES = {
    "attention": "attention|mha|sdpa",
    "matrix products": "matmul|gemm|fullyconnected|conv(?!ert)",
    "normalisation": "norm|mvn|^rms$",
    "lookups": "gather|^embed",
    "moves and casts": "reshape|transpose|concat|reorder|cast|convert|split|slice|copy|expand|squeeze|broadcast|memory",
}
_OTHER = "element by element"
FAMILIES = (*_FAMILIES, _OTHER)
"""What layers do, whatever their engine calls them."""


def family(kind: str) -> str:
    """The one of FAMILIES that an engine's kind of layer belongs to."""
    return next((name for name, words in _FAMILIES.items() if re.search(words, kind.lower())), _OTHER)


def family_seconds(step: StepTimes) -> dict[str, float]:
    """The time of each family of layers in all stages, in the order of FAMILIES."""
    found = dict.fromkeys(FAMILIES, 0.0)
    for stage in step.stages:
        for layer in stage.layers:
            found[family(layer.kind)] += layer.seconds
    return found


def write_layers(bundle: Bundle, profile: LayerProfile) -> Path:
    """Write the profile into the bundle, aside and then renamed, and return its path."""
    folder = bundle.path / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / profile.machine.file
    aside = folder / f".{file.name}.{os.getpid()}"
    with removed_on_failure([aside]):
        aside.write_text(profile.model_dump_json(indent=1, by_alias=True))
        return aside.replace(file)


def read_layers(folder: Path) -> tuple[list[LayerProfile], list[str]]:
    """The profiles in a bundle's folder, newest first, and a line for each file that is none."""
    found, unread = [], []
    for file in _newest(folder / FOLDER):
        try:
            found.append(read_document(LayerProfile, file, "run stageline layers again"))
        except BundleError as error:
            unread.append(str(error))
        except OSError as error:
            unread.append(f"{file}: {error.strerror}")
    return found, unread


def _newest(folder: Path) -> Iterator[Path]:
    def written(file: Path) -> float:
        try:
            return file.stat().st_mtime
        except OSError:
            return 0.0

    yield from sorted(folder.glob("*.json"), key=lambda file: (-written(file), file.name))
