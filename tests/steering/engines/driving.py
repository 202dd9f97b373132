"""Drives an engine from a test: one call per request, all events collected."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from steering.engines.base import GenerationEnd, GenerationRequest, Sampling, TextDelta
from steering.request import SteeringRequest, merge_sources
from tests.tiny_models import drawn_image

_ids = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Everything one request brought."""

    deltas: list[TextDelta]
    end: GenerationEnd

    def text(self, choice: int = 0) -> str:
        return "".join(delta.text for delta in self.deltas if delta.choice == choice)

    def tokens(self, choice: int = 0) -> list[int]:
        return [token for delta in self.deltas if delta.choice == choice for token in delta.token_ids]

    def logprobs(self, choice: int = 0) -> list[dict[int, float]]:
        """Per generated token: token id to logprob, as many as were asked for."""
        sampled = [one for delta in self.deltas if delta.choice == choice for one in delta.logprobs]
        return [{entry.token_id: entry.logprob for entry in one.top} for one in sampled]

    def finish_reasons(self) -> dict[int, str]:
        return {delta.choice: delta.finish_reason for delta in self.deltas if delta.finish_reason}


def make_request(
    engine, text: str = "what is this?", images: tuple[int, ...] = (3,), steering: dict | None = None, **sampling
) -> GenerationRequest:
    """A request about noise images, one seed each, in LLaVA's prompt layout."""
    prompt = "USER: " + "<image>\n" * len(images) + text + " ASSISTANT:"
    token_ids = engine.processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    settings = {"max_tokens": 12, "temperature": 0.0} | sampling
    return GenerationRequest(
        request_id=f"test-{next(_ids)}",
        prompt_token_ids=tuple(token_ids),
        images=tuple(drawn_image(seed) for seed in images),
        sampling=Sampling(**settings),
        steering=merge_sources(SteeringRequest(**(steering or {}))),
    )


LATER_TURN = "what is this? ASSISTANT: a cat, I think. USER: and the rest?"
"""For `make_request`: a second turn, whose prompt holds the answer of the first."""


def prompt_text_tokens(request: GenerationRequest) -> int:
    """Tokens of a prompt of `make_request` behind its last image."""
    return request.prompt_token_ids[::-1].index(260)


async def ask(engine, *args, **kwargs) -> Answer:
    """Send a request and wait for its end."""
    return await send(engine, make_request(engine, *args, **kwargs))


async def send(engine, request: GenerationRequest) -> Answer:
    events = [event async for event in engine.generate(request)]
    return Answer(deltas=events[:-1], end=events[-1])


def chat_text(processor, images: int, text: str) -> str:
    """A user's turn, images first, in the checkpoint's own chat template."""
    content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
