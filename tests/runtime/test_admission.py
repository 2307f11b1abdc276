"""Slots: first come, first served, and none is lost."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from stageline.models.errors import QueueFullError, RequestError
from stageline.runtime.admission import Admission


def test_a_slot_given_back_goes_to_the_longest_waiting() -> None:
    async def scenario() -> None:
        admission, order = Admission(1), list[int]()
        admission.take(wait=False, timeout=None)

        async def taker(number: int) -> None:
            await admission.take_async()
            order.append(number)
            admission.give_back()

        tasks = [asyncio.create_task(taker(number)) for number in range(5)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.sleep(0)
        admission.give_back()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order == [0, 2, 3, 4]
        admission.take(wait=False, timeout=None)

    asyncio.run(scenario())


def test_a_slot_granted_to_a_cancelled_task_is_not_lost() -> None:
    async def scenario() -> None:
        admission = Admission(1)
        admission.take(wait=False, timeout=None)
        task = asyncio.create_task(admission.take_async())
        await asyncio.sleep(0)
        admission.give_back()  # granted, and cancelled before the task wakes
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        admission.take(wait=False, timeout=None)

    asyncio.run(scenario())


def test_never_more_holders_than_slots() -> None:
    admission, lock, held, most = Admission(3), threading.Lock(), 0, 0

    def hold(_: int) -> None:
        nonlocal held, most
        admission.take(wait=True, timeout=None)
        with lock:
            held += 1
            most = max(most, held)
        with lock:
            held -= 1
        admission.give_back()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(hold, range(500)))
    assert 1 <= most <= 3
    for _ in range(3):
        admission.take(wait=False, timeout=None)
    with pytest.raises(QueueFullError):
        admission.take(wait=False, timeout=None)


def test_closing_frees_those_who_wait() -> None:
    admission = Admission(1)
    admission.take(wait=False, timeout=None)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(admission.take, True, None)
        admission.close("shut")
        with pytest.raises(RequestError, match="shut"):
            waiting.result(5)
