"""Text as it comes: whole characters, stop strings, exact bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steering.engines.text_stream import REPLACEMENT, TextStream, TokenBytes
from tests.tiny_models import byte_tokenizer

TOKENIZER = byte_tokenizer()


def encode(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def stream(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    flow = TextStream(tokenizer=TOKENIZER, stop=stop)
    parts = []
    for token in encode(text):
        parts.append(flow.push(token))
        if flow.stopped:
            return parts, flow
    return [*parts, flow.finish()], flow


plain_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=[REPLACEMENT]), max_size=30)


@given(plain_text)
def test_parts_join_to_the_text_and_no_character_is_split(text):
    parts, _ = stream(text)
    assert "".join(parts) == text
    assert not any(REPLACEMENT in part for part in parts)


@given(plain_text, st.lists(st.text("abé🙂", min_size=1, max_size=3), min_size=1, max_size=3))
def test_text_ends_before_the_first_stop_string(text, stops):
    parts, flow = stream(text, tuple(stops))
    found = [text.find(stop) for stop in stops if stop in text]
    assert flow.stopped == bool(found)
    joined = "".join(parts)
    assert text.startswith(joined)
    if not found:
        assert joined == text
    else:
        assert not any(stop in joined for stop in stops)


def test_what_could_begin_a_stop_string_is_held_back():
    flow = TextStream(tokenizer=TOKENIZER, stop=("STOP",))
    assert [flow.push(token) for token in encode("aSTx")] == ["a", "", "", "STx"]


def test_an_unfinished_character_at_the_end_is_replaced():
    flow = TextStream(tokenizer=TOKENIZER)
    tokens = encode("é")
    assert flow.push(tokens[0]) == ""
    assert flow.finish() == REPLACEMENT


@given(plain_text)
def test_token_bytes_are_the_text_s_bytes(text):
    token_bytes = TokenBytes(TOKENIZER)
    assert b"".join(token_bytes(token) for token in encode(text)) == text.encode()


@pytest.mark.parametrize(
    ("token", "expected"), [("▁hello", b" hello"), ("<0xE2>", b"\xe2"), ("a", b"a"), ("</s>", b"</s>")]
)
def test_sentencepiece_tokens_too(token, expected):
    class Vocabulary:
        all_special_tokens = ("</s>",)

        def get_vocab(self):
            return {"▁hello": 0, "<0xE2>": 1, "a": 2, "</s>": 3}

        def convert_ids_to_tokens(self, token_id):
            return next(name for name, index in self.get_vocab().items() if index == token_id)

    vocabulary = Vocabulary()
    assert TokenBytes(vocabulary)(vocabulary.get_vocab()[token]) == expected
