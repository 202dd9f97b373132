"""Requests long enough to fill several blocks of the cache."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from steering.engines.base import GenerationRequest
from tests.steering.engines.driving import Answer, make_request, send
from tests.steering.engines.vllm.agreement import VOCABULARY

LONG = "a word about everything that can be seen in this picture, one after the other, and where: "
SHORT = "what can be seen in this picture? "
"""With the words around it, an image and this fill more than a block."""


def conversation(
    engine, images: tuple[int, ...], tenant: str = "", steering: dict | None = None, text: str = LONG
) -> GenerationRequest:
    """One image, a turn, and another turn, about a second image where there is one."""
    prompt = f"USER: <image>\n{text} ASSISTANT: yes, that is so. USER: "
    prompt += "<image>\nand this? ASSISTANT:" if len(images) == 2 else "and then? ASSISTANT:"
    steering = steering or {"strength": 1.0}
    made = make_request(engine, images=images, steering=steering, max_tokens=6, top_logprobs=VOCABULARY)
    token_ids = engine.processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return replace(made, prompt_token_ids=tuple(token_ids), tenant=tenant)


def later_turn(engine, first: GenerationRequest, answer: Answer) -> GenerationRequest:
    """The turn after `first`: its prompt, the answer that it got, and another question."""
    token_ids = engine.processor.tokenizer(" USER: and then? ASSISTANT:", add_special_tokens=False)["input_ids"]
    prompt = (*first.prompt_token_ids, *answer.tokens(), *token_ids)
    return replace(first, request_id=f"{first.request_id}, later", prompt_token_ids=prompt)


async def in_turn(engine, requests: list[GenerationRequest]) -> list[Answer]:
    """Each sent when the one before has ended."""
    return [await send(engine, request) for request in requests]


async def in_one_step(engine, requests: list[GenerationRequest]) -> list[Answer]:
    """All admitted in the same one."""
    await engine.vllm.pause_generation(mode="keep")
    pending = [asyncio.create_task(send(engine, request)) for request in requests]
    while engine.vllm.get_num_unfinished_requests() < len(requests):
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    await engine.vllm.resume_generation()
    return await asyncio.gather(*pending)


def image_end(engine, request: GenerationRequest, answer: Answer) -> int:
    """Tokens of the prompt up to the end of its last image."""
    behind = request.prompt_token_ids[::-1].index(engine.processor.image_token_id)
    return answer.end.prompt_tokens - behind
