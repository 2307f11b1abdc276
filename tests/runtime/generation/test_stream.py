"""Pieces reach a reader in any thread or coroutine, all of them, in order; who leaves cancels."""

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest
from stageline.models.errors import EngineError
from stageline.runtime.generation.request import Choice, Completion
from stageline.runtime.generation.stream import Generation, Piece

SECONDS = 5  # for what must happen; nothing takes that long


def whole(text: str) -> Completion:
    return Completion((Choice(text, (), "stop"),), 1, 0, 0.0, 0.0, 0.0)


def piece_of(text: str) -> Piece:
    return 0, text, (), (), None


def write(generation: Generation, texts: Sequence[str], pause_s: float = 0.0) -> None:
    """What the driver does, to the end or until it is cancelled."""
    for text in texts:
        if generation.future.cancelled():
            return
        generation.push([piece_of(text)])
        time.sleep(pause_s)
    if generation.future.set_running_or_notify_cancel():
        generation.future.set_result(whole("".join(texts)))


@pytest.fixture
def writer() -> Iterator[Callable[..., Generation]]:
    """Gives a generation that a thread of its own writes."""
    with ThreadPoolExecutor() as threads:

        def begin(texts: Sequence[str], pause_s: float = 0.0) -> Generation:
            generation = Generation()
            threads.submit(write, generation, texts, pause_s)
            return generation

        yield begin


async def collected(generation: Generation, pause_s: float = 0.0) -> list[str]:
    texts = []
    async for piece in generation:
        texts.append(piece.text)
        await asyncio.sleep(pause_s)
    return texts


TEXTS = [str(number) for number in range(50)]


@pytest.mark.parametrize(("writing_s", "reading_s"), [(0, 0), (0.002, 0), (0, 0.002)])
def test_a_thread_reads_all_pieces_in_order(
    writer: Callable[..., Generation], writing_s: float, reading_s: float
) -> None:
    generation = writer(TEXTS, writing_s)
    texts = []
    for piece in generation:
        texts.append(str(piece))
        time.sleep(reading_s)
    assert texts == TEXTS
    assert generation.result(0).text == "".join(TEXTS)
    assert not generation.cancel()


@pytest.mark.parametrize(("writing_s", "reading_s"), [(0, 0), (0.002, 0), (0, 0.002)])
def test_a_coroutine_reads_all_pieces_in_order(
    writer: Callable[..., Generation], writing_s: float, reading_s: float
) -> None:
    async def read() -> None:
        generation = writer(TEXTS, writing_s)
        assert await collected(generation, reading_s) == TEXTS
        assert (await generation).text == "".join(TEXTS)

    asyncio.run(read())


def test_the_loop_is_free_while_a_coroutine_waits_for_a_piece() -> None:
    async def read() -> int:
        generation = Generation()
        reading = asyncio.create_task(collected(generation))
        ticks = 0
        while ticks < 20:
            ticks += 1
            await asyncio.sleep(0.001)
        threading.Thread(target=write, args=(generation, ["x"])).start()
        assert await asyncio.wait_for(reading, SECONDS) == ["x"]
        return ticks

    assert asyncio.run(read()) == 20


def test_many_coroutines_read_many_generations_at_once(writer: Callable[..., Generation]) -> None:
    async def read() -> None:
        generations = [writer(TEXTS, 0.0005) for _ in range(40)]
        assert await asyncio.gather(*map(collected, generations)) == [TEXTS] * 40

    asyncio.run(read())


def test_a_generation_that_is_done_can_still_be_read() -> None:
    generation = Generation()
    write(generation, TEXTS)
    assert [piece.text for piece in generation] == TEXTS
    other = Generation()
    write(other, TEXTS)
    assert asyncio.run(collected(other)) == TEXTS


def test_leaving_the_loop_cancels() -> None:
    generation = Generation()
    generation.push([piece_of("a"), piece_of("b")])
    for piece in generation:
        assert piece.text == "a"
        break
    gc.collect()
    assert generation.future.cancelled()


def test_leaving_the_loop_of_a_coroutine_cancels() -> None:
    async def read(generation: Generation) -> None:
        async for piece in generation:
            assert piece.text == "a"
            break
        await asyncio.sleep(0.01)
        assert generation.future.cancelled()

    generation = Generation()
    generation.push([piece_of("a"), piece_of("b")])
    asyncio.run(read(generation))


def test_an_exception_in_the_loop_cancels() -> None:
    generation = Generation()
    generation.push([piece_of("a")])

    def read() -> None:
        for _ in generation:
            raise KeyError("a reader's own")

    with pytest.raises(KeyError, match="a reader's own"):
        read()
    gc.collect()
    assert generation.future.cancelled()


@pytest.mark.parametrize("reads", ["pieces", "whole"])
def test_cancelling_the_task_cancels_the_request(reads: str) -> None:
    async def scenario() -> None:
        generation = Generation()
        reading = asyncio.ensure_future(collected(generation) if reads == "pieces" else generation.aresult())
        await asyncio.sleep(0.01)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert generation.future.cancelled()
        generation.push([piece_of("late")])  # nobody is there any more

    asyncio.run(scenario())


def test_cancelling_from_another_thread_ends_the_loop_after_what_has_come() -> None:
    generation = Generation()
    generation.push([piece_of("a")])
    threading.Timer(0.05, generation.cancel).start()
    assert [piece.text for piece in generation] == ["a"]
    with pytest.raises(CancelledError):
        generation.result(0)


def test_cancelling_from_another_thread_ends_the_loop_of_a_coroutine() -> None:
    async def read() -> list[str]:
        generation = Generation()
        generation.push([piece_of("a")])
        threading.Timer(0.05, generation.cancel).start()
        return await asyncio.wait_for(collected(generation), SECONDS)

    assert asyncio.run(read()) == ["a"]


def test_an_error_is_raised_after_the_pieces_before_it() -> None:
    def failed() -> Generation:
        generation = Generation()
        generation.push([piece_of("a")])
        generation.future.set_exception(EngineError("stage 1 failed"))
        return generation

    texts: list[str] = []
    with pytest.raises(EngineError, match="stage 1 failed"):
        texts.extend(piece.text for piece in failed())
    assert texts == ["a"]
    with pytest.raises(EngineError, match="stage 1 failed"):
        asyncio.run(collected(failed()))
    with pytest.raises(EngineError, match="stage 1 failed"):
        failed().result(0)

    async def awaited() -> Completion:
        return await failed()

    with pytest.raises(EngineError, match="stage 1 failed"):
        asyncio.run(awaited())


def test_an_error_wakes_a_reader_who_waits() -> None:
    generation = Generation()
    threading.Timer(0.05, generation.future.set_exception, [EngineError("late")]).start()
    with pytest.raises(EngineError, match="late"):
        next(iter(generation))


def test_a_closed_loop_cancels_the_request_and_leaves_the_writer_alone() -> None:
    generation = Generation()
    loop = asyncio.new_event_loop()
    reading = loop.create_task(collected(generation))
    loop.run_until_complete(asyncio.sleep(0.01))  # it waits for a piece now
    loop.close()
    generation.push([piece_of("a")])
    assert generation.future.cancelled()
    generation.push([piece_of("b")])
    del reading


def test_result_waits_no_longer_than_asked() -> None:
    with pytest.raises(TimeoutError):
        Generation().result(0.01)
