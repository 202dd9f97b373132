"""Chat requests sent to a running service at times that do not depend on its answers, and what became of each.

Every request asks for the caption of a scene of its own, greedily, as a stream. The scene's answer when asked alone
says what is right; another answer is right too where it leaves the first at a token that was as good as tied. The
client speaks HTTP/1.1 over plain sockets, a connection each, so that it takes little of the machine that it measures.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from training.evaluation.miniature_benchmark import miniature_benchmark

HOST = "127.0.0.1"
TIE = 1e-3
"""Difference of two logprobs below which another composition of the batch may turn a choice."""
MAX_OUTSTANDING = 1500
"""Requests of ours that may be open; one more is counted as not sent, and the run is worth nothing."""
CLIENT_TIMEOUT_S = 120.0
LINE_BYTES = 2**22
LAST_CHUNK = b"0\r\n"
"""Of a body that ends as HTTP/1.1 demands; no line of an event is like it."""


@dataclass(frozen=True, kw_only=True)
class Solo:
    """A scene's answer when nobody else asks."""

    text: str
    tokens: tuple[str, ...]
    margins: tuple[float, ...]
    """By token: how far the second best was behind, in logprobs."""


@dataclass(kw_only=True)
class Outcome:
    """What became of one request."""

    item: int
    sent: float
    """When it was due to leave, as time.monotonic() counts; durations are from here."""
    late_s: float = 0.0
    """So much later this client got round to it."""
    status: int | None = None
    ending: str = "cut"
    """'complete', the code of an error, 'cut' (the connection ended within an answer), 'unfinished' (a stream that
    ended properly as HTTP without [DONE] or an error: some clients take it for complete), 'left', 'client timeout' or
    'no connection'."""
    first_token_s: float | None = None
    whole_s: float = 0.0
    text: str = ""
    completion_id: str | None = None
    fingerprint: str | None = None
    """The answer's `system_fingerprint`."""


@dataclass
class Asked:
    """Scenes, as bodies of requests, and their answers alone."""

    bodies: list[bytes]
    solos: list[Solo] = field(default_factory=list)

    def verdict(self, outcome: Outcome) -> str:
        """'right', 'tie' (left the solo answer where two tokens were as good as tied) or 'wrong'."""
        solo = self.solos[outcome.item]
        if outcome.text == solo.text:
            return "right"
        differs = next(
            (
                place
                for place, (ours, theirs) in enumerate(zip(outcome.text, solo.text, strict=False))
                if ours != theirs
            ),
            min(len(outcome.text), len(solo.text)),
        )
        end = 0
        for token, margin in zip(solo.tokens, solo.margins, strict=True):
            end += len(token)
            if end > differs:
                return "tie" if margin < TIE else "wrong"
        return "wrong"


def scenes(model: str, items: int, max_tokens: int) -> Asked:
    """`items` scenes of the miniature world with an absent partner."""
    bodies = []
    benchmark = miniature_benchmark(captions=items, questions=0, seed=0, scene_range="dev")
    for number, scene in enumerate(benchmark.scenes):
        buffer = io.BytesIO()
        scene.image.save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": benchmark.caption_prompt}]
        body = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "seed": number,
        }
        bodies.append(json.dumps(body).encode())
    return Asked(bodies)


async def ask_alone(port: int, asked: Asked) -> None:
    """Fill in the solo answers, one after the other."""
    for body in asked.bodies:
        wanted = {**json.loads(body), "logprobs": True, "top_logprobs": 2}
        answer = await _whole(port, json.dumps(wanted).encode())
        choice = answer["choices"][0]
        tokens = choice["logprobs"]["content"]
        margins = tuple(one["top_logprobs"][0]["logprob"] - one["top_logprobs"][1]["logprob"] for one in tokens)
        asked.solos.append(
            Solo(text=choice["message"]["content"], tokens=tuple(one["token"] for one in tokens), margins=margins)
        )


