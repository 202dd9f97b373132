"""Schemas are tried where they harm nobody: good ones pass, others are named, endless ones end."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import xgrammar

from steering.engines import grammar_trial
from steering.engines.base import ResponseFormat
from steering.engines.grammar_trial import SCHEMA_FIELD, GrammarTrials, spell
from steering.errors import EngineUnavailable, InvalidSteering
from tests.tiny_families import qwen_tokenizer
from tests.tiny_models import byte_tokenizer, sentencepiece_like_tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "friends": {"type": "array", "items": {"$ref": "#"}},
    },
    "required": ["name", "age", "friends"],
    "additionalProperties": False,
}
ENDLESS = {"type": "string", "pattern": "^((a{0,30}){0,30}){0,30}$"}
"""A hundred bytes that keep the compiler busy for minutes."""


def schema(content: Any) -> ResponseFormat:
    return ResponseFormat(json_schema=json.dumps(content))


@pytest.fixture
def trials() -> Iterator[GrammarTrials]:
    trials = GrammarTrials(byte_tokenizer(), 261, frozenset([257]))
    yield trials
    trials.close()


@pytest.mark.parametrize("wanted", [None, ResponseFormat(), schema(PERSON), schema({}), schema({"enum": ["é", 1]})])
async def test_what_can_be_followed_passes(trials: GrammarTrials, wanted: ResponseFormat | None) -> None:
    await trials.check(wanted)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"type": "integer", "multipleOf": 7}, "'multipleOf'"),
        ({"type": "string", "pattern": "(?<=a)b"}, "not supported"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "cannot accept any value"),
        ({"$ref": "#"}, "no value can follow it"),
    ],
)
async def test_what_cannot_be_followed_is_refused_with_the_reason(
    trials: GrammarTrials, content: dict, says: str
) -> None:
    with pytest.raises(InvalidSteering, match=says) as caught:
        await trials.check(schema(content))
    assert caught.value.field == SCHEMA_FIELD
    assert "/project" not in caught.value.message


@pytest.mark.slow
async def test_an_endless_one_ends_and_others_go_on_meanwhile(
    trials: GrammarTrials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_trial, "CPU_S", 1.0)
    longest, stopped = 0.0, asyncio.Event()

    async def tick() -> None:
        nonlocal longest
        while not stopped.is_set():
            before = time.monotonic()
            await asyncio.sleep(0.01)
            longest = max(longest, time.monotonic() - before)

    ticking = asyncio.create_task(tick())
    with pytest.raises(InvalidSteering, match="too large or too intricate; ask for less") as caught:
        await trials.check(schema(ENDLESS))
    stopped.set()
    await ticking
    assert caught.value.field == SCHEMA_FIELD
    assert longest < 0.5


async def test_a_machine_that_is_too_busy_is_not_the_schema_s_fault(
    trials: GrammarTrials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_trial, "CLOCK_S", 0.01)
    with pytest.raises(EngineUnavailable, match="try again later"):
        await trials.check(schema(PERSON))


async def test_a_known_schema_is_not_tried_again(trials: GrammarTrials, monkeypatch: pytest.MonkeyPatch) -> None:
    await trials.check(schema(PERSON))
    monkeypatch.setattr(grammar_trial, "WORKER_SCRIPT", "/nowhere")
    await trials.check(schema(PERSON))


@pytest.mark.parametrize("made", [byte_tokenizer, sentencepiece_like_tokenizer, qwen_tokenizer])
def test_tokens_are_spelled_as_the_library_reads_them(made) -> None:
    """All but those that never are text, such as an image's, which it would take for their names."""
    tokenizer = made()
    size = len(tokenizer) + 3
    theirs = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=size).decoded_vocab
    ours = spell(tokenizer, size)
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert special
    assert [ours[index] for index in special] == [b""] * len(special)
    assert [(index, ours[index], theirs[index]) for index in range(size)
            if index not in special and ours[index] != theirs[index]] == []  # fmt: skip
