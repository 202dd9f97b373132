"""An engine's events to OpenAI's objects: one completion, or chunks of server-sent events. No engine, no HTTP.

The receipt stands at top level as `steering`: in the completion; in a stream on the usage chunk if one was asked for,
else on the finish chunk of the choice that finishes last.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple, TypeVar

from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage, ChatCompletionTokenLogprob
from openai.types.chat import chat_completion as whole
from openai.types.chat import chat_completion_chunk as part
from openai.types.chat.chat_completion_token_logprob import TopLogprob

from service.chat.schemas import ChatCompletionRequest
from service.errors import ApiError
from service.settings import Settings
from steering.engines.base import GenerationEnd, SampledToken, TextDelta, TokenLogprob

Event = TextDelta | GenerationEnd
AnyAnswer = TypeVar("AnyAnswer", ChatCompletion, ChatCompletionChunk)
NO_LOGPROBS = b'"logprobs":{"content":[]'
DONE = b"data: [DONE]\n\n"
LOGPROB_BYTES = 256
"""One logprob in JSON is 60 to 150 bytes with common tokens; it is kept, and stands once more in the answer."""
EXPLAINED_TOKEN_BYTES = 2048
"""Three concepts with their labels, in memory and in JSON; kept until the answer's end, in a stream, too."""


class AnswerShape(NamedTuple):
    """What of a request is needed to write its answer; the conversation is not."""

    model: str
    """The model id as the client wrote it."""
    stream: bool
    include_usage: bool
    n: int
    logprobs: bool
    kept_bytes: int
    """Most that is kept of the answer until it is whole: next to nothing but for logprobs and explained tokens."""

    @classmethod
    def of(cls, chat: ChatCompletionRequest, settings: Settings) -> AnswerShape:
        n, tokens = chat.n or 1, chat.max_completion_tokens or chat.max_tokens or settings.default_max_tokens
        logprobs = n * tokens * (1 + (chat.top_logprobs or 0)) if chat.logprobs and not chat.stream else 0
        explained = n * tokens if chat.steering and chat.steering.explain == "tokens" else 0
        return cls(
            model=chat.model,
            stream=bool(chat.stream),
            include_usage=bool(chat.stream_options and chat.stream_options.include_usage),
            n=n,
            logprobs=bool(chat.logprobs),
            kept_bytes=LOGPROB_BYTES * logprobs + EXPLAINED_TOKEN_BYTES * explained,
        )


@dataclass(frozen=True, kw_only=True)
class AnswerHead:
    """What every object of one answer repeats."""

    id: str
    created: int
    """Seconds since 1970."""
    model: str
    """The model id as the client wrote it."""
    system_fingerprint: str


async def completion_json(head: AnswerHead, events: AsyncIterator[Event], *, n: int, logprobs: bool) -> bytes:
    """The whole answer. Logprobs become JSON as they come: made all at once, they would hold everybody up."""
    texts: list[list[str]] = [[] for _ in range(n)]
    tokens: list[list[bytes]] = [[] for _ in range(n)]
    finish: list[Literal["stop", "length"]] = ["length"] * n
    end = None
    async for event in events:
        if isinstance(event, GenerationEnd):
            end = event
            continue
        texts[event.choice].append(event.text)
        tokens[event.choice].extend(token.model_dump_json().encode() for token in _logprobs(event.logprobs))
        finish[event.choice] = event.finish_reason or finish[event.choice]
    assert end is not None, "an engine ends with a GenerationEnd"
    choices = [
        whole.Choice(
            index=index,
            message=ChatCompletionMessage(role="assistant", content="".join(texts[index]), refusal=None),
            logprobs=whole.ChoiceLogprobs(content=[], refusal=None) if logprobs else None,
            finish_reason=finish[index],
        )
        for index in range(n)
    ]
    answer = ChatCompletion(**asdict(head), object="chat.completion", choices=choices, usage=_usage(end))
    written = _with_receipt(answer, end).model_dump_json(exclude_unset=True).encode()
    return _with_logprobs(written, tokens) if logprobs else written


