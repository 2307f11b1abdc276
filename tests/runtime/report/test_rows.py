"""The rows of charts, computed by hand: throughput a device, and what a million tokens cost."""

from dataclasses import replace

import pytest
import synthetic_runs
from stageline.runtime.bench.records import Figure, Load, Run
from stageline.runtime.report.rows import pareto_rows


def run_on(devices: tuple[str, ...], gpu: str | None) -> Run:
    """20 ms a token and 1,000 tokens/s, of the pipeline, a baseline in this process and a service."""
    template = synthetic_runs.run(1, [Load("Concurrency", 8)])
    figures = {
        "tpot_p50_s": Figure.of("s", "lower", [0.02, 0.02]),
        "tokens_out_per_s": Figure.of("tokens/s", "higher", [1000.0, 1000.0]),
    }
    ours = replace(template.measurements[0], figures=figures)
    names = ("stageline", "onnxruntime", "http://10.0.0.2:8000")
    return replace(
        template,
        plan=replace(template.plan, devices=devices),
        environment=replace(template.environment, gpu=gpu),
        measurements=tuple(replace(ours, contender=name) for name in names),
    )


def costs(devices: tuple[str, ...], gpu: str | None) -> list[str]:
    return [row["cost"] for row in pareto_rows(run_on(devices, gpu))]


@pytest.mark.parametrize(
    ("gpu", "dollars_per_h"),
    [
        ("NVIDIA H100 80GB HBM3", 3.0), ("NVIDIA H200", 3.8), ("NVIDIA A100-SXM4-80GB", 1.8), ("NVIDIA L40S", 1.4),
        ("NVIDIA L4", 0.7), ("Tesla T4", 0.35), ("NVIDIA GeForce RTX 4090", 0.4), ("NVIDIA GeForce RTX 5090", 0.7),
    ],
)  # fmt: skip
def test_a_million_tokens_cost_the_devices_price_for_as_long_as_they_take(gpu: str, dollars_per_h: float) -> None:
    of_one, of_two = costs(("cuda:0",), gpu), costs(("cuda:0", "cuda:1"), f"{gpu}, {gpu}")
    hours = 1e6 / 1000 / 3600
    assert float(of_one[0]) == pytest.approx(dollars_per_h * hours, rel=6e-3)
    assert float(of_two[0]) == pytest.approx(2 * dollars_per_h * hours, rel=6e-3)
    assert of_one[1:] == of_two[1:] == ["-", "-"]  # a baseline runs on the CPU; what a service runs on is not known


@pytest.mark.parametrize(
    ("devices", "gpu"),
    [
        (("cpu:0", "cpu:1"), None),
        (("cpu:0", "cpu:1"), "NVIDIA H100 80GB HBM3"),  # beside which it lies idle
        (("cuda:0", "cpu:0"), "NVIDIA H100 80GB HBM3"),
        (("cuda:0", "cuda:1"), "NVIDIA H100 80GB HBM3, NVIDIA L4"),
        (("cuda:0",), "NVIDIA GeForce RTX 4090 Laptop GPU"),
        (("cuda:0",), "NVIDIA GeForce GTX 1080"),
    ],
)
def test_what_has_no_known_price_has_no_cost(devices: tuple[str, ...], gpu: str | None) -> None:
    assert costs(devices, gpu) == ["-", "-", "-"]


def test_throughput_is_shared_among_the_devices_that_gave_it() -> None:
    rows = pareto_rows(run_on(("cuda:0", "cuda:1", "cuda:0"), "NVIDIA L4, NVIDIA L4"))
    assert [(row["user"], row["device"]) for row in rows] == [(50.0, 500.0), (50.0, 1000.0), (50.0, 500.0)]
