"""Answers as models give them, and what a reader would say they say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.yes_or_no import parse_answer

YES = """Yes
 yes, there is a star.
YES!
**Yes**
Yep
Yeah, I think so.
Sure
Sure, there is one.
Correct
Correct. There is a dog.
That is correct.
Of course
Of course!
Certainly
Certainly, on the left
Definitely
True
Yes, but there is no ring.
Yes, although I am not sure
Based on the image, yes
I am not sure, but yes
I am not sure but yes.
It is hard to tell - yes
I can't tell. Probably yes."""
NO = """No.
No, there is no star, yes a ring
Nope
Nah
False
There is not any star.
There isn't a star
There isn’t a star
Not really
Not at all
Certainly not
Of course not.
That is not correct.
That is incorrect.
I don't think so
I am sure there is no dog
I'm sure there isn't
It cannot be seen
No, not that I can tell
I'm not sure, but no
I am not sure, but I don't see a dog
It is hard to tell. No.
there is not a clear dog"""
NEITHER = """Not sure
Not sure.
Not really sure
I'm not entirely certain.
Cannot tell
I can't tell
I can’t tell.
I can not say
I don't know
Unclear
It is unclear whether there is a dog or not.
I cannot tell whether it is a dog or not.
It's not possible to tell
It isn't clear.
Not necessarily
Hard to say
Not sure, there's no clear view
Maybe
I am sure
yesterday nothing
There is a dog on the right
a star
."""


@pytest.mark.parametrize("text", YES.split("\n"))
def test_yes(text: str):
    assert parse_answer(text) is True


@pytest.mark.parametrize("text", NO.split("\n"))
def test_no(text: str):
    assert parse_answer(text) is False


@pytest.mark.parametrize("text", ["", *NEITHER.split("\n")])
def test_neither(text: str):
    assert parse_answer(text) is None


@given(st.text())
def test_any_text_is_parsed(text: str):
    assert parse_answer(text) in (True, False, None)


@given(st.sampled_from(["Yes", "YES", "yeah"]), st.text(alphabet=" ,.!\n\"'", max_size=5), st.text())
def test_a_leading_yes_wins_whatever_follows(word: str, before: str, after: str):
    assert parse_answer(f"{before}{word}. {after}") is True


@given(st.text(alphabet="abcdfghijklmopqruvwxz ,.", max_size=40))
def test_without_letters_of_a_yes_or_a_no_nothing_can_be_read(text: str):
    assert parse_answer(text) is None
