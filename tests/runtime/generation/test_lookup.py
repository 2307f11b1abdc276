"""Drafts from a row's own text: what they are, and how sure they are."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stageline.runtime.generation.lookup import SIZE, Lookup


def after(tokens: list[int]) -> Lookup:
    lookup = Lookup(tokens)
    lookup.read()
    return lookup


def chances(lookup: Lookup, count: int) -> list[float]:
    return list(itertools.islice(lookup.chances(), count))


def test_it_drafts_what_followed_the_last_time() -> None:
    tokens = [1, 2, 3, 4, 5, 6, 7, 1, 2, 3]
    assert after(tokens).draft(3) == [4, 5, 6]
    tokens = [1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3]
    assert after(tokens).draft(2) == [5, 1]


def test_a_draft_longer_than_what_is_there_repeats_itself() -> None:
    assert after([1, 2, 3, 1, 2, 3]).draft(8) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert after([7] * 4).draft(3) == [7, 7, 7]


@pytest.mark.parametrize("tokens", [[], [1], [1, 2, 3], [1, 2, 3, 4, 5, 6], [1, 2, 9, 1, 2]])
def test_there_is_none_where_nothing_has_come_before(tokens: list[int]) -> None:
    assert chances(after(tokens), 3) == []


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(1, 20), st.integers(0, 60))
def test_it_is_what_a_search_finds_and_reading_in_parts_changes_nothing(tokens: list[int], count: int, at: int) -> None:
    whole = after(list(tokens))
    parts = tokens[:at]
    lookup = after(parts)
    parts += tokens[at:]
    lookup.read()
    assert chances(lookup, 5) == chances(whole, 5)
    if chances(whole, 1):
        draft = whole.draft(count)
        assert lookup.draft(count) == draft
        text = tokens + draft
        starts = [s for s in range(len(tokens) - SIZE) if tokens[s : s + SIZE] == tokens[-SIZE:]]
        assert any(text[s + SIZE : s + SIZE + count] == draft for s in starts)
    else:
        assert tokens[-SIZE:] not in [tokens[s : s + SIZE] for s in range(len(tokens) - SIZE)]


def test_chances_fall_with_every_token_and_follow_what_was_right() -> None:
    found = chances(after([*range(30), *range(10)]), 20)
    assert all(a > b > 0 for a, b in itertools.pairwise(found))
    often, seldom = [*range(5)] * 20, []
    for number in range(20):  # the three tokens come again, with another one after them each time
        seldom += [1, 2, 3, 100 + number]
    assert chances(after([*often, 0, 1, 2]), 1)[0] > 0.9
    assert chances(after([*seldom, 1, 2, 3]), 1)[0] < 0.1
