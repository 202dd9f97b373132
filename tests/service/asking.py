"""Questions to the real service, and what to read off its answers."""

from __future__ import annotations

import openai
from openai.types.chat import ChatCompletion

from tests.service.examples import encoded, image_part, user
from tests.service.running_server import RunningServer
from tests.tiny_models import drawn_image

PICTURE = drawn_image(1, (48, 48))
QUESTION = user(image_part(encoded(PICTURE)), "Describe the picture .")
GREEDY = {"messages": [QUESTION], "temperature": 0, "max_tokens": 12}


def text(answer: ChatCompletion, choice: int = 0) -> str:
    return answer.choices[choice].message.content or ""


def logprobs(answer: ChatCompletion, choice: int = 0) -> list[tuple[str, float]]:
    found = answer.choices[choice].logprobs
    assert found is not None
    assert found.content is not None
    return [(token.token, token.logprob) for token in found.content]


def receipt(answer) -> dict:
    return answer.model_extra["steering"]


def streamed(
    client: openai.OpenAI, server: RunningServer, *, usage: bool = False, extra: dict | None = None, **changes
):
    """All chunks of a stream."""
    options = {"stream_options": {"include_usage": True}} if usage else {}
    return list(
        client.chat.completions.create(
            model=server.name, stream=True, extra_body=extra or {}, **{**GREEDY, **options, **changes}
        )
    )


def joined(chunks: list, choice: int = 0) -> str:
    return "".join(part.delta.content or "" for chunk in chunks for part in chunk.choices if part.index == choice)


def token_bytes(parts: list, choice: int = 0) -> list[bytes]:
    """Bytes of every token of a choice, of a whole answer or of a stream's chunks."""
    choices = [one for part in parts for one in part.choices if one.index == choice and one.logprobs]
    return [bytes(token.bytes or []) for one in choices for token in one.logprobs.content or []]