async def _open(port: int, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection(HOST, port, limit=LINE_BYTES)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {HOST}:{port}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    writer.write(head.encode() + body)
    return reader, writer


async def _whole(port: int, body: bytes) -> dict[str, Any]:
    """The JSON of an answer that is not streamed."""
    reader, writer = await _open(port, body)
    text = await reader.read()
    writer.close()
    return json.loads(text[text.index(b"\n{") + 1 : text.rindex(b"}") + 1])


async def ask(
    port: int, asked: Asked, item: int, *, due: float | None = None, leave_after_s: float | None = None
) -> Outcome:
    """One streamed request, which was `due` to leave then (or now).

    With `leave_after_s` the client hangs up so many seconds after the first token.
    """
    now = time.monotonic()
    outcome = Outcome(item=item, sent=now if due is None else due, late_s=0.0 if due is None else now - due)
    body = asked.bodies[item][:-1] + b', "stream": true}'
    try:
        async with asyncio.timeout(CLIENT_TIMEOUT_S):
            reader, writer = await _open(port, body)
            try:
                await _read(reader, outcome, leave_after_s)
            finally:
                writer.close()
    except ConnectionRefusedError:
        outcome.ending = "no connection"
    except (OSError, TimeoutError, IndexError, ValueError) as error:  # the latter two: cut within a line
        outcome.ending = "client timeout" if isinstance(error, TimeoutError) else "cut"
    outcome.whole_s = time.monotonic() - outcome.sent
    return outcome


async def _read(reader: asyncio.StreamReader, outcome: Outcome, leave_after_s: float | None) -> None:
    outcome.status = int((await reader.readline()).split()[1])
    while line := await reader.readline():
        if line.startswith(b"{"):  # an error, not a stream
            outcome.ending = json.loads(line.rstrip(b"\r\n0"))["error"]["code"]
        elif line == b"data: [DONE]\n":
            outcome.ending = "complete"
        elif line.startswith(b"data: "):
            _take(json.loads(line[6:]), outcome)
            if leave_after_s is not None and outcome.first_token_s is not None:
                await asyncio.sleep(leave_after_s)
                outcome.ending = "left"
                return
        elif line == LAST_CHUNK and outcome.ending == "cut":
            outcome.ending = "unfinished"


def _take(chunk: dict[str, Any], outcome: Outcome) -> None:
    if "error" in chunk:
        outcome.ending = chunk["error"]["code"]
        return
    outcome.completion_id = chunk["id"]
    outcome.fingerprint = chunk.get("system_fingerprint") or outcome.fingerprint
    content = chunk["choices"][0]["delta"].get("content") if chunk["choices"] else None
    if content:
        if outcome.first_token_s is None:
            outcome.first_token_s = time.monotonic() - outcome.sent
        outcome.text += content


async def closed_loop(port: int, asked: Asked, *, clients: int, seconds: float) -> float:
    """Completions a second of so many clients that each ask again as soon as they are answered: the capacity."""
    numbers, done = count(), 0
    ends = time.monotonic() + seconds

    async def client() -> None:
        nonlocal done
        while time.monotonic() < ends:
            outcome = await ask(port, asked, next(numbers) % len(asked.bodies))
            done += outcome.ending == "complete" and time.monotonic() < ends

    await asyncio.gather(*(client() for _ in range(clients)))
    return done / seconds


async def open_loop(port: int, asked: Asked, *, rate: float, seconds: float, seed: int) -> tuple[list[Outcome], int]:
    """Requests at random times, `rate` a second on average, and those that were not sent for want of room here."""
    dice, tasks, unsent = random.Random(seed), [], 0
    began = time.monotonic()
    due = dice.expovariate(rate)
    for number in count():
        if due > seconds:
            break
        await asyncio.sleep(max(0.0, began + due - time.monotonic()))
        if sum(not task.done() for task in tasks) < MAX_OUTSTANDING:
            tasks.append(asyncio.create_task(ask(port, asked, number % len(asked.bodies), due=began + due)))
        else:
            unsent += 1
        due += dice.expovariate(rate)
    return list(await asyncio.gather(*tasks)), unsent


def endings(outcomes: Sequence[Outcome], asked: Asked) -> dict[str, int]:
    """How many ended how; complete ones by whether they were right. Duplicated completion ids are counted, too.

    A stream that some client would take for complete counts as wrong.
    """
    counted = Counter(_ending(one, asked) for one in outcomes)
    ids = [one.completion_id for one in outcomes if one.completion_id]
    counted["duplicated"] = len(ids) - len(set(ids))
    return dict(counted)


def _ending(outcome: Outcome, asked: Asked) -> str:
    if outcome.ending == "complete":
        return asked.verdict(outcome)
    return "wrong" if outcome.ending == "unfinished" else f"{outcome.ending} ({outcome.status})"


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """Seconds below which 50, 90 and 99 percent lie."""
    if not values:
        return None
    ordered = sorted(values)
    return {f"p{p}": round(ordered[min(len(ordered) - 1, len(ordered) * p // 100)], 3) for p in (50, 90, 99)}
