"""Where two answers differ: against a slow reading of the definition, and tokens that end inside a character."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.chat.differences import MAX_COMPARED_TOKENS, differences, spell


def longest(one: list[int], other: list[int]) -> int:
    """Length of a longest common subsequence, by its recursion."""
    if not one or not other:
        return 0
    if one[0] == other[0]:
        return 1 + longest(one[1:], other[1:])
    return max(longest(one[1:], other), longest(one, other[1:]))


TOKENS = st.lists(st.integers(0, 3), max_size=7)


@given(TOKENS, TOKENS)
def test_what_does_not_differ_stands_in_the_first_in_order(first: list[int], other: list[int]) -> None:
    marks = differences(first, other)
    assert len(marks) == len(other)
    rest = iter(first)
    assert all(token in rest for token, differs in zip(other, marks, strict=True) if not differs)
    assert marks.count(False) == longest(first, other)
    assert (not any(marks) and len(first) == len(other)) == (first == other)


def test_a_word_put_in_is_the_only_one() -> None:
    assert differences([1, 2, 3, 4], [1, 2, 9, 3, 4]) == [False, False, True, False, False]
    assert differences([1, 2, 3, 4], [1, 4]) == [False, False]
    assert differences([], [1]) == [True]
    assert differences([1], []) == []


def test_long_answers_are_compared_as_far_as_time_allows() -> None:
    first, other = [1, *range(100, 3100), 2], [1, 7, *range(100, 3100), 2]
    assert differences(first, other)[:3] == [False, True, False]
    mixed, unequal = [5] * 5000, [6, 5] * 2500
    marks = differences(mixed, unequal)
    assert marks[-1] is False
    assert sum(marks) >= len(unequal) - MAX_COMPARED_TOKENS - 1


@given(st.text(max_size=20), st.data())
def test_tokens_spell_whole_characters(text: str, data: st.DataObject) -> None:
    raw = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=6)))
    tokens = [raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    length = data.draw(st.integers(0, len(text)))
    spelled = spell(tokens, length)
    assert len(spelled) == len(tokens)
    assert "".join(spelled) == text[:length]
