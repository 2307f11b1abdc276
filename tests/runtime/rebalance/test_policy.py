"""The rebalancing policy on made-up windows of stages whose true speeds are known."""

import itertools
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stageline.runtime.rebalance.policy import Observation, Policy, PolicySettings, better_cut

SETTINGS = PolicySettings(window_s=1, windows=3, min_runs=8, margin=0.1, min_gain=0.05, rest_s=10, max_rest_s=80)


def times(layers: Sequence[int], use_s: Sequence[float], slowness: Sequence[float]) -> list[float]:
    """What each stage truly takes for a step."""
    ends = list(itertools.accumulate(layers))
    found = []
    for count, end, slow in zip(layers, ends, slowness, strict=True):
        ours = sum(use_s[end - count + 1 : end + 1])
        ours += use_s[0] if end == count else 0
        ours += use_s[-1] if end == ends[-1] else 0
        found.append(slow * ours)
    return found


def window(
    layers: Sequence[int], use_s: Sequence[float], slowness: Sequence[float], expected_s: Sequence[float] | None = None,
    runs: int = 20,
) -> Observation:  # fmt: skip
    """What is measured of it; `expected_s` is what the costs say, if they are wrong."""
    busy = tuple(runs * s for s in times(layers, use_s, slowness))
    return Observation(tuple(layers), busy, (runs,) * len(layers), tuple(runs * s for s in expected_s or use_s))


EVEN = [0.0, *[1.0] * 30, 8.0]  # 30 blocks, and a head that takes as long as eight


def advised(policy: Policy, windows: Sequence[Observation], now_s: float = 0.0) -> list[int]:
    """The windows, a second each, that gave advice."""
    return [n for n, seen in enumerate(windows) if policy.observe(now_s + n, seen) is not None]


def test_an_uneven_cut_is_made_even_after_three_windows() -> None:
    policy, uneven = Policy(SETTINGS), window([25, 5], EVEN, [1, 1])
    assert policy.observe(0, uneven) is None
    assert policy.observe(1, uneven) is None
    advice = policy.observe(2, uneven)
    assert advice is not None
    assert advice.layers == (19, 11)
    assert advice.gain == pytest.approx(25 / 19 - 1)
    assert str(advice) == (
        "layers 19,11 instead of 25,5 would have 1.32 x the throughput: the bottleneck is busy 32% longer than the mean"
    )


def test_a_slowed_stage_gives_blocks_away_and_takes_them_back() -> None:
    slowed = better_cut(window([19, 11], EVEN, [2, 1]))
    assert slowed is not None
    assert slowed.layers == (12, 18)  # 24 and 26; 13 and 17 have the same bottleneck and a longer way
    assert slowed.slowness == pytest.approx((2, 1))
    assert "times longer than expected: stage 0 2.00" in str(slowed)
    recovered = better_cut(window(slowed.layers, EVEN, [1, 1]))
    assert recovered is not None
    assert recovered.layers == (19, 11)


def test_an_even_cut_is_left_alone() -> None:
    policy = Policy(SETTINGS)
    assert advised(policy, [window([19, 11], EVEN, [1, 1])] * 20) == []
    assert advised(policy, [window([19, 11], EVEN, [1.09, 1])] * 20) == []  # within the margin
    assert advised(policy, [window([30], EVEN, [1])] * 20) == []


def test_a_bottleneck_that_no_cut_relieves_is_left_alone() -> None:
    head = [0.0, 1.0, 1.0, 1.0, 50.0]
    assert better_cut(window([2, 1], head, [1, 1])) is None
    assert advised(Policy(SETTINGS), [window([2, 1], head, [1, 1])] * 10) == []


def test_a_small_gain_is_not_worth_a_switch() -> None:
    coarse = [0.0, 10.0, 10.0, 10.0, 10.0, 1.0]  # 20 and 21 is as good as it gets
    seen = window([2, 2], coarse, [1.3, 1])
    assert advised(Policy(SETTINGS), [seen] * 10) == []


