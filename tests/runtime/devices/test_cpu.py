"""Cores are shared fairly, and a worker stays on its own."""

import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stageline.runtime.devices.cpu import allowed_cores, share_cores, start_worker


@given(stages=st.integers(1, 40), cores=st.sets(st.integers(0, 200), min_size=1, max_size=64).map(sorted))
def test_cores_are_shared_evenly_and_contiguously(stages: int, cores: list[int]) -> None:
    shares = share_cores(stages, cores)
    assert len(shares) == stages
    sizes = [len(share) for share in shares]
    assert min(sizes) >= 1
    if stages <= len(cores):
        assert [core for share in shares for core in share] == cores
        assert max(sizes) - min(sizes) <= 1
    else:
        uses = [sum(core in share for share in shares) for core in cores]
        assert max(uses) - min(uses) <= 1


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system has no pinning")
def test_a_worker_runs_on_its_cores_and_leaves_the_caller_alone() -> None:
    before = os.sched_getaffinity(0)
    seen: list[tuple[str, set[int]]] = []
    last = allowed_cores()[-1:]
    start_worker(
        "stage-7", last, lambda: seen.append((threading.current_thread().name, os.sched_getaffinity(0)))
    ).join()
    assert seen == [("stage-7", set(last))]
    assert os.sched_getaffinity(0) == before
