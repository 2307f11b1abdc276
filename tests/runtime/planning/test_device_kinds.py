"""The catalogue: its figures follow from the chips they describe, and the roofline is one."""

import re

import pytest
from stageline.models.errors import StagelineError
from stageline.runtime.planning.cost import UseCost
from stageline.runtime.planning.device_kinds import Rates, catalogue, device_kind

CHIPS = {  # float32 lanes, boost GHz, bits of the memory bus, its transfers a pin in GT/s
    "H100": (16896, 1.98, 5120, 5.23),
    "H200": (16896, 1.98, 6144, 6.25),
    "A100": (6912, 1.41, 5120, 3.19),
    "L4": (7424, 2.04, 192, 12.5),
    "L40S": (18176, 2.52, 384, 18),
    "RTX4090": (16384, 2.52, 384, 21),
    "RTX5090": (21760, 2.407, 512, 28),
    "T4": (2560, 1.59, 256, 9.375),
}


@pytest.mark.parametrize(("name", "chip"), CHIPS.items())
def test_figures_of_gpus_follow_from_their_chips(name: str, chip: tuple[int, float, int, float]) -> None:
    """A multiply and an add per lane and clock; bytes that the bus carries."""
    lanes, ghz, bits, transfers = chip
    device = device_kind(name)
    assert device.tflops["float32"] == pytest.approx(2 * lanes * ghz / 1e3, rel=0.02)
    assert device.memory_gb_s == pytest.approx(bits / 8 * transfers, rel=0.01)


CPU_SOURCE = re.compile(
    r": (\d+) cores, ([\d.]+) GHz base, (\d+) channels of DDR5-(\d+), (\d+) W( \(256-bit units\))?$"
)


@pytest.mark.parametrize("name", ["XeonPlatinum8480", "EPYC9654", "Ryzen9-7950X"])
def test_figures_of_cpus_follow_from_their_sources(name: str) -> None:
    device = device_kind(name)
    found = CPU_SOURCE.search(device.source)
    assert found is not None
    cores, ghz, channels, transfers, watts = map(float, found.groups()[:5])
    assert device.tflops["float32"] == pytest.approx(cores * ghz * (32 if found[6] else 64) / 1e3, rel=0.01)
    assert device.memory_gb_s == pytest.approx(channels * transfers * 8 / 1e3, rel=0.01)
    assert device.busy_w == watts


def test_every_device_names_its_source_and_narrower_types_are_no_slower() -> None:
    for name, device in catalogue().items():
        assert re.match(r"(NVIDIA|Intel|AMD) .*(datasheet|whitepaper|specifications)", device.source), name
        rates = [device.tflops[dtype] for dtype in ("float32", "float16", "int8")]
        assert rates == sorted(rates), name


def test_unknown_device_lists_the_known_ones() -> None:
    with pytest.raises(StagelineError, match=r"unknown device 'H1000'; known devices: H100, .*T4.*, and cpu for this"):
        device_kind("H1000")
    assert device_kind("h100") is catalogue()["H100"]


@pytest.mark.parametrize(("flops", "weights", "seconds"), [(10**12, 1, 1.0), (1, 3 * 10**9, 3.0), (10**12, 10**9, 1.0)])
def test_a_use_takes_the_longer_of_computing_and_moving(flops: int, weights: int, seconds: float) -> None:
    cost = UseCost(flops, 0, weights, 0, 0, 0, 0, 0)
    assert Rates(flops_per_s=1e12, bytes_per_s=1e9, overhead_s=0.25).use_s(cost) == pytest.approx(seconds)


def test_rates_are_the_peaks_times_what_is_reached() -> None:
    rates = device_kind("T4").rates("float16")
    assert (rates.flops_per_s, rates.bytes_per_s) == (65e12 * 0.6, 300e9 * 0.75)
    assert rates.overhead_s == pytest.approx(20e-6)
    with pytest.raises(StagelineError, match="has no rate for float4; known: bfloat16, float16, float32, int8"):
        device_kind("T4").rates("float4")
