"""Lanes: each stage's work in its order, on the one thread that owns the engine."""

import threading
import time

import pytest
from stageline.models.errors import EngineError
from stageline.runtime.devices.cpu import CpuDevice
from stageline.runtime.engines import Device, Engine
from stageline.runtime.stages.lanes import Lander, Lane, Lanes, PipelineStage, Worker

SECONDS = 5  # for what must happen; nothing takes that long


class Recorder:
    """An engine that notes which threads used it."""

    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    max_rows: int | None = None
    packs: bool = False
    block_tokens: int | None = None

    def __init__(self) -> None:
        self.opened_on = threading.current_thread()
        self.closed_on: list[threading.Thread] = []

    def close(self) -> None:
        self.closed_on.append(threading.current_thread())


def test_work_is_done_in_order_by_the_thread_that_opened_the_engine() -> None:
    engines: list[Recorder] = []

    def opened(device: Device) -> Recorder:
        engines.append(Recorder())
        return engines[-1]

    done: list[tuple[int, int, threading.Thread]] = []
    lanes = Lanes([PipelineStage((), (), opened)] * 2, threads=2)

    def work(number: int, lane: Lane, engine: Engine) -> None:
        assert isinstance(engine, Recorder)
        assert engine.opened_on is threading.current_thread()
        assert lanes.is_worker()
        done.append((lane.number, number, threading.current_thread()))

    for number in range(100):
        lanes.put(number % 2, lambda lane, engine, number=number: work(number, lane, engine))
    assert not lanes.is_worker()
    lanes.close()  # after what was queued
    lanes.close()
    for stage in (0, 1):
        assert [number for lane, number, _ in done if lane == stage] == list(range(stage, 100, 2))
    assert [engine.closed_on for engine in engines] == [[engine.opened_on] for engine in engines]
    assert not any(engine.opened_on.is_alive() for engine in engines)


def test_a_worker_that_closes_does_not_wait_for_itself() -> None:
    before = set(threading.enumerate())
    lanes = Lanes([PipelineStage((), (), lambda device: Recorder())] * 2, threads=1)
    closed = threading.Event()

    def close(lane: Lane, engine: Engine) -> None:
        lanes.close()
        closed.set()

    lanes.put(1, close)
    assert closed.wait(SECONDS)
    lanes.close()
    deadline = time.monotonic() + SECONDS
    while not set(threading.enumerate()) <= before:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_an_engine_that_does_not_open_closes_the_others() -> None:
    opened = Recorder()

    def refuse(device: Device) -> Recorder:
        raise EngineError("no")

    with pytest.raises(EngineError, match="no"):
        Lanes([PipelineStage((), (), lambda device: opened), PipelineStage((), (), refuse)], threads=1)
    assert len(opened.closed_on) == 1


def test_stages_on_one_processor_have_one_worker_which_does_first_what_is_nearest_to_the_end() -> None:
    engines: list[Recorder] = []

    def opened(device: Device) -> Recorder:
        engines.append(Recorder())
        return engines[-1]

    lanes = Lanes([PipelineStage((), (), opened)] * 3, threads=1)
    done: list[tuple[int, int]] = []
    begin = threading.Event()

    def go(number: int, lane: Lane, engine: Engine) -> None:
        assert begin.wait(SECONDS)
        assert engine is engines[lane.number]
        done.append((lane.number, number))
        if lane.number < 2:
            lanes.put(lane.number + 1, lambda lane, engine: go(number, lane, engine))

    for number in range(3):
        lanes.put(0, lambda lane, engine, number=number: go(number, lane, engine))
    begin.set()
    deadline = time.monotonic() + SECONDS
    while len(done) < 9:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    lanes.close()
    assert done == [(stage, number) for number in range(3) for stage in range(3)]
    assert len({engine.opened_on for engine in engines}) == 1
    assert [len(engine.closed_on) for engine in engines] == [1, 1, 1]


def test_an_engine_that_does_not_open_closes_those_its_worker_has_opened() -> None:
    opened = Recorder()

    def refuse(device: Device) -> Recorder:
        raise EngineError("no")

    stages = [PipelineStage((), (), lambda device: opened), PipelineStage((), (), refuse)]
    with pytest.raises(EngineError, match="no"):
        Lanes([*stages, stages[0]], threads=1)
    assert len(opened.closed_on) == 1


def test_a_worker_that_ends_does_first_what_was_put_before_and_closes_its_devices_last() -> None:
    class Host(CpuDevice):
        def close(self) -> None:
            order.append("device")

    class Ordered(Recorder):
        def close(self) -> None:
            order.append("engine")

    order: list[str] = []
    entered, held = threading.Event(), threading.Event()

    def hold(lane: Lane, engine: Engine) -> None:
        entered.set()
        order.append(f"held {held.wait(SECONDS)}")

    device = Host((0,))
    lanes = [
        Lane(number, PipelineStage((), (), lambda device: Ordered()), device, Lander(device, number))
        for number in (0, 1)
    ]
    worker = Worker(lanes, device.close)
    worker.opened.result(SECONDS)
    worker.put(lanes[0], hold)
    assert entered.wait(SECONDS)
    for lane in lanes:
        worker.put(lane, lambda lane, engine: order.append(f"lane {lane.number}"))
    worker.end()
    worker.end()
    assert not worker.is_current()
    held.set()
    worker.join()
    assert order == ["held True", "lane 1", "lane 0", "engine", "engine", "device"]
