"""One conversation at several settings of steering: read once, its pictures decoded once, answered side by side. Knows
no HTTP.

Every setting is a job of its own, with the same pixels and all at once; if one fails, all end. How the answers differ
is told by token, against the first one's.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

from pydantic import Field

from service.chat.differences import differences, spell
from service.chat.request import ChatRunner, RequestContext, image_parts
from service.chat.schemas import ChatCompletionRequest
from service.chat.streaming import EXPLAINED_TOKEN_BYTES, LOGPROB_BYTES
from service.chat.strict_model import Neutral
from service.errors import ApiError
from service.metrics.request_record import RequestRecord
from service.model.client import Answer
from service.model.job import ModelJob
from service.model.replica import AnswerStart
from service.settings import Settings
from steering.engines.base import FinishReason, GenerationEnd
from steering.request import SteeringRequest

MAX_SETTINGS = 8
INSTEAD = "say it in settings"


class CompareRequest(ChatCompletionRequest):
    """A chat request with several settings instead of one; each gets one whole answer."""

    settings: list[SteeringRequest] = Field(min_length=2, max_length=MAX_SETTINGS)
    """What `steering` is in a chat request, once per answer; the first is what the others are compared with."""
    steering: Annotated[Any, Neutral(instead=INSTEAD)] = None
    stream: Annotated[Any, Neutral(False)] = None
    stream_options: Annotated[Any, Neutral()] = None
    n: Annotated[Any, Neutral(1)] = None
    logprobs: Annotated[Any, Neutral(False)] = None
    top_logprobs: Annotated[Any, Neutral()] = None


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The answer at one setting."""

    id: str
    system_fingerprint: str
    token_ids: tuple[int, ...]
    texts: tuple[str, ...]
    """By token; one after the other they are the answer."""
    finish_reason: FinishReason
    end: GenerationEnd

    @property
    def text(self) -> str:
        return "".join(self.texts)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was asked, checked."""

    id: str
    model: str
    """The model id as the client wrote it."""
    jobs: tuple[ModelJob, ...]
    """By setting; all with the same pixels."""


async def take_in_comparison(
    runner: ChatRunner, asked: CompareRequest, context: RequestContext, *, take_places: Callable[[int], None]
) -> Comparison:
    """Every setting is checked before the first picture is decoded. Raises ApiError; what is wrong with one setting is
    said of `settings[i]`. It takes part in no experiment: who sees several answers is in no arm. `take_places` is told
    how many answers there are beside the first."""
    jobs = await _plan(runner, asked, context)
    take_places(len(jobs) - 1)
    context.held.take(sum(_kept_bytes(job, context.settings) for job in jobs))
    images = await runner.decode(image_parts(asked), context, copies=len(jobs))
    comparison_id = f"compare-{uuid.uuid4().hex}"
    context.record.completion_id, context.record.stream = comparison_id, False
    return Comparison(id=comparison_id, model=asked.model, jobs=tuple(replace(job, images=images) for job in jobs))


def _kept_bytes(job: ModelJob, settings: Settings) -> int:
    """Of its answer, until all are whole."""
    explained = EXPLAINED_TOKEN_BYTES if job.steering.settings.explain == "tokens" else 0
    return (LOGPROB_BYTES + explained) * (job.max_tokens or settings.default_max_tokens)


async def _plan(runner: ChatRunner, asked: CompareRequest, context: RequestContext) -> list[ModelJob]:
    """By setting, without pixels. Tokens' texts come with their logprobs."""
    settings = context.settings
    if len(asked.settings) > settings.max_choices:
        message = f"settings: at most {settings.max_choices} are allowed"
        raise ApiError("invalid_value", message, param="settings")
    outside = replace(context, settings=settings.model_copy(update={"experiment": None}))
    jobs = []
    for index, steering in enumerate(asked.settings):
        with _naming(index):
            job = await runner.plan(asked.model_copy(update={"steering": steering}), outside)
        jobs.append(replace(job, sampling=replace(job.sampling, top_logprobs=0)))
    return jobs


