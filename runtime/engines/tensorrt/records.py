"""The engines' manifest: the contents of a bundle's `engines/`, as data that is validated once, when it is read.

docs/reference/bundle.md specifies the format.
"""

from typing import Literal

from pydantic import AliasChoices, Field, model_validator
from stageline.runtime.bundle.manifest import BundlePath, CacheSpec, FileEntry, Sha256, TensorSpec
from stageline.runtime.engines.tensorrt.flavour import FlavourName
from stageline.runtime.engines.tensorrt.lower import Precision, compute_dtype
from stageline.runtime.validation import Data


class SizeRange(Data):
    """The sizes that a free dimension may take, and the one that kernels are chosen for: `least`, `best` and `most` on
    disk, and in the digests of engines."""

    min: int = Field(ge=0, validation_alias=AliasChoices("min", "least"), serialization_alias="least")
    opt: int = Field(ge=0, validation_alias=AliasChoices("opt", "best"), serialization_alias="best")
    max: int = Field(ge=1, validation_alias=AliasChoices("max", "most"), serialization_alias="most")

    @model_validator(mode="after")
    def _ordered(self) -> "SizeRange":
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"sizes {self.min}, {self.opt}, {self.max} are not in order")
        return self


class OptimizationProfile(Data):
    """Sizes of each free dimension of an engine's inputs (`batch`, `length`, `picks`) that it is tuned for."""

    name: str
    sizes: dict[str, SizeRange]


class Options(Data):
    """Options of a build apart from target, precision and profiles.

    `stripped`: the weights are inputs, bound to buffers that are filled from the bundle at load. `workspace_bytes`: the
    maximum scratch memory of a layer; None: what the GPU has.
    """

    stripped: bool = False
    weight_streaming: bool = False
    version_compatible: bool = False
    optimization_level: int = Field(default=3, ge=0, le=5)
    workspace_bytes: int | None = Field(default=None, gt=0)


class EngineRecord(Data):
    """One engine: a stage built for a target in a precision.

    The order of `profiles` is that of the engine's optimisation profiles. `inputs` and `outputs` are those of the graph
    except the caches; floating ones are float32. Each of `caches` is two inputs and two outputs, named by `past_names`
    and `present_names` (stageline.runtime.engines.lowering.cache_names): [batch, heads, capacity, key or value size] in
    `cache_dtype`. An input and its output MUST be bound to one address; the engine writes in place. They
    MUST be zero before the first run.

    `weights` are the further inputs of a stripped engine (`refit` in this package returns their values), each bound
    once; an engine that holds its weights has none.

    `key` is the digest of everything that the engine file (`plan`) depends on. `graph_sha256` is that of the stage's
    file, `weights_sha256` that of the values of its tensors, and `weight_files` are the digests of the weight files in
    the bundle's manifest when that was last checked.
    """

    stage: BundlePath
    plan: FileEntry
    report: FileEntry
    key: Sha256
    graph_sha256: Sha256
    weights_sha256: Sha256 | None = None  # None: a stripped engine, which works with any weights
    weight_files: dict[BundlePath, Sha256]
    flavour: FlavourName
    version: str
    target: str
    precision: Precision
    float32_nodes: tuple[str, ...] = ()  # the bundle's for this precision, whether in this stage or not
    computes: str | None = Field(default=None, pattern="^(float32|float16|bfloat16)$")  # None: an older record
    options: Options
    profiles: tuple[OptimizationProfile, ...] = Field(min_length=1)
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[TensorSpec, ...] = ()
    capacity: int | None = Field(default=None, gt=0)  # tokens of a cache row; None for a stage without caches
    caches: tuple[CacheSpec, ...] = ()
    build_s: float = Field(ge=0)
    peak_bytes: int | None = Field(default=None, gt=0)  # host memory of the build; None: an older record

    @property
    def cache_dtype(self) -> str:
        """The NumPy name of the caches' type, or bfloat16: what the engine computes in."""
        return self.computes or str(compute_dtype(self.precision, "float32").numpy())


class KernelsRecord(Data):
    """Kernels that TensorRT-RTX of `version` compiled for the plan with this digest on a model of GPU."""

    file: FileEntry
    plan_sha256: Sha256
    version: str
    gpu: str


class EnginesManifest(Data):
    """All engines of a bundle, compiled kernels of them, and timing caches: (flavour, version, target) -> file."""

    format: Literal["stageline-engines"] = "stageline-engines"
    version: Literal[1] = 1
    engines: tuple[EngineRecord, ...] = ()
    timings: tuple[FileEntry, ...] = ()
    kernels: tuple[KernelsRecord, ...] = ()
