"""This machine's cores for a bundle without a profile: a roofline of what `calibrate` measured, or of usual cores."""

from dataclasses import dataclass

from stageline.runtime.planning.calibrate import Speed
from stageline.runtime.planning.cost import UseCost
from stageline.runtime.planning.device_kinds import DeviceKind, Rates

UNMEASURED = "a roofline of usual CPU cores, not of this machine's, which may be off by a factor of two"
CALIBRATED = "a roofline of this machine's cores, which was within 20 % for MiniLM and SmolLM2 on a core of their own"
DISTURBED = "a roofline of this machine's cores, which other programs used while it was measured: it may be far off"
"""What times are of, and how far off."""
_CACHE_SHARE = 0.35
"""ONNX Runtime's attention reads a cache at about this share of the speed of weights (SmolLM2 on an EPYC: 8 GB/s)."""


@dataclass(frozen=True)
class CoreRates(Rates):
    """What a core reaches. Unlike a GPU, it computes and reads in turn."""

    def use_s(self, cost: UseCost) -> float:
        """Seconds of a use: of computing, and of reading weights and KV cache."""
        read_bytes = cost.weight_read_bytes + cost.cache_read_bytes / _CACHE_SHARE
        return cost.flops / self.flops_per_s + read_bytes / self.bytes_per_s


class Cores(DeviceKind):
    """Some cores of this machine as one device."""

    def rates(self, dtype: str) -> CoreRates:
        """See `DeviceKind.rates`."""
        reached = super().rates(dtype)
        return CoreRates(reached.flops_per_s, reached.bytes_per_s, reached.overhead_s)


def cores(threads: int, memory_gb: float, reached: Speed | None) -> Cores:
    """`threads` cores that reach this speed.

    None: a guess, 80 % of 3 GHz with two AVX2 units (32 operations a clock), and 15 GB/s.
    """
    source, flops_per_s, bytes_per_s = UNMEASURED, 0.8 * threads * 3e9 * 32, threads * 15e9
    if reached is not None:
        flops_per_s, bytes_per_s = reached.flops_per_s, reached.bytes_per_s
        source = DISTURBED if reached.disturbed else CALIBRATED
    return Cores(
        source=source,
        tflops=dict.fromkeys(("float32", "float16", "bfloat16", "int8", "int4"), flops_per_s / 1e12),
        memory_gb=memory_gb, memory_gb_s=bytes_per_s / 1e9, peer_gb_s=12.0, busy_w=1e-9, idle_w=0.0, price_per_h=0.0,
        compute_efficiency=1.0, memory_efficiency=1.0, launch_us=20.0, peer_latency_us=10.0,
    )  # fmt: skip
