"""Which tokens are image, which are text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steering.errors import InvalidSteering
from steering.lvlm.token_spans import expand_image_tokens, find_spans

IMAGE = 9


def test_text_begins_after_the_last_image():
    spans = find_spans([1, IMAGE, IMAGE, 2, 3, IMAGE, 4, 5], IMAGE)
    assert spans.image_positions == (1, 2, 5)
    assert spans.text_start == 6


def test_no_image_no_text_to_steer():
    assert not find_spans([1, 2, 3], IMAGE).has_image


@given(st.lists(st.integers(0, IMAGE), max_size=30), st.data())
def test_expansion_keeps_text_and_counts_every_image_token(tokens, data):
    counts = [data.draw(st.integers(1, 5)) for token in tokens if token == IMAGE]
    expanded = expand_image_tokens(tokens, IMAGE, counts)
    assert [token for token in expanded if token != IMAGE] == [token for token in tokens if token != IMAGE]
    assert expanded.count(IMAGE) == sum(counts)


def test_images_and_marks_must_agree():
    with pytest.raises(InvalidSteering, match="1 image tokens for 2 images"):
        expand_image_tokens([1, IMAGE], IMAGE, [4, 4])
