"""Verdicts on synthetic runs whose truth is known: same, noisy, slower, another model, too few requests."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import synthetic_runs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stageline.models.errors import RequestError
from stageline.runtime.bench.compare import (
    FigureChange,
    carried,
    compare,
    incomparable,
    missing,
    same_model,
    sample,
)
from stageline.runtime.bench.confidence import Ratio, chance
from stageline.runtime.bench.records import OURS, Figure, Load, Run

RUN = synthetic_runs.run(1, [Load("SingleStream"), Load("Concurrency", 4)])


def measured(number: int, speed: float = 1.0, noise: float = 0.01, count: int = 600, repeats: int = 3) -> Run:
    """A run of one model that answers `speed` x 20 requests/s; `noise` is the standard deviation of a repeat."""
    draw = np.random.default_rng(number)

    def figures() -> dict[str, Figure]:
        factor = speed * np.exp(draw.normal(0, noise, repeats))
        times = (0.05 / factor).tolist(), (0.2 / factor * np.exp(draw.normal(0, noise, repeats))).tolist()
        return {
            "requests_per_s": Figure.of("requests/s", "higher", (20 * factor).tolist()),
            "latency_p50_s": Figure.of("s", "lower", times[0]),
            "latency_p99_s": Figure.of("s", "lower", times[1]),
        }

    kept = [replace(one, requests=count, figures=figures()) for one in RUN.measurements]
    return replace(RUN, id=f"run-{number}", measurements=tuple(kept), checkpoint="a" * 64)


def verdicts(changes: Sequence[FigureChange]) -> set[str]:
    return {change.verdict for change in changes}


def test_a_run_is_the_same_as_itself() -> None:
    run = measured(1)
    assert verdicts(compare(run, run)) == {"same"}


@pytest.mark.parametrize("repeats", [2, 3, 6])
def test_of_noisy_runs_of_the_same_speed_1_in_20_has_a_figure_that_is_called_otherwise(repeats: int) -> None:
    """Six figures each, four of which do not follow from others: judged one by one, every fifth comparison would have
    one."""
    found = [
        verdicts(compare(measured(n, noise=0.2, repeats=repeats), measured(n + 1, noise=0.2, repeats=repeats)))
        for n in range(2, 402, 2)
    ]
    assert np.mean([bool(one & {"better", "worse"}) for one in found]) < 0.08
    assert "undecided" in found[0]


def beside(number: int, ours: tuple[float, float], theirs: tuple[float, float]) -> Run:
    """A run of the pipeline and two baselines, each of a speed and a noise."""
    runs = [measured(3 * number + n, *given) for n, given in enumerate((ours, theirs, theirs))]
    kept = [
        replace(one, contender=name)
        for run, name in zip(runs, (OURS, "onnxruntime", "torch"), strict=True)
        for one in run.measurements
    ]
    return replace(runs[0], measurements=tuple(kept))


@pytest.mark.parametrize("changed", ["pipeline", "baselines"])
def test_what_surely_changed_lets_nothing_else_be_called_so_by_chance(changed: str) -> None:
    """If all were judged together, what changed would raise the share of false calls of the others to 3 in 20."""
    before, after, noisy = (1.0, 0.01), (0.8, 0.01), (1.0, 0.2)
    false = 0
    for n in range(0, 300, 2):
        ours, theirs = ((before, after), (noisy, noisy)) if changed == "pipeline" else ((noisy, noisy), (before, after))
        found = compare(*(beside(n + place, ours[place], theirs[place]) for place in (0, 1)))
        others = [one for one in found if (one.contender == OURS) != (changed == "pipeline")]
        false += bool(verdicts(others) & {"better", "worse"})
        assert len(others) < len(found)
    assert false / 150 < 0.09


def test_a_run_20_percent_slower_is_worse_and_the_other_way_round_better() -> None:
    before, after = measured(1), measured(2, speed=0.8)
    assert verdicts(compare(before, after)) == {"worse"}
    assert verdicts(compare(after, before)) == {"better"}
    assert verdicts(compare(before, after, margin=0.5)) == {"same"}


def test_six_times_slower_is_undecided_where_the_interval_is_wide() -> None:
    change = FigureChange("stageline", "1 at a time", "latency_p50_s", Figure.of("s", "lower", [0.009, 0.010]),
                          Figure.of("s", "lower", [0.020, 0.120]), Ratio.between([0.009, 0.010], [0.020, 0.120]),
                          0.05, chance([0.009, 0.010], [0.020, 0.120]))  # fmt: skip
    assert change.ratio is not None
    assert change.ratio.value > 5
    assert change.verdict == "undecided"


def test_two_requests_decide_nothing_however_alike_their_times() -> None:
    few = measured(1, noise=0.0, count=2, repeats=2)
    found = compare(few, replace(few, id="again"))
    assert verdicts(found) == {"undecided"}
    assert {change.doubt for change in found} == {"2 requests; a verdict needs 10"}
    once = measured(1, repeats=1)
    assert {change.doubt for change in compare(once, measured(2, 0.5, repeats=1))} == {"one repeat has no interval"}


def test_another_model_or_another_load_is_refused_with_the_reason() -> None:
    run = measured(1)
    other = replace(run, id="other", checkpoint="b" * 64, bundle="bundles/encoder", model="bert")
    with pytest.raises(
        RequestError, match=r"different models, model1 \(LlamaForCausalLM, 30 blocks, float32\) and encoder"
    ):
        compare(run, other)
    longer = replace(run, settings=replace(run.settings, output_tokens=99))
    assert "new tokens per request: 24, and 99" in str(incomparable(run, longer))
    faster = replace(run, measurements=tuple(replace(m, load=Load("Rate", rate_per_s=9.0)) for m in run.measurements))
    assert "no contender has the same load in both" in str(incomparable(run, faster))
    assert incomparable(run, run) is None


def test_other_cuts_of_a_model_are_that_model() -> None:
    run = measured(1)
    recut = replace(run, bundle="/cache/cuts/model1-3-stages", bundle_digest="f" * 64)
    assert same_model(run, recut)
    unknown = replace(run, checkpoint="", bundle="elsewhere", bundle_digest="0" * 64)
    assert same_model(run, unknown)  # as far as an older run tells: of one kind, with as many blocks
    assert not same_model(run, replace(unknown, model="bert"))


def test_a_percentile_is_carried_by_its_sample_or_not_said() -> None:
    few = replace(synthetic_runs.run(1, count=60).measurements[0], requests=60)
    assert sample(few) == 20
    assert missing(few, "latency_p50_s") is None
    assert missing(few, "latency_p99_s") == "p99 needs 100 requests in each repeat, not 20"
    assert "latency_p99_s" in few.figures
    assert "latency_p99_s" not in carried(few).figures
    assert "requests_per_s" in carried(few).figures
    many = replace(few, requests=300)
    assert missing(many, "latency_p99_s") is None


def test_goodput_that_fell_to_zero_is_worse_and_stays_the_same_at_zero() -> None:
    none, some = Figure.of("requests/s", "higher", [0.0] * 3), Figure.of("requests/s", "higher", [9.0, 10.0, 11.0])

    def verdict(before: Figure, after: Figure) -> str:
        return FigureChange(
            "stageline", "x", "goodput_per_s", before, after, None, 0.05, chance(before.values, after.values)
        ).verdict

    assert (verdict(some, none), verdict(none, some), verdict(none, none)) == ("worse", "better", "same")


positive = st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=6)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(before=positive, after=positive)
def test_verdicts_are_turned_round_with_the_runs(before: list[float], after: list[float]) -> None:
    def verdict(one: list[float], other: list[float]) -> str:
        ratio = Ratio.between(one, other)
        assert ratio is not None
        figures = Figure.of("s", "lower", one), Figure.of("s", "lower", other)
        return FigureChange("c", "l", "latency_p50_s", *figures, ratio, 0.05, ratio.chance).verdict

    there, back = verdict(before, after), verdict(after, before)
    assert back == {"better": "worse", "worse": "better"}.get(there, there)
