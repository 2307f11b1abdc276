"""Devices of other machines: published figures (devices.toml), and the time of a part on them by a roofline."""

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Annotated

import pydantic
from stageline.models.errors import StagelineError
from stageline.runtime.planning.cost import UseCost
from stageline.runtime.validation import Data

Positive = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, pydantic.Field(gt=0, le=1)]


class DeviceKind(Data):
    """A kind of device, as devices.toml or a cluster file describes it. `tflops` by dtype, dense; GB are decimal.

    `source` names the origin of the figures; price, idle power and efficiencies are assumptions (see devices.toml).
    """

    source: str
    tflops: dict[str, Positive]
    memory_gb: Positive
    memory_gb_s: Positive
    peer_gb_s: Positive
    busy_w: Positive
    idle_w: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
    price_per_h: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
    compute_efficiency: Share
    memory_efficiency: Share
    launch_us: Annotated[float, pydantic.Field(ge=0)]
    peer_latency_us: Annotated[float, pydantic.Field(ge=0)]

    @pydantic.model_validator(mode="after")
    def _idle_below_busy(self) -> "DeviceKind":
        if self.idle_w > self.busy_w:
            raise ValueError(f"idle_w {self.idle_w:g} is above busy_w {self.busy_w:g}")
        return self

    def rates(self, dtype: str) -> "Rates":
        """The rates that kernels reach for operands of `dtype`. StagelineError if the device has none."""
        if dtype not in self.tflops:
            raise StagelineError(
                f"the device ({self.source}) has no rate for {dtype}; known: {', '.join(sorted(self.tflops))}"
            )
        return Rates(
            self.tflops[dtype] * 1e12 * self.compute_efficiency,
            self.memory_gb_s * 1e9 * self.memory_efficiency,
            self.launch_us / 1e6,
        )


@dataclass(frozen=True)
class Rates:
    """What a device reaches: operations per second, bytes per second, and a constant number of seconds per stage."""

    flops_per_s: float
    bytes_per_s: float
    overhead_s: float

    def use_s(self, cost: UseCost) -> float:
        """Seconds of a use: those of computing or of reading weights and KV cache, whichever is more. Activations are
        assumed to stay in on-chip memory, as in fused kernels."""
        moved = cost.weight_read_bytes + cost.cache_read_bytes
        return max(cost.flops / self.flops_per_s, moved / self.bytes_per_s)


@cache
def catalogue() -> dict[str, DeviceKind]:
    """The devices of devices.toml by name."""
    data = tomllib.loads(files("stageline.runtime.planning").joinpath("devices.toml").read_text())
    defaults = data.pop("defaults")
    return {name: DeviceKind.model_validate({**defaults, **entry}) for name, entry in data.items()}


def device_kind(name: str) -> DeviceKind:
    """The device called `name` in the catalogue, in any case. StagelineError lists the known ones."""
    known = {kind.lower(): device for kind, device in catalogue().items()}
    if name.lower() not in known:
        raise StagelineError(
            f"unknown device {name!r}; known devices: {', '.join(catalogue())}, and cpu for this machine"
        )
    return known[name.lower()]