def test_idle_windows_and_a_passing_disturbance_tell_nothing() -> None:
    uneven, even = window([25, 5], EVEN, [1, 1]), window([25, 5], EVEN, [1, 1.923])
    assert advised(Policy(SETTINGS), [uneven, uneven, even] * 10) == []
    idle = window([25, 5], EVEN, [1, 1], runs=3)
    assert advised(Policy(SETTINGS), [uneven, uneven, idle] * 10) == []
    nothing = Observation((25, 5), (0.0, 0.0), (0, 0), (0.0,) * 32)
    assert advised(Policy(SETTINGS), [nothing] * 10) == []


def test_windows_of_another_cut_do_not_count() -> None:
    first, second = window([25, 5], EVEN, [1, 1]), window([5, 25], EVEN, [1, 1])
    assert advised(Policy(SETTINGS), [first, first, second, second, first, second]) == []


def test_it_rests_after_a_switch_and_longer_while_switches_are_frequent() -> None:
    policy, uneven = Policy(SETTINGS), window([25, 5], EVEN, [1, 1])
    now, rests = 0.0, []
    for _ in range(6):
        policy.switched(now)
        began = now
        while policy.observe(now, uneven) is None:
            now += 1
        rests.append(now - began - 2)  # it takes three windows
    assert rests == [10, 20, 40, 80, 80, 80]
    policy.switched(now + 1000)
    assert advised(policy, [uneven] * 13, now + 1000) == [12]


@pytest.mark.parametrize("period", [2, 5, 15])
def test_a_disturbance_that_comes_and_goes_does_not_make_it_flap(period: int) -> None:
    """An hour in which one stage is slow half of the time."""
    policy, layers, switches = Policy(SETTINGS), (19, 11), 0
    for now in range(3600):
        slow = [2.0, 1.0] if now // period % 2 else [1.0, 1.0]
        advice = policy.observe(now, window(layers, EVEN, slow))
        if advice is not None:
            layers, switches = advice.layers, switches + 1
            policy.switched(now)
    assert switches <= 3600 / SETTINGS.max_rest_s + 5


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**9))
def test_it_settles_near_the_best_cut_whatever_the_costs_say(seed: int) -> None:
    """Devices, blocks and head of random speed, and costs that err by up to a third."""
    rng = random.Random(seed)
    stages, blocks = rng.randint(2, 4), rng.randint(8, 30)
    use_s = [rng.uniform(0, 2), *([1.0] * blocks), rng.uniform(0, 8)]
    expected_s = [s * rng.uniform(0.75, 1.33) if n in (0, blocks + 1) else s for n, s in enumerate(use_s)]
    slowness = [rng.choice([1.0, 1.0, 1.5, 2.0]) for _ in range(stages)]
    cuts = [0, *sorted(rng.sample(range(1, blocks), stages - 1)), blocks]
    layers = [b - a for a, b in itertools.pairwise(cuts)]
    for _ in range(8):
        advice = better_cut(window(layers, use_s, slowness, expected_s))
        if advice is None or advice.gain < SETTINGS.min_gain:
            break
        layers = list(advice.layers)
    best = min(
        max(times([b - a for a, b in itertools.pairwise((0, *ends, blocks))], use_s, slowness))
        for ends in itertools.combinations(range(1, blocks), stages - 1)
    )
    assert max(times(layers, use_s, slowness)) <= 1.4 * best + 2 * max(slowness)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**9))
def test_with_right_costs_one_step_finds_the_best_cut(seed: int) -> None:
    rng = random.Random(seed)
    stages, blocks = rng.randint(2, 4), rng.randint(5, 14)
    use_s = [rng.uniform(0, 2), *(rng.uniform(0.5, 2) for _ in range(blocks)), rng.uniform(0, 8)]
    slowness = [rng.uniform(1, 3) for _ in range(stages)]
    cuts = [0, *sorted(rng.sample(range(1, blocks), stages - 1)), blocks]
    layers = [b - a for a, b in itertools.pairwise(cuts)]
    advice = better_cut(window(layers, use_s, slowness))
    found = list(advice.layers) if advice is not None else layers
    best = min(
        max(times([b - a for a, b in itertools.pairwise((0, *ends, blocks))], use_s, slowness))
        for ends in itertools.combinations(range(1, blocks), stages - 1)
    )
    assert max(times(found, use_s, slowness)) == pytest.approx(best)
    if advice is not None:
        assert advice.gain == pytest.approx(max(times(layers, use_s, slowness)) / best - 1)
