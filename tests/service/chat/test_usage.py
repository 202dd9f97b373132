"""Usage to the token, characters whole, logprobs for every choice: against the real service, on every engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
from PIL import Image
from transformers import AutoProcessor

from tests.service.asking import PICTURE, joined, logprobs, streamed, text, token_bytes
from tests.service.examples import encoded, image_part, user
from tests.service.running_server import RunningServer
from tests.tiny_models import drawn_image

pytestmark = [pytest.mark.service, pytest.mark.slow]
SAMPLED = {"temperature": 1.5, "seed": 11, "max_tokens": 24, "logprobs": True, "top_logprobs": 1}


@pytest.fixture(scope="module")
def processor(checkpoint: tuple[Path, Path]):
    return AutoProcessor.from_pretrained(checkpoint[0])


def logged(answer, choice: int) -> int:
    """Tokens of a choice by its logprobs; the end-of-sequence token is counted, and not among them."""
    tokens, finish = token_bytes([answer], choice), answer.choices[choice].finish_reason
    return len(tokens) + (finish == "stop")


def test_prompt_tokens_are_the_processor_s(ask, processor) -> None:
    """Several turns, three images, of which two stand side by side."""
    first, second, third = PICTURE, drawn_image(2, (30, 60)), drawn_image(3, (60, 30))

    def conversation(picture: Callable[[Image.Image], dict]) -> list[dict]:
        return [
            user(picture(first), "what is it ?"),
            {"role": "assistant", "content": [{"type": "text", "text": "a star ."}]},
            user("and", picture(second), picture(third), "?"),
        ]

    inputs = processor.apply_chat_template(
        conversation(lambda picture: {"type": "image", "image": picture}),
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    usage = ask(messages=conversation(lambda picture: image_part(encoded(picture)))).usage
    assert usage.prompt_tokens == inputs["input_ids"].shape[1]
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_stopped_answer_counts_up_to_the_token_that_stopped_it(ask, client: openai.OpenAI, server) -> None:
    tokens = [token for token, _ in logprobs(ask(logprobs=True, max_tokens=40))]
    position = next(index for index in range(4, len(tokens)) if "\ufffd" not in "".join(tokens[index - 1 : index + 1]))
    stop = tokens[position - 1][-1] + tokens[position][0]
    needed = next(count for count in range(len(tokens)) if stop in "".join(tokens[:count]))
    stopped = ask(stop=stop, max_tokens=40, logprobs=True)
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens == needed == len(logprobs(stopped))
    chunks = streamed(client, server, usage=True, stop=stop, max_tokens=40)
    assert chunks[-1].usage == stopped.usage


def test_usage_and_logprobs_of_several_choices_are_the_same_in_a_stream(ask, client, server: RunningServer) -> None:
    whole = ask(n=3, **SAMPLED)
    chunks = streamed(client, server, usage=True, n=3, **SAMPLED)
    for choice in range(3):
        tokens = token_bytes([whole], choice)
        assert tokens
        assert token_bytes(chunks, choice) == tokens
        assert joined(chunks, choice) == text(whole, choice) == b"".join(tokens).decode(errors="replace")
    assert whole.usage.prompt_tokens == ask().usage.prompt_tokens, "once, not by choice"
    assert whole.usage.completion_tokens == sum(logged(whole, choice) for choice in range(3))
    assert chunks[-1].usage == whole.usage


def test_characters_of_several_tokens_stay_whole(ask, client: openai.OpenAI, server, processor) -> None:
    """Only the two bytes of an e with an acute accent may be said, in any order; each is a token of its own."""
    first, second = processor.tokenizer.encode("\u00e9", add_special_tokens=False)
    only = {**SAMPLED, "max_tokens": 40, "logit_bias": {str(first): 100, str(second): 100}, "n": 2}
    chunks, whole = streamed(client, server, **only), ask(**only)
    for choice in range(2):
        tokens = token_bytes(chunks, choice)
        assert set(tokens) == {b"\xc3", b"\xa9"}
        expected = b"".join(tokens).decode(errors="replace")
        assert "\u00e9" in expected
        assert joined(chunks, choice) == text(whole, choice) == expected


def test_a_cancelled_answer_s_tokens_are_counted(ask, server: RunningServer, processor) -> None:
    """As the metrics see it: the whole prompt, and at least the tokens that were sent."""
    names = ("vlsae_prompt_tokens_total", 'vlsae_completion_tokens_total{arm="none"}')
    prompt = ask(max_tokens=1).usage.prompt_tokens
    before = [server.metric(name) for name in names]
    unending = {"logit_bias": {str(processor.tokenizer.eos_token_id): -100}, "max_tokens": 300}
    stream = ask(stream=True, logprobs=True, **unending)
    seen = []
    for chunk in stream:
        seen += token_bytes([chunk])
        if len(seen) >= 10:
            break
    stream.close()
    server.wait_until_idle()
    deadline = time.monotonic() + 5
    while (counted := server.metric(names[0]) - before[0]) < prompt:
        assert time.monotonic() < deadline, "never counted"
        time.sleep(0.02)
    assert counted == prompt
    assert len(seen) <= server.metric(names[1]) - before[1] < 300
