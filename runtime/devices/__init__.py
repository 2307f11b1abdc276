"""Devices: they run a stage and move its data. `open_devices` finds them by the names that users write."""

import re
from collections.abc import Sequence

from stageline.models.errors import RequestError
from stageline.runtime.devices.base import Device
from stageline.runtime.devices.cpu import CpuDevice, allowed_cores, share_cores

_NAME = re.compile(r"cpu|cuda:(\d{1,3})")


def spread(names: Sequence[str], stages: int) -> list[str]:
    """The name of each stage's device: round robin if there are fewer names than stages.

    RequestError for an unknown name, and for more names than stages.
    """
    if not 1 <= len(names) <= stages:
        raise RequestError(f"{len(names)} devices are given for {stages} stages; give 1 to {stages}")
    for name in names:
        if not _NAME.fullmatch(name):
            raise RequestError(f"unknown device {name!r}; devices are called cpu, cuda:0, cuda:1, ...")
    return [names[stage % len(names)] for stage in range(stages)]


def open_devices(names: Sequence[str], threads: int | None) -> list[Device]:
    """The device of each stage, by name. Those on `cpu` share `threads` cores (None: all that this process may use).

    RequestError for a GPU that does not exist, EngineError without a driver.
    """
    cores = allowed_cores()
    gpus = [(stage, int(found[1])) for stage, name in enumerate(names) if (found := _NAME.fullmatch(name)) and found[1]]
    on_cpu = [stage for stage, name in enumerate(names) if name == "cpu"]
    devices: dict[int, Device] = dict(
        zip(on_cpu, map(CpuDevice, share_cores(max(1, len(on_cpu)), cores[:threads])), strict=False)
    )
    if gpus:
        from stageline.runtime.devices.cuda import open_gpus

        devices.update((device.stage, device) for device in open_gpus(gpus, cores))
    return [devices[stage] for stage in range(len(names))]
