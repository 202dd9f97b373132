"""Puts a question about an image to an LVLM, in this process or over HTTP. Knows nothing of benchmarks.

Both ways take the same `Question` and `SteeringRequest` and give the same `Reply`, so that a benchmark cannot tell
them apart. Many questions are on their way at once, up to a limit, so that they batch.
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

from PIL.Image import Image

from steering.engines.base import Engine, GenerationEnd, GenerationRequest, Sampling
from steering.request import SteeringRequest, merge_sources


@dataclass(frozen=True, kw_only=True)
class Question:
    """One user turn: an image, then a text; or a text alone, a turn after the one with the image."""

    image: Image
    text: str
    max_tokens: int
    steering: SteeringRequest
    """An empty one leaves everything to whoever answers (over HTTP: to the server's default)."""
    earlier: tuple[str, str] | None = None
    """Text and answer of the turn before, which then holds the image."""
    temperature: float = 0.0
    """0 is greedy."""
    seed: int | None = None
    """Seeds the drawing of tokens; greedy decoding draws none."""
    answer_so_far: tuple[int, ...] = ()
    """Token ids that stand after the prompt, as if generated already (teacher forcing); only in this process."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How the tokens of all answers of an evaluation are chosen."""

    temperature: float = 0.0
    """0 is greedy."""
    sampling_seed: int = 0

    def seed_of(self, scene_seed: int, text: str) -> int | None:
        """The seed for what is asked about a scene: the same under every condition, so that differences are paired."""
        if self.temperature == 0:
            return None
        return zlib.crc32(f"{self.sampling_seed} {scene_seed} {text}".encode())


GREEDY = Decoding()


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The answer and what the receipt says was done to it."""

    text: str
    applied: bool
    reason: str | None
    """Why steering was not applied, where it was not."""
    positions: int
    """Positions to which a delta was added."""
    relative_shift: float
    """Mean of |delta| / |hidden state| over the steered positions."""
    token_ids: tuple[int, ...] = ()
    """Generated tokens without the end-of-sequence token; empty over HTTP."""
    mismatch: float | None = None
    """Of image and text at the answer's end, by the codes before steering; None where it was not looked at."""


class Respondent(Protocol):
    """Whoever answers."""

    async def reply(self, question: Question) -> Reply: ...


class InProcess:
    """Asks an engine of this process; the prompt is the processor's chat template, as the service makes it."""

    def __init__(self, engine: Engine, processor: Any) -> None:
        self._engine = engine
        self._processor = processor
        self._numbers = count()
        self._prompts: dict[tuple[str, tuple[str, str] | None], tuple[int, ...]] = {}

    @property
    def image_token_id(self) -> int:
        """The token that stands for an image in a prompt."""
        return self._processor.image_token_id

    async def reply(self, question: Question) -> Reply:
        request = GenerationRequest(
            request_id=f"evaluation-{next(self._numbers)}",
            prompt_token_ids=self.prompt(question) + question.answer_so_far,
            images=(question.image,),
            sampling=Sampling(max_tokens=question.max_tokens, temperature=question.temperature, seed=question.seed),
            steering=merge_sources(question.steering),
        )
        text: list[str] = []
        token_ids: list[int] = []
        async for event in self._engine.generate(request):
            if isinstance(event, GenerationEnd):
                receipt = event.receipt
                return Reply(
                    text="".join(text),
                    applied=receipt.applied,
                    reason=receipt.reason,
                    positions=receipt.positions[0],
                    relative_shift=receipt.relative_shift[0],
                    token_ids=tuple(token_ids),
                    mismatch=None
                    if not receipt.mismatch or receipt.mismatch[0] is None
                    else receipt.mismatch[0].before,
                )
            text.append(event.text)
            token_ids += event.token_ids
        raise AssertionError("a generation ended without GenerationEnd")

    def prompt(self, question: Question) -> tuple[int, ...]:
        """Token ids with one image token; kept by text, since a benchmark asks the same about many images."""
        key = (question.text, question.earlier)
        if key not in self._prompts:
            turns = _turns(question, {"type": "image"})
            prompt = self._processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            tokenizer = self._processor.tokenizer
            written = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
            self._prompts[key] = tuple(tokenizer(prompt, add_special_tokens=not written).input_ids)
        return self._prompts[key]


class OverHttp:
    """Asks a running service through the official client.

    Where the service asks for keys, OPENAI_API_KEY holds one of scopes `chat` and, for the controls, `evaluate`.
    """

    def __init__(
        self, url: str, *, artifact: str | None = None, model: str | None = None, timeout_s: float = 300
    ) -> None:
        """`artifact`: the fingerprint that receipts must show; None accepts any."""
        from openai import AsyncOpenAI

        base = url.rstrip("/")
        self._client = AsyncOpenAI(
            base_url=base if base.endswith("/v1") else f"{base}/v1",
            api_key=os.environ.get("OPENAI_API_KEY", "none"),
            timeout=timeout_s,
            max_retries=8,
        )
        self._artifact = artifact
        self._model = model

    async def model_name(self) -> str:
        """The model asked: the given one, else the first that the server lists."""
        if self._model is None:
            self._model = (await self._client.models.list()).data[0].id
        return self._model

    async def reply(self, question: Question) -> Reply:
        if question.answer_so_far:
            raise ValueError("an answer cannot be forced over HTTP; ask an engine of this process")
        steering = question.steering.model_dump(exclude_none=True)
        completion = await self._client.chat.completions.create(
            model=await self.model_name(),
            messages=_turns(question, await asyncio.to_thread(_image_part, question.image)),
            max_tokens=question.max_tokens,
            temperature=question.temperature,
            seed=question.seed,
            extra_body={"steering": steering} if steering else None,
        )
        receipt = (completion.model_extra or {})["steering"]
        if self._artifact and receipt["artifact"] not in (None, self._artifact):
            raise ValueError(f"the service has artifact {receipt['artifact'][:12]}, not {self._artifact[:12]}")
        return Reply(
            text=completion.choices[0].message.content or "",
            applied=receipt["applied"],
            reason=receipt["reason"],
            positions=receipt["positions"][0],
            relative_shift=receipt["relative_shift"][0],
        )

    async def __aenter__(self) -> OverHttp:
        return self

    async def __aexit__(self, *failure: object) -> None:
        await self._client.close()


def _turns(question: Question, image_part: dict[str, Any]) -> Any:
    """The conversation, with the image in its first turn."""
    if question.earlier is None:
        return [{"role": "user", "content": [image_part, _text_part(question.text)]}]
    asked, answered = question.earlier
    return [
        {"role": "user", "content": [image_part, _text_part(asked)]},
        {"role": "assistant", "content": [_text_part(answered)]},
        {"role": "user", "content": [_text_part(question.text)]},
    ]


def _image_part(image: Image) -> Any:
    data = io.BytesIO()
    image.save(data, format="PNG")
    return {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()},
    }


