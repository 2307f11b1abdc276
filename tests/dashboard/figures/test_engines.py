"""What the Engines page says of timed layers, and when it compares two engines."""

from typing import Any

import pytest
from stageline.dashboard.figures import engines
from stageline.runtime.layers.profile import LayerProfile
from stageline.runtime.planning.profile import Machine

HERE = Machine.here()


def profile(engine: str = "onnxruntime", factor: float = 1.0, **more: Any) -> LayerProfile:
    layers = [
        {"name": f"{kind} {number}", "kind": kind, "precision": precision, "seconds": seconds * factor}
        for number, (kind, precision, seconds) in enumerate(
            [("MatMul", "float32", 4e-3), ("Add", "float32", 1e-3), ("MatMulNBits", "int8", 5e-3)]
        )
    ]
    stage = {"seconds": 11e-3 * factor, "layers": layers}
    made: dict[str, Any] = {
        "machine": {"cpu": HERE.cpu, "processors": HERE.cores, "engine": engine, "engine_version": "1"},
        "threads": 2,
        "stages": [
            {"first": n, "end": n + 1, "weights": {"float32": 3000, "int8": 500}, "cache_bytes": 0} for n in (0, 1)
        ],
        "steps": [{"batch": 8, "length": 16, "past": 0, "runs": 20, "stages": [stage, stage]}],
    }  # fmt: skip
    return LayerProfile.model_validate({**made, **more})


def test_an_engine_is_told_by_time_precision_and_memory() -> None:
    one = profile()
    found = engines.facts(one, one.steps[0])
    assert found["all stages, one after the other"] == "22.0 ms"
    assert found["of it in layers"] == "20.0 ms, 90.9 %"
    assert found["computes in (share of time)"] == "float32 50.0 %, int8 50.0 %"
    assert found["weights"] == "6.00 kB float32, 1.00 kB int8"
    assert found["layers"] == "6"


def test_the_heaviest_come_first_and_all_shares_are_the_whole() -> None:
    step = profile().steps[0]
    assert [row["kind"] for row in engines.layer_rows(step, 3)] == ["MatMulNBits", "MatMulNBits", "MatMul"]
    assert sum(row["share"] for row in engines.layer_rows(step, None)) == pytest.approx(100)
    rows = engines.family_rows({"a": step, "b": profile(factor=2.0).steps[0]})
    for name in "ab":
        assert sum(row["share"] for row in rows if row["engine"] == name) == pytest.approx(1)
    assert {row["family"] for row in rows} == {"matrix products", "element by element"}


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (profile("openvino"), None),
        (profile("openvino", threads=1), "one ran on 2 cores, the other on 1"),
        (
            profile("openvino", stages=[{"first": 0, "end": 2, "weights": {}, "cache_bytes": 0}]),
            "they were timed with other cuts: stages of 1 + 1 and of 2 blocks",
        ),
        (
            profile(machine={"cpu": "another", "processors": 2, "engine": "openvino", "engine_version": "1"}),
            "they were timed on different machines",
        ),
    ],
)
def test_only_what_ran_alike_is_compared(other: LayerProfile, reason: str | None) -> None:
    assert engines.unlike(profile(), other) == reason


def test_profiles_of_other_machines_and_cuts_say_so() -> None:
    there = profile(machine={"cpu": "another", "processors": 2, "engine": "openvino", "engine_version": "1"})
    assert list(engines.named([profile(), there])) == ["onnxruntime 1", "openvino 1 on another"]
    assert engines.stale(profile(), [2])
    assert not engines.stale(profile(), (1, 1))


def test_two_profiles_of_one_engine_have_two_colours() -> None:
    found = engines.colours({"a": profile(), "b": profile(), "c": profile("openvino")})
    assert len(set(found.values())) == 3