def _with_logprobs(answer: bytes, tokens: list[list[bytes]]) -> bytes:
    """The JSON of each choice's tokens in the place of its empty list, which no text of an answer can look like: a
    quotation mark inside a string is escaped."""
    first, *rest = answer.split(NO_LOGPROBS)
    filled = (NO_LOGPROBS[:-1] + b",".join(of_choice) + b"]" for of_choice in tokens)
    return first + b"".join(part for pair in zip(filled, rest, strict=True) for part in pair)


async def event_stream(
    head: AnswerHead, events: AsyncIterator[Event], *, n: int, logprobs: bool, include_usage: bool
) -> AsyncIterator[bytes]:
    """Server-sent events; the finish chunk of the last choice waits for the receipt."""
    chunks = _Chunks(head, include_usage=include_usage)
    started: set[int] = set()
    running = set(range(n))
    last: ChatCompletionChunk | None = None
    async for event in events:
        if isinstance(event, GenerationEnd):
            assert last is not None, "every choice finishes before the GenerationEnd"
            if include_usage:
                yield _sse(last)
                last = chunks.usage(event)
            yield _sse(_with_receipt(last, event))
            yield DONE
            return
        choice = event.choice
        if choice not in started:
            started.add(choice)
            yield _sse(chunks.delta(choice, part.ChoiceDelta(role="assistant", content="", refusal=None)))
        if event.text or event.logprobs:
            content = part.ChoiceDelta(content=event.text)
            yield _sse(chunks.delta(choice, content, _logprobs(event.logprobs) if logprobs else None))
        if event.finish_reason:
            running.discard(choice)
            last = chunks.delta(choice, part.ChoiceDelta(), finish_reason=event.finish_reason)
            if running:
                yield _sse(last)
    raise AssertionError("an engine ends with a GenerationEnd")  # a stream that just stopped would look complete


def error_event(error: ApiError) -> bytes:
    """What a stream ends with when something breaks after it has begun; no [DONE] follows."""
    return b"data: " + bytes(error.response().body) + b"\n\n"


class _Chunks:
    """Chunks of one stream."""

    def __init__(self, head: AnswerHead, *, include_usage: bool) -> None:
        self._common = {**asdict(head), "object": "chat.completion.chunk"}
        if include_usage:
            self._common["usage"] = None  # OpenAI's chunks carry a null until the last one

    def delta(
        self,
        index: int,
        delta: part.ChoiceDelta,
        logprobs: list[ChatCompletionTokenLogprob] | None = None,
        finish_reason: Literal["stop", "length"] | None = None,
    ) -> ChatCompletionChunk:
        wrapped = None if logprobs is None else part.ChoiceLogprobs(content=logprobs, refusal=None)
        choice = part.Choice(index=index, delta=delta, logprobs=wrapped, finish_reason=finish_reason)
        return ChatCompletionChunk(**self._common, choices=[choice])

    def usage(self, end: GenerationEnd) -> ChatCompletionChunk:
        return ChatCompletionChunk(**{**self._common, "usage": _usage(end)}, choices=[])


def _sse(chunk: ChatCompletionChunk) -> bytes:
    return b"data: " + chunk.model_dump_json(exclude_unset=True).encode() + b"\n\n"


def _with_receipt(answer: AnyAnswer, end: GenerationEnd) -> AnyAnswer:
    """openai's models allow extra fields; ours is `steering`."""
    return answer.model_copy(update={"steering": asdict(end.receipt)})


def _usage(end: GenerationEnd) -> CompletionUsage:
    completion = sum(end.completion_tokens)
    return CompletionUsage(
        prompt_tokens=end.prompt_tokens, completion_tokens=completion, total_tokens=end.prompt_tokens + completion
    )


def _logprobs(tokens: Iterable[SampledToken]) -> list[ChatCompletionTokenLogprob]:
    return [
        ChatCompletionTokenLogprob(
            **_token(sampled.chosen), top_logprobs=[TopLogprob(**_token(other)) for other in sampled.top]
        )
        for sampled in tokens
    ]


def _token(token: TokenLogprob) -> dict:
    return {"token": token.text, "bytes": list(token.utf8), "logprob": token.logprob}
