"""The catalogue: every figure has a source, and the roofline is one."""

import tomllib
from importlib.resources import files

import pytest
from stageline.models.errors import StagelineError
from stageline.runtime.planning.catalogue import Rates, catalogue, device_kind
from stageline.runtime.planning.cost import UseCost

WANTED = {"H100", "H200", "B200", "A100", "L4", "L40S", "RTX4090", "RTX5090", "T4"}


def test_the_devices_of_the_product_are_there_with_a_source() -> None:
    assert set(catalogue()) >= WANTED
    for name, device in catalogue().items():
        assert len(device.source) > 20, name
        assert {"float32", "float16", "bfloat16"} <= set(device.tflops)


def test_published_figures_stay_what_they_are() -> None:
    """Of the H100 SXM datasheet: 989 teraFLOPS in bfloat16 without sparsity, 3.35 TB/s, 80 GB, 700 W, 900 GB/s."""
    raw = tomllib.loads(files("stageline.runtime.planning").joinpath("devices.toml").read_text())["H100"]
    assert (raw["tflops"]["bfloat16"], raw["memory_gb_s"], raw["memory_gb"], raw["busy_w"]) == (989, 3350, 80, 700)
    assert raw["peer_gb_s"] == 900 / 2


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