@contextmanager
def _naming(index: int) -> Iterator[None]:
    """What is said of `steering` is said of `settings[index]`."""
    try:
        yield
    except ApiError as error:
        param = error.param or ""
        if param.split(".")[0] != "steering":
            raise
        place = f"settings[{index}]"
        message = error.message.replace("steering", place, 1) if error.message.startswith("steering") else error.message
        renamed = place + param.removeprefix("steering")
        raise ApiError(error.code, message, param=renamed, retry_after_s=error.retry_after_s) from None


async def run_comparison(runner: ChatRunner, comparison: Comparison, context: RequestContext) -> bytes:
    """The whole answer as JSON. Raises ApiError; whatever ends one setting ends all."""
    records = [replace(context.record, artifact=job.artifact) for job in comparison.jobs]
    each = [replace(context, record=record, meter=context.meter.of(record)) for record in records]
    try:
        async with asyncio.TaskGroup() as group:
            running = [
                group.create_task(_answer(runner, job, index, own))
                for index, (job, own) in enumerate(zip(comparison.jobs, each, strict=True))
            ]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    answers = [task.result() for task in running]
    _sum_up(context.record, answers, records)
    return await asyncio.to_thread(comparison_json, comparison, answers)


async def _answer(runner: ChatRunner, job: ModelJob, index: int, own: RequestContext) -> Compared:
    """Counted as a request of its own is; the context is this answer's alone."""
    with own.meter.settled(), _naming(index):
        async with aclosing(runner.run(job, own)) as events:
            return await _collect(job.request_id, events)


async def _collect(answer_id: str, events: AsyncGenerator[Answer, None]) -> Compared:
    start = await anext(events)
    assert isinstance(start, AnswerStart)
    length, ids, spelled = 0, list[int](), list[bytes]()
    finish: FinishReason = "length"
    async for event in events:
        assert not isinstance(event, AnswerStart)
        if isinstance(event, GenerationEnd):
            return Compared(
                id=answer_id,
                system_fingerprint=start.system_fingerprint,
                token_ids=tuple(ids),
                texts=tuple(spell(spelled, length)),
                finish_reason=finish,
                end=event,
            )
        length += len(event.text)
        ids += [sampled.chosen.token_id for sampled in event.logprobs]
        spelled += [sampled.chosen.utf8 for sampled in event.logprobs]
        finish = event.finish_reason or finish
    raise AssertionError("an engine ends with a GenerationEnd")


def comparison_json(comparison: Comparison, answers: Sequence[Compared]) -> bytes:
    """The answer to the client; the results stand as the settings do."""
    written = {
        "id": comparison.id,
        "object": "comparison",
        "created": int(time.time()),
        "model": comparison.model,
        "system_fingerprint": answers[0].system_fingerprint,
        "results": [_result(answer, answers[0]) for answer in answers],
    }
    return json.dumps(written, ensure_ascii=False, allow_nan=False).encode()


def _result(answer: Compared, first: Compared) -> dict[str, Any]:
    marks = differences(first.token_ids, answer.token_ids)
    prompt, completion = answer.end.prompt_tokens, sum(answer.end.completion_tokens)
    return {
        "id": answer.id,
        "steering": asdict(answer.end.receipt),
        "message": {"role": "assistant", "content": answer.text, "refusal": None},
        "finish_reason": answer.finish_reason,
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
        "tokens": [{"text": text, "differs": mark} for text, mark in zip(answer.texts, marks, strict=True)],
    }


def _sum_up(record: RequestRecord, answers: Sequence[Compared], records: Sequence[RequestRecord]) -> None:
    """What the log says of the request as a whole."""
    record.prompt_tokens = sum(answer.end.prompt_tokens for answer in answers)
    record.completion_tokens = sum(sum(answer.end.completion_tokens) for answer in answers)
    record.choices = len(answers)
    record.empty_choices = sum(not answer.text for answer in answers)
    record.finish = "length" if any(answer.finish_reason == "length" for answer in answers) else "stop"
    record.time_to_first_token_s = min(
        (own.time_to_first_token_s for own in records if own.time_to_first_token_s), default=None
    )
