"""The engines' manifest: what is in a bundle's `engines/`, as data validated once at the door.

docs/bundle.md says the format in prose.
"""

from typing import Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field
from stageline.runtime.bundle.manifest import BundlePath, CacheSpec, FileEntry, Sha256, TensorSpec
from stageline.runtime.engines.tensorrt.flavour import FlavourName
from stageline.runtime.engines.tensorrt.lower import Precision, compute_dtype

VERSION = 1


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SizeRange(_Data):
    """The sizes that a free dimension may take, and the one that kernels are chosen for."""

    least: int = Field(ge=0)
    best: int = Field(ge=0)
    most: int = Field(ge=1)

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> "SizeRange":
        if not self.least <= self.best <= self.most:
            raise ValueError(f"sizes {self.least}, {self.best}, {self.most} are not in order")
        return self


class OptimizationProfile(_Data):
    """One optimisation profile: `sizes` of each free dimension of the inputs (`batch`, `length`, `picks`)."""

    name: str
    sizes: dict[str, SizeRange]


class Options(_Data):
    """How an engine is built besides its target, precision and profiles.

    `stripped`: the weights are inputs, bound to buffers that are filled from the bundle at load. `workspace_bytes`: the
    most scratch memory a layer may use, None for what the GPU has.
    """

    stripped: bool = False
    weight_streaming: bool = False
    version_compatible: bool = False
    optimization_level: int = Field(default=3, ge=0, le=5)
    workspace_bytes: int | None = Field(default=None, gt=0)


class EngineRecord(_Data):
    """One engine: a stage built for a target in a precision.

    The order of `profiles` is that of the engine's optimisation profiles. `inputs` and `outputs` are the graph's but
    for the caches, floating ones float32. Each of `caches` is two inputs and two outputs, named by `past_names` and
    `present_names` (stageline.runtime.engines.lowering.caches): [batch, heads, capacity, key or value size] in the type
    of the precision. An input and its output MUST be bound to one address; the engine writes in place. They MUST be
    zero before the first run.

    `weights` are the further inputs of a stripped engine (`refit` in this package gives their values), each
    bound once; without, none.

    `key` is the digest of all that the plan depends on. `graph_sha256` is that of the stage's file, `weights_sha256`
    of the values of its tensors, and `weight_files` what the bundle's manifest said of the weight files when that was
    last checked.
    """

    stage: BundlePath
    plan: FileEntry
    report: FileEntry
    key: Sha256
    graph_sha256: Sha256
    weights_sha256: Sha256 | None = None  # of a stripped engine, which works with any
    weight_files: dict[BundlePath, Sha256]
    flavour: FlavourName
    version: str
    target: str
    precision: Precision
    options: Options
    profiles: tuple[OptimizationProfile, ...] = Field(min_length=1)
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[TensorSpec, ...] = ()
    capacity: int | None = Field(default=None, gt=0)  # tokens of a cache row; None for a stage without caches
    caches: tuple[CacheSpec, ...] = ()
    build_s: float = Field(ge=0)

    @property
    def cache_dtype(self) -> str:
        """The NumPy name of the caches' type, or bfloat16."""
        return str(compute_dtype(self.precision).numpy())


class EnginesManifest(_Data):
    """All engines of a bundle, and timing caches: (flavour, version, target) -> file."""

    format: Literal["stageline-engines"] = "stageline-engines"
    version: Literal[1] = 1
    engines: tuple[EngineRecord, ...] = ()
    timings: tuple[FileEntry, ...] = ()
