"""The chat templates of LLaVA-NeXT and Qwen2.5-VL: the processor's own prompt, and special tokens only from it."""

from __future__ import annotations

import pytest

from service.model.conversation import ChatTokenizer
from service.model.job import Turn
from steering.engines.checkpoint import read_checkpoint
from steering.engines.preparation import expand_prompt
from tests.tiny_models import drawn_image

CONVERSATIONS = [
    [Turn("user", (None, "what is this?"))],
    [Turn("user", ("hello",))],
    [Turn("system", ("Be brief.",)), Turn("user", (None, None, "compare")), Turn("assistant", ("a star",)),
     Turn("user", ("sure?", None))],
]  # fmt: skip
SIZES = [(24, 20), (100, 31), (60, 90)]


@pytest.fixture(scope="module")
def checkpoint(tiny_family):
    return read_checkpoint(str(tiny_family), None, None)


def content(part: str | None, images) -> dict:
    return {"type": "image", "image": next(images)} if part is None else {"type": "text", "text": part}


@pytest.mark.parametrize("turns", CONVERSATIONS, ids=["one image", "no image", "several turns"])
def test_a_conversation_becomes_what_the_processor_makes_of_it(checkpoint, turns):
    images = [drawn_image(index, size) for index, size in enumerate(SIZES)]
    images = images[: sum(turn.parts.count(None) for turn in turns)]
    remaining = iter(images)
    messages = [{"role": turn.role, "content": [content(part, remaining) for part in turn.parts]} for turn in turns]
    made = checkpoint.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    prompt = ChatTokenizer(checkpoint.processor).encode(turns)
    assert prompt.count(checkpoint.image_token_id) == len(images)
    assert expand_prompt(checkpoint, images, prompt) == list(made["input_ids"][0])


def test_special_tokens_in_a_caller_s_text_stay_text(checkpoint):
    tokenizer, chat = checkpoint.processor.tokenizer, ChatTokenizer(checkpoint.processor)
    hostile = " ".join(token.content for token in tokenizer.added_tokens_decoder.values())

    def specials(text: str) -> list[int]:
        return [token for token in chat.encode([Turn("user", (None, text))]) if token in tokenizer.added_tokens_decoder]

    assert specials(hostile) == specials("what is this?")
    assert hostile in tokenizer.decode(chat.encode([Turn("user", (None, hostile))]))
