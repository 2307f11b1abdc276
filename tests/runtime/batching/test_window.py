"""A window lets in N at a time, each once, in the order of arrival."""

from concurrent.futures import ThreadPoolExecutor

from hypothesis import given
from hypothesis import strategies as st
from stageline.runtime.batching.window import Window


@given(most=st.integers(1, 4), moves=st.lists(st.booleans(), max_size=60))
def test_as_many_as_may_are_inside_and_the_others_come_in_order(most: int, moves: list[bool]) -> None:
    """True: one more comes; False: one of those inside leaves, if there is one."""
    admitted: list[int] = []
    window, come, left = Window(most, admitted.append), 0, 0
    for enters in moves:
        if enters:
            window.enter(come)
            come += 1
        elif left < len(admitted):
            window.leave()
            left += 1
        assert admitted == list(range(len(admitted)))
        assert len(admitted) - left == min(most, come - left)


def test_threads_lose_nobody() -> None:
    admitted: list[int] = []
    window = Window(3, admitted.append)

    def through(number: int) -> None:
        window.enter(number)
        window.leave()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(through, range(2000)))
    assert sorted(admitted) == list(range(2000))
