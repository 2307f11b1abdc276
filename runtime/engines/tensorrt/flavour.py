"""The two flavours of TensorRT behind one interface: `tensorrt` for data centres, `tensorrt-rtx` for RTX GPUs.

Their Python modules have the same classes. They differ in their targets and in some builder options.
"""

import importlib
import re
from collections.abc import Callable, Container
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator
from stageline.models.errors import EngineError
from stageline.runtime.engines.tensorrt.targets import HERE, PORTABLE, RTX_TARGETS, TargetGpu, capability

FlavourName = Annotated[Literal["tensorrt", "tensorrt-rtx"], BeforeValidator(lambda name: str(name).replace("_", "-"))]


@dataclass(frozen=True)
class Flavour:
    """One TensorRT. `module` is its Python module, `extra` the extra of stageline that installs it."""

    name: FlavourName
    module: str
    title: str
    distributions: tuple[str, ...]
    """The packages that install it; one is enough."""
    oldest: str
    """The first version that has all that Stageline calls (tests/reality/test_tensorrt_names.py)."""
    extra: str
    builds_anywhere: bool
    """Whether it builds for GPUs that are not in this machine."""
    portable: Container[int]
    """The compute capabilities that its portable engines run on."""
    portable_means: str
    keeps_timings: bool
    version_compatible: bool

    @property
    def version(self) -> str | None:
        """The installed version, read without an import. None if it is not installed."""
        for distribution in self.distributions:
            try:
                return version(distribution)
            except PackageNotFoundError:
                continue
        return None

    @property
    def installed(self) -> bool:
        """Whether it can be imported."""
        return self.version is not None

    @property
    def too_old(self) -> str | None:
        """What is wrong with the installed version, and what to do. None: nothing, or none is installed."""
        here = self.version
        if here is None or _numbers(here) >= _numbers(self.oldest):
            return None
        return (
            f"{self.title} {here} is installed, and Stageline needs {self.oldest} or newer: pip install --upgrade "
            f'"stageline[{self.extra}]"'
        )

    def load(self) -> Any:
        """The module. EngineError if it is not installed (with the pip command), too old, or does not load."""
        if self.too_old is not None:
            raise EngineError(self.too_old)
        try:
            return importlib.import_module(self.module)
        except (ImportError, OSError) as error:  # its package is there without the libraries, or without the driver's
            if isinstance(error, ModuleNotFoundError) and error.name == self.module:
                raise self.missing() from error
            why = " ".join(str(error).split())
            raise EngineError(f"{self.title} is installed but does not load: {why}; see: stageline doctor") from error

    def missing(self) -> EngineError:
        """The error if this flavour is needed but not installed."""
        return EngineError(f'{self.title} is not installed: pip install "stageline[{self.extra}]"')

    def runs(self, target: str, gpu: TargetGpu) -> bool:
        """Whether an engine of this flavour for `target` runs on `gpu`."""
        return target == gpu.target or (target == PORTABLE and capability(gpu.target) in self.portable)


TENSORRT = Flavour(
    name="tensorrt",
    module="tensorrt",
    title="TensorRT",
    distributions=("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    oldest="10.15",
    extra="gpu",
    builds_anywhere=False,
    portable=range(80, 1000),
    portable_means="Ampere GPUs and later (sm80 and up)",
    keeps_timings=True,
    version_compatible=True,
)
TENSORRT_RTX = Flavour(
    name="tensorrt-rtx",
    module="tensorrt_rtx",
    title="TensorRT-RTX",
    distributions=("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    oldest="1.4",
    extra="rtx",
    builds_anywhere=True,
    portable=frozenset((80, 86, 89, *range(120, 130))),  # it has no kernels for Hopper (sm90), sm10x and Jetson
    portable_means="RTX GPUs (sm80, sm86, sm89 and sm12x)",
    keeps_timings=False,
    version_compatible=False,
)
FLAVOURS: dict[FlavourName, Flavour] = {flavour.name: flavour for flavour in (TENSORRT, TENSORRT_RTX)}


def started(kind: Callable[[Any], Any], logger: Any, said: Callable[[], str]) -> Any:
    """TensorRT's Runtime or Builder with this logger. EngineError if TensorRT does not start, which it does not with an
    old driver or without a GPU. `said`: what was logged meanwhile."""
    try:
        return kind(logger)
    except (TypeError, RuntimeError) as error:  # the bindings: "factory function returned nullptr"
        why = " ".join((said() or str(error)).split())
        raise EngineError(f"TensorRT does not start: {why}; see: stageline doctor") from error


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
        here = TENSORRT.installed and gpu is not None and target in (PORTABLE, gpu.target)
        if here and not (TENSORRT_RTX.installed and gpu is not None and TENSORRT_RTX.runs(target, gpu)):
            return TENSORRT
        return _installed(TENSORRT_RTX)
    check_buildable(TENSORRT, target, gpu)
    return _installed(TENSORRT)


def check_buildable(flavour: Flavour, target: str, gpu: TargetGpu | None) -> None:
    """EngineError if `flavour` does not build for `target` on a machine with this GPU."""
    if flavour.builds_anywhere:
        if target not in (PORTABLE, *RTX_TARGETS):
            known = ", ".join((PORTABLE, *RTX_TARGETS))
            raise EngineError(f"target {target}: {flavour.title} builds for {known}; leave --flavour out")
    elif gpu is None or not flavour.runs(target, gpu):
        there = "has no NVIDIA GPU" if gpu is None else f"has {gpu}"
        raise EngineError(
            f"target {target}: {flavour.title} builds for it only on such a GPU, and this machine {there}; run "
            f"stageline build there, or choose one of: {', '.join((PORTABLE, *RTX_TARGETS))}"
        )


def _installed(flavour: Flavour) -> Flavour:
    if not flavour.installed:
        raise flavour.missing()
    return flavour


def _numbers(version: str) -> tuple[int, ...]:
    """10.15.1.29 -> (10, 15, 1, 29)."""
    return tuple(int(number) for number in re.findall(r"\d+", version))
