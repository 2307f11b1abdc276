"""The two flavours of TensorRT behind one interface: `tensorrt` for data centres, `tensorrt-rtx` for RTX GPUs.

Their Python modules have the same classes. They differ in their targets and in some builder options.
"""

import importlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator
from stageline.models.errors import EngineError
from stageline.runtime.engines.tensorrt.targets import HERE, PORTABLE, RTX_TARGETS, TargetGpu

FlavourName = Annotated[Literal["tensorrt", "tensorrt-rtx"], BeforeValidator(lambda name: str(name).replace("_", "-"))]


@dataclass(frozen=True)
class Flavour:
    """One TensorRT. `module` is its Python module, `extra` the extra of stageline that installs it."""

    name: FlavourName
    module: str
    title: str
    distribution: str
    extra: str
    builds_anywhere: bool
    """Whether it builds for GPUs that are not in this machine."""
    portable_means: str
    keeps_timings: bool
    version_compatible: bool

    @property
    def version(self) -> str | None:
        """The installed version, read without an import. None if it is not installed."""
        try:
            return version(self.distribution)
        except PackageNotFoundError:
            return None

    @property
    def installed(self) -> bool:
        """Whether it can be imported."""
        return self.version is not None

    def load(self) -> Any:
        """The module. EngineError if it is not installed (with the pip command) or does not load."""
        try:
            return importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            if error.name != self.module:
                raise
            raise self.missing() from error
        except OSError as error:
            raise EngineError(f"{self.title} is installed but does not load: {error}") from error

    def missing(self) -> EngineError:
        """The error if this flavour is needed but not installed."""
        return EngineError(f'{self.title} is not installed: pip install "stageline[{self.extra}]"')


TENSORRT = Flavour(
    name="tensorrt",
    module="tensorrt",
    title="TensorRT",
    distribution="tensorrt",
    extra="gpu",
    builds_anywhere=False,
    portable_means="Ampere GPUs and later (hardware compatibility)",
    keeps_timings=True,
    version_compatible=True,
)
TENSORRT_RTX = Flavour(
    name="tensorrt-rtx",
    module="tensorrt_rtx",
    title="TensorRT-RTX",
    distribution="tensorrt-rtx",
    extra="rtx",
    builds_anywhere=True,
    portable_means="RTX GPUs of compute capability 8.0 and later",
    keeps_timings=False,
    version_compatible=False,
)
FLAVOURS: dict[FlavourName, Flavour] = {flavour.name: flavour for flavour in (TENSORRT, TENSORRT_RTX)}


def choose(target: str, gpu: TargetGpu | None) -> Flavour:
    """The flavour that builds for `target` on this machine, whose GPU is `gpu` (None: it has none). EngineError names
    what is missing."""
    if target == HERE:
        if gpu is None:
            raise EngineError(
                "target here: this machine has no NVIDIA GPU with a driver; choose a target, such as --target portable"
            )
        # If both support the GPU, prefer the one for data centres, which tunes on the GPU itself.
        return TENSORRT if TENSORRT.installed or gpu.target not in RTX_TARGETS else _installed(TENSORRT_RTX)
    if target in (PORTABLE, *RTX_TARGETS):
        if TENSORRT_RTX.installed or gpu is None or target not in (PORTABLE, gpu.target) or not TENSORRT.installed:
            return _installed(TENSORRT_RTX)
        return TENSORRT
    if gpu is None or gpu.target != target:
        there = "has no NVIDIA GPU" if gpu is None else f"has {gpu}"
        raise EngineError(
            f"target {target}: TensorRT builds for it only on such a GPU, and this machine {there}; run "
            f"stageline build there, or choose one of: {', '.join((PORTABLE, *RTX_TARGETS))}"
        )
    return _installed(TENSORRT)


def _installed(flavour: Flavour) -> Flavour:
    if not flavour.installed:
        raise flavour.missing()
    return flavour
