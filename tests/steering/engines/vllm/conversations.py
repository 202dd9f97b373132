"""Requests long enough to fill several blocks of the cache."""

from __future__ import annotations

from dataclasses import replace

from steering.engines.base import GenerationRequest
from tests.steering.engines.driving import make_request
from tests.steering.engines.vllm.agreement import VOCABULARY

LONG = "a word about everything that can be seen in this picture, one after the other, and where: "


def conversation(engine, images: tuple[int, ...], tenant: str = "", steering: dict | None = None) -> GenerationRequest:
    """One image, a long turn, and another turn, about a second image where there is one."""
    prompt = f"USER: <image>\n{LONG} ASSISTANT: yes, that is so. USER: "
    prompt += "<image>\nand this? ASSISTANT:" if len(images) == 2 else "and then? ASSISTANT:"
    steering = steering or {"strength": 1.0}
    made = make_request(engine, images=images, steering=steering, max_tokens=6, top_logprobs=VOCABULARY)
    token_ids = engine.processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return replace(made, prompt_token_ids=tuple(token_ids), tenant=tenant)
