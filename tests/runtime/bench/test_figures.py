"""Figures of requests and spans that are small enough to check by hand."""

import numpy as np
import pytest
from stageline.runtime.bench import figures
from stageline.runtime.bench.client import DriveResult
from stageline.runtime.bench.figures import MEANINGS, StageUse
from stageline.runtime.bench.records import ANSWERED, CANCELLED, FAILED, Requests, Slo, ladder
from stageline.runtime.stages.recorder import Span

NAN = float("nan")


def drive(
    intended: list[float], first: list[float], latency: list[float], out: list[int], status: list[int]
) -> DriveResult:
    """Requests of 10 tokens, over 4 seconds."""
    requests = Requests(
        np.zeros(len(intended), np.uint16), np.array(intended), np.zeros(len(intended), np.float32),
        np.array(first, np.float32), np.array(latency, np.float32), np.full(len(intended), 10, np.uint32),
        np.array(out, np.uint32), np.array(status, np.uint8),
    )  # fmt: skip
    return DriveResult(100.0, 104.0, requests)


GENERATED = drive([0, 1, 3], [0.5, 0.25, NAN], [1.5, 0.75, 0.5], [6, 3, 0], [ANSWERED, ANSWERED, FAILED])


def test_figures_of_requests() -> None:
    found = figures.of_requests(GENERATED, 1, Slo(ttft_s=0.3))
    expected = {
        "requests_per_s": 2 / 4, "tokens_per_s": 9 / 4, "tokens_in_per_s": 20 / 4, "failed_share": 1 / 3,
        "goodput_per_s": 1 / 4, "in_flight": 2.75 / 4, "latency_max_s": 1.5, "ttft_mean_s": 0.375, "tpot_max_s": 0.25,
        "tpot_mean_s": (0.2 + 0.25) / 2,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert set(found) <= set(MEANINGS)
    assert not any(name.startswith("itl_") for name in found)  # no gaps were recorded


def test_a_model_that_does_not_generate_counts_tokens_read_and_rows() -> None:
    found = figures.of_requests(drive([0, 1], [NAN] * 2, [0.5] * 2, [0, 0], [ANSWERED] * 2), 3, Slo())
    assert (found["tokens_per_s"], found["samples_per_s"]) == (20 / 4, 2 * 3 / 4)
    assert not {"goodput_per_s", "tokens_out_per_s", "ttft_p50_s", "tpot_p50_s"} & set(found)


def test_what_had_no_answer_in_time_is_slower_than_all_that_had_one() -> None:
    """Else a load that swamps a contender would look fast: only what it answered first would count."""
    latency, status = [1.0, 2.0, 3.0, 0.5, 0.1], [ANSWERED] * 3 + [CANCELLED, FAILED]
    swamped = drive([0] * 5, [0.5, 1.0, 1.5, NAN, NAN], latency, [3, 3, 3, 0, 0], status)
    found = figures.of_requests(swamped, 1, Slo())
    assert (found["latency_p50_s"], found["ttft_p50_s"]) == (2.5, 1.25)  # of 1, 2, 3 and one that is longer
    unknown = {f"{name}_{which}_s" for name in ("latency", "ttft") for which in ("p90", "p95", "p99", "max", "mean")}
    assert not unknown & set(found)
    assert found["tpot_mean_s"] == pytest.approx((0.25 + 0.5 + 0.75) / 3)
    known = figures.times_s(swamped.requests)
    assert [len(known[name]) for name in ("latency", "ttft", "tpot")] == [4, 4, 3]
    drawn = ladder(known["latency"])
    assert (drawn[0], drawn[50], len(drawn)) == (1.0, 2.5, 67)  # the third of four is at p66.7
    assert ladder(np.array([np.inf, np.inf])) == ladder(np.array([NAN])) == ()


def test_active_time_joins_overlaps_and_bubbles_are_the_rest() -> None:
    overlapping = drive([0, 0.5, 3], [NAN] * 3, [1.0, 1.0, 0.5], [0] * 3, [ANSWERED] * 3)
    assert figures.active_s(overlapping) == pytest.approx(1.5 + 0.5)
    assert figures.bubble_ratio(StageUse((1.0, 0.5), (0, 0), (3, 3)), 2.0) == pytest.approx(1 - 1.5 / 4)
    assert figures.bubble_ratio(StageUse((1.0,), (0,), (3,)), 0.0) is None


def test_a_hop_counts_only_if_the_next_stage_was_idle() -> None:
    times = [(0, 0, 0.0, 1.0), (1, 0, 1.1, 2.0), (0, 1, 1.0, 1.5), (1, 1, 2.0, 3.0), (0, 2, 3.5, 4.0), (1, 2, 4.2, 5.0)]
    spans = [Span(stage, "batch", number, begin, end, 1, 1, ()) for stage, number, begin, end in times]
    assert figures.hop_overhead_s(spans) == pytest.approx(0.2)  # micro-batch 1 had to wait for stage 1
    assert figures.hop_overhead_s(spans[:2]) is None  # nothing is known of the stage before its first run


def test_figures_over_repeats_are_those_that_all_repeats_have() -> None:
    found = figures.over_repeats([{"requests_per_s": 1.0, "power_w": 5.0}, {"requests_per_s": 3.0}])
    assert list(found) == ["requests_per_s"]
    assert (found["requests_per_s"].mean, found["requests_per_s"].better) == (2.0, "higher")
    assert figures.over_repeats([]) == {}
