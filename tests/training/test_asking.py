"""Questions reach an engine as they would reach it through the service."""

from pathlib import Path

import pytest
from transformers import AutoProcessor

from service.model.conversation import ChatTokenizer
from service.model.job import Turn
from steering.engines.huggingface.engine import HuggingFaceEngine
from steering.request import SteeringRequest
from tests.tiny_models import drawn_image
from training.evaluation.asking import InProcess, Question, ask_all
from training.miniature.processor import build_processor


@pytest.mark.parametrize("processor", ["tiny", "miniature"])
def test_the_prompt_is_the_services(processor: str, tiny_llava: Path):
    loaded = AutoProcessor.from_pretrained(tiny_llava) if processor == "tiny" else build_processor()
    respondent = InProcess(engine=None, processor=loaded)  # type: ignore[arg-type]
    text, earlier = "Is there a star in the image?", ("Describe the image.", "There is a circle in red.")
    first = respondent.prompt(question(0, text=text))
    assert list(first) == ChatTokenizer(loaded).encode([Turn(role="user", parts=(None, text))])
    assert first.count(loaded.image_token_id) == 1
    later = respondent.prompt(question(0, text=text, earlier=earlier))
    turns = [
        Turn(role="user", parts=(None, earlier[0])),
        Turn(role="assistant", parts=(earlier[1],)),
        Turn(role="user", parts=(text,)),
    ]
    assert list(later) == ChatTokenizer(loaded).encode(turns)
    assert later != first


@pytest.fixture
async def tiny(tiny_llava: Path, tiny_artifact: Path):
    engine = HuggingFaceEngine(tiny_llava, tiny_artifact)
    await engine.start()
    yield InProcess(engine, AutoProcessor.from_pretrained(tiny_llava))
    await engine.stop()


def question(index: int, **changed) -> Question:
    settings = {
        "text": "Describe the image.",
        "max_tokens": 12,
        "steering": SteeringRequest(enabled=True, preset="captions"),
    }
    return Question(image=drawn_image(index), **settings | changed)


async def test_replies_come_in_the_order_of_the_questions_with_their_receipts(tiny: InProcess):
    questions = [question(index, max_tokens=1 + index) for index in range(5)]
    together = await ask_all(tiny, questions, total=5, concurrency=5, report=lambda line: None)
    alone = [await tiny.reply(each) for each in questions]
    assert [reply.token_ids for reply in together] == [reply.token_ids for reply in alone]
    assert all(reply.applied and reply.positions > 0 and reply.relative_shift > 0 for reply in together)


async def test_a_seed_draws_the_same_answer_again_in_any_company(tiny: InProcess):
    sampled = [question(0, temperature=1.0, seed=seed) for seed in (1, 2, 3, 4, 1)]
    together = await ask_all(tiny, sampled, total=5, concurrency=5, report=lambda line: None)
    alone = await tiny.reply(sampled[0])
    assert together[0].token_ids == together[4].token_ids == alone.token_ids
    assert len({reply.token_ids for reply in together}) > 1


async def test_off_says_so(tiny: InProcess):
    reply = await tiny.reply(question(0, steering=SteeringRequest(enabled=False)))
    assert (reply.applied, reply.reason, reply.positions) == (False, "disabled", 0)


async def test_an_answer_led_along_itself_goes_on_as_before(tiny: InProcess):
    whole = await tiny.reply(question(1))
    assert len(whole.token_ids) > 4
    for length in (1, 2, 4):
        led = await tiny.reply(question(1, answer_so_far=whole.token_ids[:length], max_tokens=12 - length))
        assert led.token_ids == whole.token_ids[length:]
