"""Devices that are not here: their published figures (devices.toml), and what a part takes on them by a roofline."""

import tomllib
from collections.abc import Sequence
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
    """A kind of device, as devices.toml or a cluster file gives it. `tflops` by dtype, dense; GB are decimal.

    `source` says where the figures are from; price, idle power and efficiencies are assumptions (see devices.toml).
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
        """What is reached of the peaks for operands of `dtype`. StagelineError where it has no rate."""
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
    """What a device reaches: operations and bytes a second, and the seconds that come once for each stage."""

    flops_per_s: float
    bytes_per_s: float
    overhead_s: float

    def use_s(self, cost: UseCost) -> float:
        """Seconds of a use: the longer of computing and of moving weights and cache. Activations are taken to stay in
        caches, where fused kernels keep them."""
        moved = cost.weight_read_bytes + cost.cache_read_bytes
        return max(cost.flops / self.flops_per_s, moved / self.bytes_per_s)

    def stage_s(self, costs: Sequence[UseCost]) -> float:
        """Seconds of a stage made of uses of these costs."""
        return self.overhead_s + sum(map(self.use_s, costs))


@cache
def catalogue() -> dict[str, DeviceKind]:
    """The devices of devices.toml by name."""
    data = tomllib.loads(files("stageline.runtime.planning").joinpath("devices.toml").read_text())
    defaults = data.pop("defaults")
    return {name: DeviceKind.model_validate({**defaults, **entry}) for name, entry in data.items()}


def device_kind(name: str) -> DeviceKind:
    """The catalogue's device called `name`, upper and lower case alike. StagelineError that lists the known ones."""
    known = {kind.lower(): device for kind, device in catalogue().items()}
    if name.lower() not in known:
        raise StagelineError(
            f"unknown device {name!r}; known devices: {', '.join(catalogue())}, and cpu for this machine"
        )
    return known[name.lower()]
