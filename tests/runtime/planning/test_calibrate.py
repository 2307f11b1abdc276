"""The speed of this machine's cores: what is measured, that it is kept, and what plans make of it."""

import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from stageline.runtime.engines.base import WeightDtype
from stageline.runtime.planning import calibrate
from stageline.runtime.planning.calibrate import Speed, known_speed, speed
from stageline.runtime.planning.cluster import parse_devices, unmeasured
from stageline.runtime.planning.cores import CALIBRATED, DISTURBED, UNMEASURED, cores
from stageline.runtime.planning.cost import UseCost


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, str | None]]:
    """What is measured: nothing is, but each try is noted, and nothing disturbs it."""
    found: list[tuple[int, int, str | None]] = []

    def noted(count: int, threads: int, quantise: WeightDtype | None = None) -> Speed:
        found.append((count, threads, quantise))
        return Speed(count=count, threads=threads, flops_per_s=3e10, bytes_per_s=6e9)

    monkeypatch.setattr(calibrate, "measured_speed", noted)
    monkeypatch.setattr(calibrate, "undisturbed", lambda work, until: (work(), 0.0))
    return found


def test_a_speed_is_measured_once_for_each_number_of_cores_and_kind_of_weights(
    cache: Path, tried: list[tuple[int, int, str | None]]
) -> None:
    assert known_speed(2, 1) is None
    asked: list[tuple[int, int, WeightDtype | None]] = [(2, 1, None), (1, 2, None), (2, 1, "int8"), (2, 1, None)]
    found = [speed(*one) for one in asked]
    assert tried == asked[:3]
    assert found[0] == found[3] == known_speed(2, 1)
    assert len(list((cache / "stageline" / "speeds").glob("*.json"))) == 2


@pytest.mark.parametrize("damage", ["", "{}", "cut", "another engine"])
def test_what_was_measured_otherwise_is_measured_again(
    damage: str, cache: Path, tried: list[tuple[int, int, str | None]]
) -> None:
    speed(1, 1)
    (file,) = (cache / "stageline" / "speeds").glob("*.json")
    text = file.read_text()
    damaged = {"cut": text[:-9], "another engine": re.sub(r'"engine_version": "\S+"', '"engine_version": "0.1"', text)}
    assert damaged["another engine"] != text
    file.write_text(damaged.get(damage, damage))
    speed(1, 1)
    assert len(tried) == 2
    assert known_speed(1, 1) is not None


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, tried: list[tuple[int, int, str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert speed(1, 1).flops_per_s == speed(1, 1).flops_per_s == 3e10
    assert len(tried) == 2


@pytest.mark.parametrize("quantise", [None, "int8"])
def test_this_machine_is_measured(quantise: WeightDtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "_POINT_S", 0.02)
    found = calibrate.measured_speed(1, 1, quantise)
    assert 1e8 < found.flops_per_s < 1e13
    assert 1e8 < found.bytes_per_s < 1e13


def test_the_graphs_do_as_much_work_as_is_counted() -> None:
    def matrices(model: ir.Model) -> list[int]:
        return [
            int(np.prod(one.shape.numpy()))  # type: ignore[union-attr]
            for one in model.graph.initializers.values()
            if one.shape is not None and len(one.shape) == 2
        ]

    rows, width = 64, 512
    counted = 2 * 2 * calibrate._ROWS * calibrate._WIDTH * 4 * calibrate._WIDTH * calibrate._LAYERS
    assert (rows, width) == (calibrate._ROWS, calibrate._WIDTH)
    assert 2 * rows * sum(matrices(calibrate._computing())) == counted
    assert sum(matrices(calibrate._reading(3))) == 3 * calibrate._SIDE**2


def test_cores_without_a_profile_are_as_fast_as_they_were_measured_or_usual_ones() -> None:
    cluster = parse_devices("cpu:0")
    (kind,) = unmeasured(cluster, lambda count, threads: None).kinds
    assert kind.device is not None
    assert kind.device.source == UNMEASURED
    asked = []

    def reached(count: int, threads: int) -> Speed:
        asked.append((count, threads))
        return Speed(count=count, threads=threads, flops_per_s=3e10, bytes_per_s=6e9)

    (kind,) = unmeasured(cluster, reached).kinds
    assert asked == [(1, 1)]
    assert kind.device is not None
    assert kind.device.source == CALIBRATED
    rates = kind.device.rates("int8")
    assert (rates.flops_per_s, rates.bytes_per_s) == pytest.approx((3e10, 6e9))


def test_a_core_computes_and_reads_in_turn() -> None:
    cost = UseCost(
        flops=3 * 10**9, elementwise=0, weight_read_bytes=6 * 10**8, activation_bytes=0, cache_read_bytes=21 * 10**7,
        parameters=0, parameter_bytes=0, cache_token_bytes=0,
    )  # fmt: skip
    reached = Speed(count=1, threads=1, flops_per_s=3e10, bytes_per_s=6e9)
    rates = cores(1, 8.0, reached).rates("float32")
    assert rates.use_s(cost) == pytest.approx(0.1 + 0.1 + 0.035 / 0.35)


def test_what_other_processes_disturbed_is_used_once_and_said_to_be(
    cache: Path, tried: list[tuple[int, int, str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "undisturbed", lambda work, until: (work(), 0.5))
    found = speed(1, 1)
    assert cores(1, 8.0, found).source == DISTURBED
    assert known_speed(1, 1) is None
