"""The load generator on contenders that answer at once, never, or with an error."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from threading import Event
from time import perf_counter

import numpy as np
import pytest
from stageline.runtime.bench import client as module
from stageline.runtime.bench.client import Client
from stageline.runtime.bench.contenders import RequestOutcome
from stageline.runtime.bench.inputs import Item
from stageline.runtime.bench.records import ANSWERED, CANCELLED, FAILED

ITEM = Item((), ((1, 2, 3),), {}, 2)


class Scripted:
    """A contender whose n-th request is settled by `settle(n, future)`, which may leave it unfinished."""

    name, pipeline = "scripted", None

    def __init__(self, settle: Callable[[int, "Future[RequestOutcome]"], object]) -> None:
        self.settle, self.sent = settle, 0

    def submit(self, item: Item) -> "Future[RequestOutcome]":
        future: Future[RequestOutcome] = Future()
        self.sent += 1
        self.settle(self.sent - 1, future)
        return future

    def close(self) -> None: ...


def answer(number: int, future: "Future[RequestOutcome]") -> None:
    now = perf_counter()
    future.set_result(RequestOutcome(now, 2, now, (0.5,)))


def test_an_open_loop_sends_every_arrival_once_and_keeps_its_intended_time() -> None:
    result = Client(Scripted(answer), [ITEM], Event()).open_loop([0.0, 0.0, 0.05], repeat=3)
    assert result.requests.intended_s.tolist() == pytest.approx([0.0, 0.0, 0.05])
    assert (result.requests.sent_s >= 0).all()
    assert set(result.requests.status) == {ANSWERED}
    assert set(result.requests.repeat) == {3}
    assert (result.requests.tokens_in == 3).all()
    assert result.gaps_s == [0.5] * 3


def test_a_closed_loop_never_has_more_unfinished_requests_than_its_concurrency() -> None:
    unfinished, peak = [0], [0]

    def later(number: int, future: "Future[RequestOutcome]") -> None:
        unfinished[0] += 1
        peak[0] = max(peak[0], unfinished[0])

        def end() -> None:
            unfinished[0] -= 1
            answer(number, future)

        threading.Timer(0.01, end).start()

    client = Client(Scripted(later), [ITEM], Event())
    result = client.closed_loop(3, 0.2)
    assert peak == [3]
    assert client.answered == len(result.requests) > 3


def test_requests_without_an_answer_are_cancelled_after_the_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DRAIN_S", 0.05)
    result = Client(Scripted(lambda number, future: None), [ITEM], Event()).open_loop([0.0, 0.0])
    assert set(result.requests.status) == {CANCELLED}
    assert np.isnan(result.requests.first_token_s).all()
    assert result.requests.latency_s.min() >= 0.05


def test_some_failures_are_recorded_and_ten_in_a_row_are_raised() -> None:
    def every_second(number: int, future: "Future[RequestOutcome]") -> None:
        future.set_exception(ValueError("odd")) if number % 2 else answer(number, future)

    result = Client(Scripted(every_second), [ITEM], Event()).open_loop([0.0] * 40)
    assert (result.requests.status == FAILED).sum() == 20
    contender = Scripted(lambda number, future: future.set_exception(ValueError("broken")))
    with pytest.raises(ValueError, match="broken"):
        Client(contender, [ITEM], Event()).open_loop([0.0] * 40)
    assert contender.sent <= 11


def test_stop_ends_a_drive_and_cancels_what_is_unfinished() -> None:
    stop = Event()
    threading.Timer(0.1, stop.set).start()
    began = perf_counter()
    result = Client(Scripted(lambda number, future: None), [ITEM], stop).open_loop([0.0, 60.0])
    assert perf_counter() - began < 10
    assert result.requests.status.tolist() == [CANCELLED]
