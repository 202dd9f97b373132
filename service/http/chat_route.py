"""`POST /v1/chat/completions`: read, run (`chat/request.py`), written."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import cast

from service.chat.schemas import ChatCompletionRequest
from service.chat.streaming import AnswerHead, AnswerShape, Event, completion_json, event_stream
from service.http.middleware import only
from service.http.model_answer import Admitted
from service.model.job import ModelJob
from service.model.replica import AnswerStart

UNIT_HEADER = "x-experiment-unit"
UNIT = re.compile(r"[!-~]([ -~]{0,254}[!-~])?")
UNITS = (UNIT_HEADER, UNIT, "256 printable ASCII characters")


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
    context = replace(asked.context, unit_header=only(asked.request.headers, *UNITS))
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
