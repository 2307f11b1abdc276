"""A changeover on its own: its states in their order, what it holds, and what it leaves behind when it fails."""

from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from typing import Any, cast

import pytest
from stageline.models.errors import EngineError, RequestError
from stageline.runtime.generation.changeover import Changeover
from stageline.runtime.generation.continuation import Continuation
from stageline.runtime.generation.scheduler import Scheduler
from stageline.runtime.stages.lanes import Lanes


class Engine:
    """Holds caches, hands them over, and takes those of its stage."""

    def __init__(self, name: str, full: bool, broken: bool = False) -> None:
        self.name, self.broken, self.caches = name, broken, {name: name} if full else {}

    def give_caches(self) -> Mapping[str, str]:
        given, self.caches = self.caches, {}
        return given

    def take_caches(self, caches: Mapping[str, str]) -> None:
        if self.broken:
            raise EngineError(f"{self.name} takes no cache")
        self.caches = {self.name: caches[self.name]}


class FakeLanes:
    """Lanes that do at once what is asked."""

    def __init__(self, *engines: Engine) -> None:
        self.engines = engines

    def __len__(self) -> int:
        return len(self.engines)

    @property
    def places(self) -> int:
        return len(self.engines)

    def ask(self, stage: int, question: Callable[[Engine], Any]) -> "Future[Any]":
        answer: Future[Any] = Future()
        try:
            answer.set_result(question(self.engines[stage]))
        except EngineError as error:
            answer.set_exception(error)
        return answer


class Driver:
    """What the generator does with changeovers; it serves on `lanes`, with one request running and one waiting."""

    def __init__(self) -> None:
        self.lanes = FakeLanes(Engine("a", full=True), Engine("b", full=True))
        self.scheduler = Scheduler(2, 64, groups=2, chunk=16, prefills=2)
        self.begun, self.waiting = Continuation([1], 1), Continuation([2], 1)
        self.scheduler.add(self.begun)
        step = self.scheduler.next()
        assert step is not None
        self.step = step
        self.scheduler.add(self.waiting)
        self.now = Changeover(self.scheduler, cast(Lanes, self.lanes), (), keep_caches=True, state="done")

    def asked(self, new: FakeLanes, keep_caches: bool) -> Changeover:
        asked = Changeover(self.scheduler, cast(Lanes, new), (), keep_caches)
        assert asked.state == "asked"
        asked.begin(self.now, lambda continuation: continuation is self.begun)
        assert asked.state == "draining"
        self.now = asked
        return asked

    def switch(self) -> None:
        def serve_on(lanes: Lanes, hops: object) -> None:
            assert self.now.state == "moving"
            self.lanes = cast(FakeLanes, lanes)

        self.now.switch(cast(Lanes, self.lanes), serve_on)


def test_caches_move_once_no_step_runs() -> None:
    driver, new = Driver(), FakeLanes(Engine("b", full=False))
    asked = driver.asked(new, keep_caches=True)
    assert (asked.issues_steps, asked.drained(in_flight=1), asked.drained(in_flight=0)) == (False, False, True)
    later = Continuation([3], 1)
    asked.admit(later)
    assert list(driver.scheduler.waiting) == [driver.waiting, later]  # they notice only a pause
    driver.scheduler.done(driver.step)
    driver.switch()
    assert (asked.state, asked.issues_steps, driver.lanes, driver.scheduler.groups) == ("done", True, new, 1)
    assert new.engines[0].caches == {"b": "b"}
    assert asked.pause_s.result(0) >= 0


def test_caches_that_do_not_move_are_given_back() -> None:
    driver = Driver()
    old = driver.lanes
    asked = driver.asked(FakeLanes(Engine("a", full=False), Engine("b", full=False, broken=True)), keep_caches=True)
    driver.scheduler.done(driver.step)
    driver.switch()
    assert (asked.state, asked.issues_steps, driver.lanes, driver.scheduler.groups) == ("failed", True, old, 2)
    assert [engine.caches for engine in old.engines] == [{"a": "a"}, {"b": "b"}]
    with pytest.raises(EngineError, match="b takes no cache"):
        asked.pause_s.result(0)
    new = FakeLanes(Engine("a", full=False), Engine("b", full=False))
    driver.asked(new, keep_caches=True)  # it can be tried again
    driver.switch()
    assert (driver.now.state, driver.lanes) == ("done", new)


def test_without_caches_those_that_have_begun_finish_first_and_the_others_are_held() -> None:
    driver, new = Driver(), FakeLanes(Engine("a", full=False))
    asked = driver.asked(new, keep_caches=False)
    later, cancelled = Continuation([3], 1), Continuation([4], 1)
    for continuation in (later, cancelled):
        asked.admit(continuation)
    assert asked.issues_steps
    assert (list(driver.scheduler.waiting), asked.held) == ([], [driver.waiting, later, cancelled])
    driver.scheduler.done(driver.step)
    assert not asked.drained(in_flight=0)  # one still runs
    driver.scheduler.end(driver.begun)
    driver.scheduler.end(cancelled)
    assert asked.drained(in_flight=0)
    driver.switch()
    assert (asked.state, asked.held, list(driver.scheduler.waiting)) == ("done", [], [driver.waiting, later])
    assert not any(slot.count for slot in driver.scheduler.slots)
    assert new.engines[0].caches == {}


def test_a_changeover_that_its_asker_cancels_is_dropped() -> None:
    driver = Driver()
    old, asked = driver.lanes, driver.asked(FakeLanes(Engine("a", full=False)), keep_caches=False)
    assert asked.pause_s.cancel()
    second = driver.asked(FakeLanes(Engine("a", full=False)), keep_caches=False)  # before the first has drained
    assert (asked.state, asked.held, second.held) == ("dropped", [], [driver.waiting])
    assert second.pause_s.cancel()
    driver.switch()
    assert (second.state, second.held, driver.lanes) == ("dropped", [], old)
    assert list(driver.scheduler.waiting) == [driver.waiting]
    with pytest.raises(CancelledError):
        second.pause_s.result(0)


def test_closing_drops_a_changeover_and_a_finished_one_stays_as_it_is() -> None:
    driver = Driver()
    asked = driver.asked(FakeLanes(Engine("a", full=False)), keep_caches=False)
    for _ in range(2):
        asked.drop(RequestError("closed"))
        assert (asked.state, asked.held) == ("dropped", [])
    with pytest.raises(RequestError, match="closed"):
        asked.pause_s.result(0)
    driver.scheduler.done(driver.step)
    done = driver.asked(FakeLanes(Engine("a", full=False), Engine("b", full=False)), keep_caches=True)
    driver.switch()
    done.drop(RequestError("closed"))
    assert (done.state, done.pause_s.exception(0)) == ("done", None)
