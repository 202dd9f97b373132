"""OpenAI's objects from an engine's events, judged by the openai package's own types."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from service.chat.streaming import AnswerHead, Event, completion_json, error_event, event_stream
from service.errors import ApiError
from tests.service.examples import delta, end

HEAD = AnswerHead(id="chatcmpl-1", created=1_700_000_000, model="tiny:steered", system_fingerprint="fp_1")


async def played(*events: Event) -> AsyncIterator[Event]:
    for event in events:
        yield event


async def streamed(*events: Event, n: int = 1, logprobs: bool = False, include_usage: bool = False) -> list[dict]:
    """The chunks, each valid by the openai package, without the closing [DONE]."""
    stream = event_stream(HEAD, played(*events), n=n, logprobs=logprobs, include_usage=include_usage)
    blocks = b"".join([block async for block in stream]).decode().split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    return chunks


async def answered(*events: Event, n: int = 1, logprobs: bool = False) -> dict:
    answer = json.loads(await completion_json(HEAD, played(*events), n=n, logprobs=logprobs))
    ChatCompletion.model_validate(answer, strict=True)
    return answer


def text_of(chunks: list[dict], choice: int = 0) -> str:
    return "".join(
        part["delta"].get("content", "") for chunk in chunks for part in chunk["choices"] if part["index"] == choice
    )


async def test_a_completion() -> None:
    answer = await answered(delta(0, "a "), delta(0, "star", finish="stop"), end(3))
    assert (answer["id"], answer["model"], answer["system_fingerprint"]) == ("chatcmpl-1", "tiny:steered", "fp_1")
    assert answer["choices"][0] == {
        "index": 0,
        "message": {"role": "assistant", "content": "a star", "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert answer["usage"] == {"prompt_tokens": 20, "completion_tokens": 3, "total_tokens": 23}
    assert answer["steering"]["applied"] is True
    assert answer["steering"]["positions"] == [7]


async def test_choices_are_kept_apart() -> None:
    events = (
        delta(1, "b"), delta(0, "a"), delta(1, "d", finish="length"), delta(0, "c", finish="stop"),
        end(2, 3, positions=[1, 2], relative_shift=[0.1, 0.2]),
    )  # fmt: skip
    answer = await answered(*events, n=2)
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["ac", "bd"]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop", "length"]
    assert answer["usage"]["completion_tokens"] == 5
    assert answer["steering"]["relative_shift"] == [0.1, 0.2]


async def test_logprobs() -> None:
    answer = await answered(delta(0, "é", logprobs=True), delta(0, "", finish="stop", tokens=0), end(2), logprobs=True)
    (token,) = answer["choices"][0]["logprobs"]["content"]
    assert (token["token"], token["bytes"], token["logprob"]) == ("é", [195, 169], -0.5)
    assert token["top_logprobs"] == [{"token": "x", "bytes": [120], "logprob": -1.5}]


async def test_a_stream_begins_with_the_role_and_ends_with_the_receipt() -> None:
    chunks = await streamed(delta(0, "a "), delta(0, "star"), delta(0, "", finish="stop", tokens=0), end(3))
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "a "},
        {"content": "star"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert ["steering" in chunk for chunk in chunks] == [False, False, False, True]
    assert all("usage" not in chunk for chunk in chunks)


async def test_text_on_the_last_delta_comes_before_the_finish() -> None:
    chunks = await streamed(delta(0, "a"), delta(0, " star", finish="length"), end(2))
    assert text_of(chunks) == "a star"
    assert chunks[-1]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}


async def test_with_usage_the_receipt_is_on_the_usage_chunk() -> None:
    chunks = await streamed(delta(0, "a", finish="stop"), end(2), include_usage=True)
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {"prompt_tokens": 20, "completion_tokens": 2, "total_tokens": 22}
    assert ["steering" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


async def test_of_several_choices_the_last_to_finish_carries_the_receipt() -> None:
    events = (delta(0, "a"), delta(1, "b"), delta(1, "", finish="stop", tokens=0), delta(0, "c", finish="length"))
    chunks = await streamed(*events, end(2, 1), n=2)
    assert (text_of(chunks, 0), text_of(chunks, 1)) == ("ac", "b")
    finishes = [(chunk["choices"][0]["index"], chunk["choices"][0]["finish_reason"]) for chunk in chunks]
    assert [finish for finish in finishes if finish[1]] == [(1, "stop"), (0, "length")]
    assert ["steering" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


async def test_every_token_s_logprob_is_streamed_though_its_text_is_held_back() -> None:
    events = (
        delta(0, "", logprobs=True), delta(0, "ab", logprobs=True, tokens=2), delta(0, "", finish="stop", tokens=0)
    )  # fmt: skip
    chunks = await streamed(*events, end(3), logprobs=True)
    tokens = [
        token
        for chunk in chunks
        if chunk["choices"][0]["logprobs"]
        for token in chunk["choices"][0]["logprobs"]["content"]
    ]
    assert len(tokens) == 3
    assert text_of(chunks) == "ab"


async def test_deltas_without_text_send_nothing() -> None:
    chunks = await streamed(delta(0, "a"), delta(0, ""), delta(0, ""), delta(0, "b", finish="stop"), end(4))
    assert len(chunks) == 4


async def test_an_answer_without_any_text() -> None:
    chunks = await streamed(delta(0, "", finish="stop", tokens=0), end(1))
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, "stop"]
    answer = await answered(delta(0, "", finish="stop", tokens=0), end(1))
    assert answer["choices"][0]["message"]["content"] == ""


async def test_an_engine_that_ends_early_is_a_fault() -> None:
    with pytest.raises(AssertionError):
        await completion_json(HEAD, played(delta(0, "a")), n=1, logprobs=False)


@pytest.mark.parametrize("finish", [None, "stop"])
async def test_a_stream_that_ends_early_is_a_fault(finish) -> None:
    with pytest.raises(AssertionError, match="GenerationEnd"):
        await streamed(delta(0, "a", finish=finish))


def test_an_error_event_is_openai_s_error() -> None:
    block = error_event(ApiError("engine_unavailable", "lost"))
    assert block.startswith(b"data: {")
    assert block.endswith(b"}\n\n")
    assert json.loads(block[6:])["error"]["code"] == "engine_unavailable"
