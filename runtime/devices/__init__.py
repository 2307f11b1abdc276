"""Devices: they run a stage and move its data. `open_devices` finds them by the names that users write."""

import re
from collections.abc import Sequence

from stageline.models.errors import RequestError
from stageline.runtime.cluster.addresses import is_remote, place_of
from stageline.runtime.cluster.elsewhere import Elsewhere
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
        if is_remote(name):
            place_of(name)  # RequestError
        elif not _NAME.fullmatch(name):
            raise RequestError(f"unknown device {name!r}; devices are called cpu, cuda:0, ..., or tcp://HOST:PORT")
    return [names[stage % len(names)] for stage in range(stages)]


def open_devices(names: Sequence[str], threads: int | None, elsewhere: Elsewhere | None = None) -> list[Device]:
    """The device of each stage, by name. Those on `cpu` share `threads` cores (None: all that this process may use);
    `elsewhere` says how those outside of this process are reached.

    RequestError for a GPU that does not exist or a host without a key, EngineError without a driver, or for a host that
    is not there.
    """
    cores = allowed_cores()
    on_cpu = [stage for stage, name in enumerate(names) if name == "cpu"]
    shares = dict(zip(on_cpu, share_cores(max(1, len(on_cpu)), cores[:threads]), strict=False))
    outside = {stage for stage, name in enumerate(names) if is_remote(name) or (elsewhere and elsewhere.isolated)}
    gpus = [
        (stage, int(found[1]))
        for stage, name in enumerate(names)
        if stage not in outside and (found := _NAME.fullmatch(name)) and found[1]
    ]
    devices: dict[int, Device] = {stage: CpuDevice(own) for stage, own in shares.items() if stage not in outside}
    if gpus:
        from stageline.runtime.devices.cuda import open_gpus

        devices.update((device.stage, device) for device in open_gpus(gpus, cores))
    if outside:
        from stageline.runtime.devices.remote import open_outside

        try:
            wanted = [(stage, names[stage], shares.get(stage, cores)) for stage in sorted(outside)]
            devices.update((device.stage, device) for device in open_outside(wanted, elsewhere, cores))
        except BaseException:
            for device in devices.values():
                device.close()
            raise
    return [devices[stage] for stage in range(len(names))]
