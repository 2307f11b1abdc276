"""The load generator on contenders that answer at once, never, or with an error."""

import math
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from threading import Event
from time import perf_counter

import numpy as np
import pytest
from stageline.runtime.bench import client as module
from stageline.runtime.bench.client import Client
from stageline.runtime.bench.contenders import FailedRequestError, RequestOutcome
from stageline.runtime.bench.inputs import Item
from stageline.runtime.bench.records import ANSWERED, CANCELLED, CUT, FAILED, UNANSWERED, Failures

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


def answering_after(seconds: float) -> tuple[Callable[[int, "Future[RequestOutcome]"], None], list[int]]:
    """Settles each request after some time, and the largest number of requests that were unfinished at a time."""
    unfinished, peak = [0], [0]

    def later(number: int, future: "Future[RequestOutcome]") -> None:
        unfinished[0] += 1
        peak[0] = max(peak[0], unfinished[0])

        def end() -> None:
            unfinished[0] -= 1
            answer(number, future)

        threading.Timer(seconds, end).start()

    return later, peak


def test_an_open_loop_sends_every_arrival_once_and_keeps_its_intended_time() -> None:
    result = Client(Scripted(answer), [ITEM], Event()).open_loop([0.0, 0.0, 0.05], repeat=3)
    assert result.requests.intended_s.tolist() == pytest.approx([0.0, 0.0, 0.05])
    assert (result.requests.sent_s >= 0).all()
    assert set(result.requests.status) == {ANSWERED}
    assert set(result.requests.repeat) == {3}
    assert (result.requests.tokens_in == 3).all()
    assert result.gaps_s == [0.5] * 3


def test_a_closed_loop_never_has_more_unfinished_requests_than_its_concurrency() -> None:
    later, peak = answering_after(0.01)
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


def test_a_ceiling_holds_requests_back_and_their_wait_counts_as_latency() -> None:
    later, peak = answering_after(0.02)
    result = Client(Scripted(later), [ITEM], Event()).open_loop([0.0] * 9, ceiling=3)
    assert peak == [3]
    assert set(result.requests.status) == {ANSWERED}
    assert (result.requests.intended_s == 0).all()
    assert (np.sort(result.requests.latency_s)[[0, 3, 6]] > [0.019, 0.039, 0.059]).all()


def test_what_a_ceiling_never_lets_through_counts_as_unanswered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DRAIN_S", 0.05)
    result = Client(Scripted(lambda number, future: None), [ITEM], Event()).open_loop([0.0] * 5, ceiling=2)
    assert result.requests.status.tolist() == [CANCELLED] * 5
    (failures,) = result.failures
    assert (failures.kind, failures.count) == (UNANSWERED, 5)
    assert "scripted did not answer within 0.05 s" in failures.sample


TALK = replace(ITEM, then=replace(ITEM, rows=((1,) * 5,), delay_s=0.03, then=replace(ITEM, rows=((1,) * 7,))))


def test_the_turns_of_a_conversation_follow_each_other_after_their_delay() -> None:
    result = Client(Scripted(answer), [TALK], Event()).open_loop([0.0])
    assert result.requests.tokens_in.tolist() == [3, 5, 7]
    ends = result.requests.intended_s + result.requests.latency_s
    assert result.requests.intended_s[1:] == pytest.approx(ends[:2] + [0.03, 0.0], abs=1e-3)


def test_a_closed_loop_begins_another_conversation_when_one_has_ended() -> None:
    result = Client(Scripted(answer), [TALK], Event()).closed_loop(1, 0.5)
    asked = result.requests.tokens_in.tolist()
    assert asked[:6] == [3, 5, 7, 3, 5, 7]
    assert (np.diff(result.requests.intended_s) >= 0).all()
    assert result.requests.intended_s.max() < 0.5


def test_a_conversation_ends_with_the_turn_that_fails() -> None:
    contender = Scripted(lambda number, future: future.set_exception(ValueError("odd")))
    result = Client(contender, [TALK], Event()).open_loop([0.0, 0.0])
    assert result.requests.status.tolist() == [FAILED, FAILED]


def test_failures_are_counted_by_kind_with_the_first_message() -> None:
    def fail(number: int, future: "Future[RequestOutcome]") -> None:
        if number % 4 == 3:
            answer(number, future)
        else:
            kind = "timeout" if number % 4 else "status 500"
            future.set_exception(FailedRequestError(kind, f"request {number}"))

    result = Client(Scripted(fail), [ITEM], Event()).open_loop([0.0] * 40)
    assert result.failures == (Failures("status 500", 10, "request 0"), Failures("timeout", 20, "request 1"))


def test_a_service_that_sheds_load_does_not_end_the_run() -> None:
    contender = Scripted(lambda number, future: future.set_exception(FailedRequestError("status 429", "busy")))
    result = Client(contender, [ITEM], Event()).open_loop([0.0] * 40)
    assert result.failures == (Failures("status 429", 40, "busy"),)


def test_given_items_begin_with_the_first_in_each_drive() -> None:
    items = [replace(ITEM, rows=((1,) * n,)) for n in (4, 5, 6)]
    client = Client(Scripted(answer), [ITEM], Event())
    for _ in range(2):
        assert client.open_loop([0.0] * 4, items=items).requests.tokens_in.tolist() == [4, 5, 6, 4]


def some(count: int) -> Callable[[int, "Future[RequestOutcome]"], object]:
    """Answers so many requests, and none after them."""
    return lambda number, future: answer(number, future) if number < count else None


@pytest.mark.parametrize("ceiling", [None, 5])
def test_a_queue_that_only_grows_is_cut_and_counted(ceiling: int | None) -> None:
    began = perf_counter()
    result = Client(Scripted(some(3)), [ITEM], Event()).open_loop([0.0] * 20, ceiling=ceiling, give_up_s=0.05)
    assert perf_counter() - began < module.DRAIN_S / 2
    assert sorted(result.requests.status) == [ANSWERED] * 3 + [CANCELLED] * 17
    (failures,) = result.failures
    assert (failures.kind, failures.count) == (CUT, 17)
    assert failures.sample.startswith("scripted had answered 3 of 20 requests 0.05 s after the last arrival; far more")


def test_half_of_the_requests_or_more_are_reason_to_wait_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DRAIN_S", 0.2)
    result = Client(Scripted(some(10)), [ITEM], Event()).open_loop([0.0] * 20, give_up_s=0.05)
    assert {(one.kind, one.count) for one in result.failures} == {(UNANSWERED, 10)}
    assert result.requests.latency_s[10:].min() >= 0.2


@pytest.mark.parametrize("give_up_s", [0.0, math.inf])
def test_no_request_is_cancelled_before_the_latency_that_it_may_keep(
    give_up_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DRAIN_S", 0.0)
    later, _ = answering_after(0.1)
    client = Client(Scripted(later), [ITEM], Event(), bound_s=20.0)
    assert set(client.open_loop([0.0] * 4, give_up_s=give_up_s).requests.status) == {ANSWERED}
    assert set(client.closed_loop(2, 0.01).requests.status) == {ANSWERED}
