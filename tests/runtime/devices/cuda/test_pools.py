"""Pools: no block is in two hands, none is given out while something works on it, and after a while none is made."""

import threading
from itertools import count
from typing import Any

import pytest
from fake_cuda import FakeDriver
from hypothesis import given, settings
from hypothesis import strategies as st
from stageline.runtime.devices.cuda.driver import CudaError
from stageline.runtime.devices.cuda.events import Events
from stageline.runtime.devices.cuda.pools import LARGE_BYTES, Buffer, Pool, size_class


def opened(driver: FakeDriver) -> tuple[Pool, Events, int]:
    """A pool, events and a stream on GPU 0."""
    driver.make_current(driver.retain(0))
    return Pool(driver.allocate, driver.free), Events(driver), driver.new_stream()


@given(st.integers(0, 1 << 40))
def test_a_block_is_large_enough_and_little_larger(size: int) -> None:
    found = size_class(size)
    assert found >= size
    assert found % 64 == 0
    assert found <= max(256, 1.25 * size)
    assert found - size < 2 * 2**20 or found <= LARGE_BYTES
    assert size_class(found) == found


def test_a_large_block_is_as_large_as_asked_for_and_serves_what_is_a_little_smaller() -> None:
    driver = FakeDriver()
    pool, _, _ = opened(driver)
    size = LARGE_BYTES + 2**20
    cache = pool.take(size)
    assert pool.held_bytes == cache.size_bytes == LARGE_BYTES + 2 * 2**20
    del cache
    smaller = pool.take(LARGE_BYTES + 1)
    assert (pool.allocations, smaller.size_bytes) == (1, LARGE_BYTES + 2 * 2**20)
    del smaller
    assert pool.take(LARGE_BYTES // 2).size_bytes == LARGE_BYTES // 2
    assert pool.allocations == 2


def test_of_two_threads_that_read_in_one_stream_the_later_event_counts() -> None:
    """Whichever of them writes its event down last."""
    driver = FakeDriver()
    pool, events, stream = opened(driver)
    held = [pool.take(1000)]
    address, first = held[0].address, events.record(stream)

    def later() -> None:
        driver.make_current(1000)
        driver.zero(address, 1, stream)
        held[0].guard(events.record(stream))

    thread = threading.Thread(target=later)
    thread.start()
    thread.join()
    held.pop().guard(first)
    first.wait()
    assert pool.take(1000).address != address
    driver.synchronize(stream)
    assert address in {buffer.address for buffer in [pool.take(1000), pool.take(1000)]}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_is_taken_dropped_and_finished_no_live_block_is_given_out(data: st.DataObject) -> None:
    """Buffers are taken, worked on, dropped, and the work is done, in any order. A block is live while it is held, or
    while work on it is running."""
    driver = FakeDriver()
    pool, events, stream = opened(driver)
    held: list[Buffer] = []
    under_way: list[tuple[Any, int]] = []  # (event, address)
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["take", "work", "drop", "finish"]))
        if action == "take":
            buffer = pool.take(data.draw(st.sampled_from([1, 256, 300, 1000])))
            assert buffer.address not in {other.address for other in held}
            assert buffer.address not in {address for event, address in under_way if not event.done()}
            held.append(buffer)
            del buffer
        elif action == "work" and held:
            buffer = data.draw(st.sampled_from(held))
            driver.zero(buffer.address, 1, stream)
            event = events.record(stream)
            buffer.guard(event)
            under_way.append((event, buffer.address))
            del buffer, event
        elif action == "drop" and held:
            held.pop(data.draw(st.integers(0, len(held) - 1)))
        elif action == "finish" and under_way:
            data.draw(st.sampled_from(under_way))[0].wait()
    assert pool.held_bytes == sum(size_class(block.size) for block in driver._blocks.values())


def test_after_a_while_nothing_is_allocated() -> None:
    driver = FakeDriver()
    pool, events, stream = opened(driver)
    for step in count():
        buffers = [pool.take(size) for size in (100, 5000, 5000)]
        event = events.record(stream)
        for buffer in buffers:
            buffer.guard(event)
        del buffers, buffer
        event.wait()
        if step == 5:
            made = (pool.allocations, events.made)
        if step == 50:
            break
    assert (pool.allocations, events.made) == made
    assert pool.allocations == 3


def test_a_dropped_buffer_waits_for_every_stream_that_used_it() -> None:
    driver = FakeDriver()
    pool, events, stream = opened(driver)
    other = driver.new_stream()
    buffer = pool.take(1000)
    first, second = events.record(stream), events.record(other)
    buffer.guard(first)
    buffer.guard(second)
    address = buffer.address
    del buffer
    first.wait()
    assert pool.take(1000).address != address
    second.wait()
    assert address in {buffer.address for buffer in [pool.take(1000), pool.take(1000)]}


def test_out_of_memory_gives_back_what_is_free_and_tries_again() -> None:
    driver = FakeDriver()
    pool, _, _ = opened(driver)
    pool.take(1 << 20)
    driver.fail("allocate", "CUDA_ERROR_OUT_OF_MEMORY")
    pool.take(1 << 21)
    assert driver.count_of("free") == 1
    assert pool.held_bytes == 1 << 21


def test_out_of_memory_with_nothing_to_give_back_is_raised() -> None:
    driver = FakeDriver()
    pool, _, _ = opened(driver)
    held = pool.take(100)
    driver.fail("allocate", "CUDA_ERROR_OUT_OF_MEMORY")
    with pytest.raises(CudaError, match="OUT_OF_MEMORY"):
        pool.take(1 << 30)
    pool.close()
    assert driver.live_blocks == 0
    del held  # after the pool: it goes nowhere