def _text_part(text: str) -> Any:
    return {"type": "text", "text": text}


async def ask_all(
    respondent: Respondent,
    questions: Iterable[Question],
    *,
    total: int,
    concurrency: int,
    label: str = "",
    report: Callable[[str], None] = print,
    every_s: float = 30.0,
) -> list[Reply]:
    """Replies in the order of the questions; the first failure cancels the rest. Reports progress by time.

    A question is taken only when there is room for it, so that at most `concurrency` pictures are in memory.
    `total`: number of questions, for the reports.
    """
    room = asyncio.Semaphore(concurrency)
    started = last = time.monotonic()
    done = 0

    async def one(question: Question) -> Reply:
        nonlocal done, last
        try:
            reply = await respondent.reply(question)
        finally:
            room.release()
        done += 1
        if (now := time.monotonic()) - last > every_s:
            last = now
            report(f"  {label}: {done}/{total} ({done / (now - started):.3g} a second)")
        return reply

    tasks: list[asyncio.Task[Reply]] = []
    try:
        async with asyncio.TaskGroup() as group:
            for question in questions:
                await room.acquire()
                tasks.append(group.create_task(one(question)))
    except ExceptionGroup as failures:  # the first tells the user what to do; the others stay in its context
        raise failures.exceptions[0] from failures
    seconds = time.monotonic() - started
    report(f"  {label}: {done} in {seconds:.1f} s ({done / max(seconds, 1e-9):.3g} a second)")
    return [task.result() for task in tasks]
