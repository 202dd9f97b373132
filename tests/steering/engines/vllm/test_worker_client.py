"""Questions to the workers come to an end, and those of one turn of the event loop are one question."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from steering.engines.vllm.worker_client import WorkerClient
from steering.errors import EngineUnavailable


class Workers:
    """In the place of vLLM: what it was asked, and what it says."""

    errored = False

    def __init__(self, *answers: Any) -> None:
        self.asked: list[tuple[str, Any]] = []
        self._answers = iter(answers)

    async def collective_rpc(self, method: str, args: tuple) -> list[Any]:
        self.asked.append((method, args))
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return [answer]


def client_of(workers: Any) -> WorkerClient:
    return WorkerClient(workers)


async def test_sequences_that_end_together_are_asked_about_once():
    workers = Workers([{"positions": 1}, None, {"positions": 3}], [{"positions": 4}])
    client = client_of(workers)
    client.forget("given up")
    told = await asyncio.gather(client.finish("b"), client.finish("c"))
    assert told == [None, {"positions": 3}]
    assert await client.finish("d") == {"positions": 4}
    of = [("given up", None), ("b", None), ("c", None)]
    assert workers.asked == [("finish_steering", (of,)), ("finish_steering", ([("d", None)],))]


@pytest.mark.parametrize("answer", [RuntimeError("boom"), [None], 3], ids=["an error", "too few", "nonsense"])
async def test_nobody_waits_for_ever_where_the_answer_is_none(answer):
    client = client_of(Workers(answer))
    with pytest.raises(EngineUnavailable):
        await asyncio.wait_for(asyncio.gather(client.finish("a"), client.finish("b")), timeout=10)


async def test_who_gives_up_leaves_the_others_their_answers():
    client = client_of(Workers([{"positions": 1}, {"positions": 2}]))
    gone, waiting = asyncio.ensure_future(client.finish("a")), asyncio.ensure_future(client.finish("b"))
    await asyncio.sleep(0)
    gone.cancel()
    assert await asyncio.wait_for(waiting, timeout=10) == {"positions": 2}
