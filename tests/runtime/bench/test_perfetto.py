"""The trace file against the trace-event format: names, times, pairs, and arrows that bind to the runs they join."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from stageline.models.errors import StagelineError
from stageline.runtime.bench.perfetto import COMPUTE, FIRST_STAGE, QUEUE, REQUESTS, events, write
from stageline.runtime.stages.recorder import RequestSpan, Span


def tandem(count: int) -> tuple[list[Span], list[RequestSpan]]:
    """Micro-batches through three stages of 10, 20 and 5 ms, a request each, the first two at once; one copy."""
    free, spans, requests = [100.0] * 3, [], []
    for number in range(count):
        submitted = arrived = 100.0 + 0.012 * max(0, number - 1)
        for stage, taken in enumerate((0.010, 0.020, 0.005)):
            began = max(free[stage], arrived)
            arrived = free[stage] = began + taken
            spans.append(Span(stage, "batch", number, began, arrived, 2, 7, (number,)))
        requests.append(RequestSpan(number, submitted, arrived))
    spans.append(Span(1, "copy", 0, 100.001, 100.002, 2, 7, (0,)))
    return spans, requests


@pytest.fixture
def made(tmp_path: Path) -> list[dict[str, Any]]:
    path = tmp_path / "trace.json"
    write(path, *tandem(6), "a run")
    document = json.loads(path.read_text())
    assert document["otherData"]["title"] == "a run"
    found: list[dict[str, Any]] = document["traceEvents"]
    return found


def of(found: list[dict[str, Any]], *phases: str) -> list[dict[str, Any]]:
    return [event for event in found if event["ph"] in phases]


def test_every_event_is_on_a_named_thread_of_a_named_process(made: list[dict[str, Any]]) -> None:
    processes = {e["pid"]: e["args"]["name"] for e in of(made, "M") if e["name"] == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in of(made, "M") if e["name"] == "thread_name"}
    assert processes == {REQUESTS: "requests", **{FIRST_STAGE + n: f"stage {n}" for n in range(3)}}
    assert threads[FIRST_STAGE, COMPUTE] == "compute"
    assert threads[FIRST_STAGE, QUEUE] == "queue"
    assert {(e["pid"], e["tid"]) for e in made if e["ph"] != "M"} <= threads.keys()


def test_times_are_microseconds_from_zero_in_order(made: list[dict[str, Any]]) -> None:
    times = [event["ts"] for event in made if event["ph"] != "M"]
    assert times == sorted(times)
    assert times[0] == 0
    runs = of(made, "X")
    assert len(runs) == 19
    assert {round(e["dur"]) for e in runs if e["cat"] == "batch"} == {10_000, 20_000, 5_000}
    assert all(e["dur"] >= 0 for e in runs)
    for _, lane in itertools.groupby(
        sorted((e for e in runs if e["cat"] != "copy"), key=lambda e: (e["pid"], e["ts"])), key=lambda e: e["pid"]
    ):
        for before, after in itertools.pairwise(lane):
            assert before["ts"] + before["dur"] <= after["ts"] + 0.01  # slices of a thread do not overlap


def test_an_arrow_leads_each_micro_batch_through_all_its_stages(made: list[dict[str, Any]]) -> None:
    runs = [e for e in of(made, "X") if e["cat"] == "batch"]
    arrows = of(made, "s", "t", "f")
    assert Counter(e["ph"] for e in arrows) == {"s": 6, "t": 6, "f": 6}
    for number in range(6):
        way = [e for e in arrows if e["id"] == number]
        assert [e["ph"] for e in way] == ["s", "t", "f"]
        assert [e["pid"] - FIRST_STAGE for e in way] == [0, 1, 2]
        assert way[-1]["bp"] == "e"  # binds to the slice that encloses it, as s and t do
        assert len({(e["cat"], e["name"]) for e in way}) == 1
        for event in way:
            enclosing = [
                run for run in runs
                if (run["pid"], run["tid"]) == (event["pid"], event["tid"])
                and run["ts"] <= event["ts"] <= run["ts"] + run["dur"]
            ]  # fmt: skip
            assert [run["args"]["micro-batch"] for run in enclosing] == [number]


def test_queues_and_requests_begin_before_they_end(made: list[dict[str, Any]]) -> None:
    opened: dict[Any, float] = {}
    waited: dict[str, float] = {}
    for event in of(made, "b", "e"):
        key = event["cat"], event["id"], event["name"], event["pid"]
        if event["ph"] == "b":
            assert key not in opened
            opened[key] = event["ts"]
        else:
            waited[event["name"] + str(event["pid"])] = event["ts"] - opened.pop(key)
    assert not opened
    assert sum(name.startswith("request ") for name in waited) == 6
    # The second comes with the first: it waits 10 ms for stage 0, and as long again for stage 1, which takes 20.
    assert waited[f"waits 1{FIRST_STAGE}"] == pytest.approx(10_000, abs=1)
    assert waited[f"waits 1{FIRST_STAGE + 1}"] == pytest.approx(10_000, abs=1)
    assert f"waits 0{FIRST_STAGE}" not in waited


def test_a_trace_of_nothing_is_empty_and_one_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    assert [event for event in events([], []) if event["ph"] != "M"] == []
    with pytest.raises(StagelineError, match="cannot be written: No such file or directory; choose another file"):
        write(tmp_path / "nowhere" / "trace.json", *tandem(1), "a run")
