"""Targets of engines: compute capabilities by name (`sm89`), `portable`, and `here`."""

import re
from dataclasses import dataclass

from stageline.models.errors import EngineError

PORTABLE = "portable"
HERE = "here"
RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
"""The targets that TensorRT-RTX builds for on any machine."""
_SM = re.compile(r"sm(\d{2,3})")


@dataclass(frozen=True)
class TargetGpu:
    """A GPU's name and target, which is its compute capability: sm89."""

    name: str
    target: str

    def __str__(self) -> str:
        return f"{self.name} ({self.target})"


def check_target(name: str) -> str:
    """`name` if it is a target, else EngineError."""
    if name in (PORTABLE, HERE) or _SM.fullmatch(name):
        return name
    raise EngineError(f"unknown target {name!r}; targets: {PORTABLE}, {HERE}, {', '.join(RTX_TARGETS)} and smNN")


def capability(target: str) -> int:
    """sm89 -> 89."""
    found = _SM.fullmatch(target)
    assert found is not None
    return int(found[1])


def gpu_here() -> TargetGpu | None:
    """The first GPU of this machine. None without a GPU, a driver, or CUDA bindings for Python."""
    try:
        from cuda.bindings import driver
    except ImportError:
        return None
    try:
        if driver.cuInit(0)[0] != driver.CUresult.CUDA_SUCCESS:
            return None
    except (RuntimeError, OSError):  # there is no driver library
        return None
    error, device = driver.cuDeviceGet(0)
    if error != driver.CUresult.CUDA_SUCCESS:
        return None
    attribute = driver.CUdevice_attribute
    major, minor = (
        driver.cuDeviceGetAttribute(which, device)[1]
        for which in (
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    name = driver.cuDeviceGetName(128, device)[1].split(b"\0", 1)[0].decode()
    return TargetGpu(name, f"sm{major}{minor}")
