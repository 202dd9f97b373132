"""`POST /v1/chat/completions`: read, run (`chat/request.py`), written."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import cast

from starlette.datastructures import Headers

from service.chat.schemas import ChatCompletionRequest
from service.chat.streaming import AnswerHead, AnswerShape, Event, completion_json, event_stream
from service.errors import ApiError
from service.http.model_answer import Admitted
from service.model.job import ModelJob
from service.model.replica import AnswerStart

UNIT_HEADER = "x-experiment-unit"
UNIT = re.compile(r"[!-~]([ -~]{0,254}[!-~])?")


async def chat(asked: Admitted) -> None:
    """Raises ApiError."""
    job, shape = await _take_in(asked)
    answer_id, answer = job.request_id, asked.shared.runner.run(job, asked.context)
    with asked.shared.shadows.planned(job, asked.context) as shadow:
        del job  # its pixels
        async with aclosing(answer):
            start = await anext(answer)
            assert isinstance(start, AnswerStart)
            head = AnswerHead(
                id=answer_id,
                created=int(time.time()),
                model=shape.model,
                system_fingerprint=start.system_fingerprint,
            )
            events = cast(AsyncGenerator[Event, None], answer)  # after its start
            await _write(asked, shape, head, shadow.watching(events) if shadow else events)


async def _take_in(asked: Admitted) -> tuple[ModelJob, AnswerShape]:
    """The body and all that was made of it on the way ends here."""
    context = replace(asked.context, unit_header=unit_header_of(asked.request.headers))
    async with asked.body(ChatCompletionRequest) as request:
        shape = AnswerShape.of(request, context.settings)
        job = await asked.shared.runner.take_in(request, context)
        context.held.take(shape.kept_bytes)
        return job, shape


async def _write(asked: Admitted, shape: AnswerShape, head: AnswerHead, events: AsyncGenerator[Event, None]) -> None:
    """The answer as it comes, or when it is whole."""
    if shape.stream:
        options = {"n": shape.n, "logprobs": shape.logprobs, "include_usage": shape.include_usage}
        await asked.reply.stream(event_stream(head, events, **options))
    else:
        await asked.reply.whole(await completion_json(head, events, n=shape.n, logprobs=shape.logprobs))


def unit_header_of(headers: Headers) -> str | None:
    """Raises ApiError for more than one, and for what no identifier needs."""
    given = headers.getlist(UNIT_HEADER)
    if len(given) > 1 or not all(UNIT.fullmatch(one) for one in given):
        raise ApiError(
            "invalid_header",
            f"{UNIT_HEADER}: send one of at most 256 printable ASCII characters, or none",
            param=UNIT_HEADER,
        )
    return given[0] if given else None
