"""Pictures, bodies and engine events that several tests need."""

from __future__ import annotations

import base64
import io
from collections.abc import AsyncGenerator, Mapping

from PIL import Image

from service.artifacts import MAIN, Candidate
from service.chat.schemas import ChatCompletionRequest
from service.errors import ApiError
from service.http.body import parse
from service.model.client import Answer
from service.model.job import ModelJob
from service.model.presence import Presence
from service.model.replica import AnswerStart, ModelStatus
from steering.engines.base import (
    Capabilities,
    GenerationEnd,
    Health,
    Receipt,
    SampledToken,
    TextDelta,
    TokenLogprob,
)
from steering.explanation import ConceptActivity, Explanation, Mismatch, TokenExplanation


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(color: str = "red", size: tuple[int, int] = (48, 32), mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", size, color).convert(mode)


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def image_part(data: bytes | None = None) -> dict:
    return {"type": "image_url", "image_url": {"url": data_url(data or encoded(picture()))}}


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def user(*parts: str | dict) -> dict:
    return {"role": "user", "content": [text_part(part) if isinstance(part, str) else part for part in parts]}


def body(*messages: dict, model: str = "tiny", **fields) -> dict:
    return {"model": model, "messages": list(messages) or [user("hello")], **fields}


def parse_chat(raw: bytes) -> ChatCompletionRequest:
    return parse(raw, ChatCompletionRequest)


def json_schema(**changes) -> dict:
    """A `response_format` that asks for a schema."""
    return {"type": "json_schema", "json_schema": {"name": "place", "schema": {"type": "object"}, **changes}}


def receipt(**changes) -> Receipt:
    fields = {
        "applied": True, "reason": None, "artifact": "a" * 64, "canary": "verified", "layer": 3, "preset": "captions",
        "form": "difference", "mode": "causal", "branches": 1, "strength": 1.0, "alpha": 2.0, "beta_up": 0.9,
        "beta_down": 0.9, "gamma": 1.0, "plausibility": 0.0, "min_answer_tokens": None, "control": None,
        "positions": [7], "relative_shift": [0.25], "arm": None, "clamped_positions": [0],
        "mismatch": [Mismatch(before=0.5, after=0.25)],
    }  # fmt: skip
    return Receipt(**{**fields, **changes})


def explanation(*, tokens: int | None = None) -> Explanation:
    """Concept 239 in image and text, concept 7 in the text alone."""
    both = ConceptActivity(id=239, image=1.25, text=0.75, steered=1.0)
    alone = ConceptActivity(id=7, image=0.0, text=0.5, steered=0.25)
    mismatch = Mismatch(before=0.5, after=0.25)
    of_token = TokenExplanation(mismatch=mismatch, text=(alone,))
    return Explanation(
        mismatch=mismatch, image=(both,), text=(both, alone), tokens=None if tokens is None else (of_token,) * tokens
    )


def end(*completion_tokens: int, **changes) -> GenerationEnd:
    return GenerationEnd(prompt_tokens=20, completion_tokens=list(completion_tokens), receipt=receipt(**changes))


def token(text: str, logprob: float = -0.5) -> TokenLogprob:
    return TokenLogprob(token_id=len(text), text=text, utf8=text.encode(), logprob=logprob)


def delta(choice: int, text: str, *, finish=None, logprobs: bool = False, tokens: int = 1) -> TextDelta:
    sampled = tuple(SampledToken(chosen=token(text), top=(token("x", -1.5),)) for _ in range(tokens))
    return TextDelta(
        choice=choice,
        text=text,
        token_ids=tuple(range(tokens)),
        logprobs=sampled if logprobs else (),
        finish_reason=finish,
    )


class ScriptedModel:
    """A ModelClient that answers every job with the same events; an exception among them is raised."""

    def __init__(self, *events: TextDelta | GenerationEnd | Exception) -> None:
        self.events = events or (delta(0, "a star"), delta(0, "", finish="stop", tokens=0), end(3))
        self.jobs: list[ModelJob] = []
        self.closed = 0
        self.beside: dict[str, Candidate] = {}
        self.health: Health | ApiError = Health(alive=True, running=0, waiting=0, seconds_since_progress=0.0)
        self.since_event = float("inf")
        self.where: Presence = Presence.AWAKE

    async def generate(self, job: ModelJob) -> AsyncGenerator[Answer, None]:
        self.jobs.append(job)
        try:
            yield AnswerStart(system_fingerprint="fp_test", prompt_tokens=20)
            for event in self.events:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.closed += 1

    async def candidates(self) -> Mapping[str, Candidate]:
        return self.beside

    async def status(self, artifact: str = MAIN) -> ModelStatus:
        if isinstance(self.health, ApiError):
            raise self.health
        capabilities = Capabilities(
            engine="scripted", model_family="llava", context_tokens=256, forms=("difference",), modes=("causal",),
            branches=(1,), response_format=False, artifact="a" * 64, presets=("captions", "off"),
            alignment={"paired_overlap": 0.5}, faithfulness={"text_unexplained": 0.2},
        )  # fmt: skip
        return ModelStatus(
            health=self.health, capabilities=capabilities, system_fingerprint="fp_test", checkpoint="c" * 64
        )

    async def presence(self) -> Presence:
        return self.where

    @property
    def is_working(self) -> bool:
        return len(self.jobs) > self.closed

    def seconds_since_event(self, artifact: str = MAIN) -> float:
        return self.since_event
