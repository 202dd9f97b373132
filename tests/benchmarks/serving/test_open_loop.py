"""The load generator against servers that misbehave: what counts as what, and from when. Real sockets."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.benchmarks.serving.load import describe_phase, failures
from tests.benchmarks.serving.open_loop import Asked, Outcome, Solo, ask, endings, open_loop

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
DELTA = b'data: {"id": "c", "choices": [{"delta": {"content": "a"}}]}\n\n'
LAST = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def asked() -> Asked:
    return Asked([b"{}"], [Solo(text="a", tokens=("a",), margins=(1.0,))])


async def outcome_of(answer: bytes) -> Outcome:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        return await ask(server.sockets[0].getsockname()[1], asked(), 0)


@pytest.mark.parametrize(
    ("answer", "ending", "counted"),
    [
        (HEAD + chunk(DELTA) + chunk(b"data: [DONE]\n\n") + LAST, "complete", "right"),
        (HEAD + chunk(DELTA) + LAST, "unfinished", "wrong"),
        (HEAD + chunk(DELTA), "cut", "cut (200)"),
        (HEAD + chunk(DELTA)[:-20], "cut", "cut (200)"),
        (HEAD + chunk(b'data: {"error": {"code": "e"}}\n\n') + LAST, "e", "e (200)"),
        (b"", "cut", "cut (None)"),
        (b"HTTP/1.1\r\n", "cut", "cut (None)"),
    ],
)
async def test_what_an_answer_counts_as(answer: bytes, ending: str, counted: str) -> None:
    outcome = await outcome_of(answer)
    assert outcome.ending == ending
    assert endings([outcome], asked()) == {counted: 1, "duplicated": 0}


async def test_the_client_s_own_lateness_is_part_of_the_time() -> None:
    """The loop is held up while requests fall due."""
    pause_s = 0.5
    asyncio.get_running_loop().call_later(0.01, time.sleep, pause_s)
    outcomes, _unsent = await open_loop(1, asked(), rate=200, seconds=0.1, seed=0)
    assert outcomes
    assert max(one.late_s for one in outcomes) > pause_s / 2
    assert all(one.whole_s >= one.late_s for one in outcomes)


def outcome(number: int, ending: str, **changes) -> Outcome:
    return Outcome(item=0, sent=0.0, ending=ending, completion_id=str(number), **changes)


def test_only_what_was_not_begun_counts_as_refused() -> None:
    found = [
        outcome(1, "complete", text="a", status=200),
        outcome(2, "complete", text="b", status=200),
        outcome(3, "overloaded", status=503),
        outcome(4, "rate_limit_exceeded", status=429),
        outcome(5, "shutting_down", status=503),
        outcome(6, "request_timeout", status=503),
        outcome(7, "cut"),
        outcome(7, "unfinished", status=200),
    ]
    row = describe_phase("half", 1.0, found, 0, asked())
    assert {name: row[name] for name in ("answered", "refused", "lost", "wrong", "duplicated")} == {
        "answered": 1, "refused": 2, "lost": 3, "wrong": 2, "duplicated": 1,
    }  # fmt: skip
    assert failures([row]) == ["half: 3 lost", "half: 2 wrong", "half: 1 duplicated"]


def test_a_run_that_was_not_what_it_says_is_worth_nothing() -> None:
    right = outcome(1, "complete", text="a", status=200)
    assert failures([describe_phase("half", 1.0, [right], 0, asked())]) == []
    assert failures([describe_phase("half", 1.0, [right], 2, asked())]) == ["half: 2 not_sent"]
    right.late_s = 2.0
    assert failures([describe_phase("half", 1.0, [right], 0, asked())]) == ["half: this client was 2.0 s late"]
