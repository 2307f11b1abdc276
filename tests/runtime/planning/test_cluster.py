"""Devices and links, from the command line and from a file; what is wrong stands in one line."""

import math
from pathlib import Path

import pytest
from stageline.models.errors import StagelineError
from stageline.runtime.planning.cluster import parse_devices, read_cluster
from stageline.runtime.planning.problem import Link

TWO = """
[[devices]]
name = "left"
kind = "L4"
count = 2

[[devices]]
name = "right"
kind = "H100"
memory_gb = 70
"""
LINK = """
[[links]]
from = "{}"
to = "{}"
gb_s = 10
latency_us = 30
"""


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "cluster.toml"
    file.write_text(text)
    return file


def test_devices_of_one_kind_are_counted() -> None:
    cluster = parse_devices("cpu:0,cpu:1,2xL4,h100,L4", handover_s=1e-5)
    assert [(kind.name, kind.count) for kind in cluster.kinds] == [("cpu", 2), ("L4", 3), ("H100", 1)]
    assert cluster.kinds[0].names == ("cpu:0", "cpu:1")
    assert cluster.kinds[1].names == ("L4:0", "L4:1", "L4:2")
    assert cluster.links[0][0] == Link(math.inf, 1e-5)
    assert cluster.links[1][2] == Link(32e9, 10e-6)  # the L4's own is the slower one
    assert cluster.local


def test_cores_taken_together_are_one_device() -> None:
    (kind,) = parse_devices("cpu:0+1").kinds
    assert (kind.threads, kind.count) == (2, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("H1000", "unknown device 'H1000'; known devices: H100, H200"),
        ("cpu:4096", "unknown device 'cpu:4096'; this machine has cores cpu:0 to cpu:"),
        ("cuda:0", "cuda:0: GPUs of this machine are not measured yet; name their kind: H100"),
        ("0xL4", "'0xL4' is not a device"),
        ("L4,,L4", "'' is not a device"),
    ],
)
def test_unknown_devices_are_refused_with_the_known_ones(text: str, message: str) -> None:
    with pytest.raises(StagelineError) as error:
        parse_devices(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_cluster_file_overrides_the_catalogue_and_links_both_ways(tmp_path: Path) -> None:
    cluster = read_cluster(written(tmp_path, TWO + LINK.format("left", "right")))
    left, right = cluster.kinds
    assert (left.count, right.count) == (2, 1)
    assert right.device is not None
    assert right.device.memory_gb == 70
    assert cluster.links[0][1] == cluster.links[1][0] == Link(10e9, 30e-6)
    assert cluster.links[0][0] == Link(32e9, 10e-6)
    assert not cluster.ordered


def test_an_own_device_needs_no_kind(tmp_path: Path) -> None:
    text = '[[devices]]\nname = "npu"\ntflops = { float16 = 50 }\nmemory_gb = 16\nmemory_gb_s = 100\npeer_gb_s = 8\n'
    (kind,) = read_cluster(written(tmp_path, text)).kinds
    assert kind.device is not None
    assert kind.device.rates("float16").flops_per_s == pytest.approx(30e12)


def test_a_network_joins_all(tmp_path: Path) -> None:
    cluster = read_cluster(written(tmp_path, TWO + "[network]\ngb_s = 12.5\nlatency_us = 20\n"))
    assert cluster.links[0][1] == Link(12.5e9, 20e-6)


ORDERED = "ordered = true\n" + TWO.replace("count = 2\n", "")


def test_links_of_ordered_devices_lead_one_way(tmp_path: Path) -> None:
    cluster = read_cluster(written(tmp_path, ORDERED + LINK.format("left", "right")))
    assert cluster.ordered
    assert cluster.links[0][1] == Link(10e9, 30e-6)
    assert cluster.links[1][0] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TWO, "no link from 'left' to 'right'; give one under [[links]], or one for all as [network]"),
        (TWO + LINK.format("left", "middle"), "a link leads to unknown device 'middle'; known: left, right"),
        (
            TWO + LINK.format("left", "right").replace("10", "-10"),
            "links.0.gb_s: must be above 0.0 (it is -10)",
        ),
        (
            TWO + LINK.format("left", "right").replace("30", "-1"),
            "links.0.latency_us: must be at least 0.0 (it is -1)",
        ),
        (
            ORDERED + LINK.format("left", "right") + LINK.format("right", "left"),
            "links form a cycle: left -> right -> left; ordered devices lead from the first stage to the last",
        ),
        (TWO.replace('"H100"', '"H1000"'), "device 'right': unknown device 'H1000'; known devices: H100"),
        (TWO.replace("memory_gb = 70", "memory_gb = -70"), "device 'right': memory_gb: must be above 0"),
        (TWO.replace("memory_gb", "memory"), "device 'right': memory: is no field that is known here"),
        (TWO.replace('"right"', '"left"'), "two devices are called 'left'"),
        (TWO.replace("count = 2", "count = 0"), "device 'left' has count 0; give at least 1"),
        (TWO.replace('name = "left"', ""), "a device has no name"),
        ("devices = []", "devices: List should have at least 1 item"),
        ("devices = [", "is not a TOML file"),
        (TWO.replace('kind = "L4"', ""), "device 'left': tflops: is missing"),
        (TWO.replace("memory_gb = 70", "idle_w = 9000"), "idle_w 9000 is above busy_w 700"),
    ],
)
def test_what_is_wrong_in_a_cluster_file_is_reported_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(StagelineError) as error:
        read_cluster(written(tmp_path, text))
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "cluster.toml"))
    assert "\n" not in str(error.value)
