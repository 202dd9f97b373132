"""A cached prefix is reused by those, and only by those, whose hidden states are the same."""

from __future__ import annotations

from dataclasses import replace

import pytest

from steering.engines.base import GenerationRequest
from steering.engines.vllm import choice as choice_module
from tests.steering.engines.driving import Answer, make_request, send
from tests.steering.engines.vllm.agreement import VOCABULARY, Disagreement, assert_agree
from tests.steering.engines.vllm.conftest import BLOCK_TOKENS
from tests.steering.engines.vllm.conversations import LONG, SHORT, conversation, in_one_step, in_turn, later_turn

FULL, HALF, OFF = {"strength": 1.0}, {"strength": 0.5}, {"enabled": False}
TWO = {"strength": 1.0, "gamma": 0.6, "plausibility": 0.2}


async def ask_in_turn(engine, text: str, settings: list[dict]) -> list[Answer]:
    return await in_turn(
        engine,
        [
            make_request(engine, f"{text}: {LONG}", steering=one, max_tokens=6, top_logprobs=VOCABULARY)
            for one in settings
        ],
    )


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param([FULL, FULL], id="the same twice"),
        pytest.param([TWO, TWO], id="two branches twice"),
        pytest.param([OFF, FULL], id="steered after off"),
        pytest.param([FULL, OFF], id="off after steered"),
        pytest.param([FULL, HALF], id="two strengths"),
        pytest.param([FULL, TWO], id="two branches after one"),
        pytest.param([FULL, FULL | {"control": "reversed"}], id="reversed after steered"),
    ],
)
async def test_one_request_after_the_other(engine, reference, settings, request):
    name = request.node.callspec.id
    before = engine.progress.cached_tokens
    answers, expected = await ask_in_turn(engine, name, settings), await ask_in_turn(reference, name, settings)
    assert_agree(answers, expected)
    assert [one.end.receipt.positions for one in answers] == [one.end.receipt.positions for one in expected]
    reused = engine.progress.cached_tokens - before
    assert (reused > 0) == ("twice" in name)


async def test_a_prompt_that_is_cached_in_the_step_that_computes_it(either_engine, reference):
    """The second of two equal prompts finds the first's blocks in the cache before anything is in them."""
    engine, before = either_engine, either_engine.progress.cached_tokens
    requests = [make_request(engine, SHORT, (12,), FULL, max_tokens=4, top_logprobs=VOCABULARY) for _ in range(2)]
    assert_agree(await in_one_step(engine, requests), await in_turn(reference, requests))
    assert engine.progress.cached_tokens > before


async def test_gamma_and_plausibility_share_what_they_do_not_change(engine, reference):
    settings = [TWO, TWO | {"gamma": 0.3}]
    before = engine.progress.cached_tokens
    answers = await ask_in_turn(engine, "gamma", settings)
    assert_agree(answers, await ask_in_turn(reference, "gamma", settings))
    assert engine.progress.cached_tokens > before


async def test_tenants_do_not_share(engine):
    before = engine.progress.cached_tokens
    await send(engine, conversation(engine, (8,), tenant="one"))
    await send(engine, conversation(engine, (8,), tenant="other"))
    assert engine.progress.cached_tokens == before
    await send(engine, conversation(engine, (8,), tenant="one"))
    assert engine.progress.cached_tokens > before


async def two_turns(engine, steering: dict) -> tuple[list[GenerationRequest], list[Answer]]:
    """A turn whose answer fills more than a block of the cache, and the turn after it."""
    asked = make_request(
        engine, SHORT, (21,), steering, max_tokens=2 * BLOCK_TOKENS, top_logprobs=VOCABULARY,
        logit_bias={257: -100.0, engine.processor.image_token_id: -100.0},
    )  # fmt: skip
    first = await send(engine, asked)
    later = replace(later_turn(engine, asked, first), sampling=replace(asked.sampling, max_tokens=6))
    return [asked, later], [first, await send(engine, later)]


@pytest.mark.parametrize("wait", [0, 2])
@pytest.mark.parametrize("branches", [FULL, TWO], ids=["one branch", "two branches"])
async def test_a_steered_answer_is_unsteered_prompt_in_the_next_turn(engine, reference, branches, wait):
    """Its blocks lie in the cache as they were steered: they must not be hit, and the prompt runs again."""
    before = engine.progress.cached_tokens
    requests, answers = await two_turns(engine, branches | {"min_answer_tokens": wait})
    assert engine.progress.cached_tokens == before
    assert_agree(answers, await in_turn(reference, requests))
    assert [one.end.receipt.positions for one in answers] == [[2 * BLOCK_TOKENS - wait], [6 - wait]]
    again = await send(engine, requests[1])
    assert engine.progress.cached_tokens > before, "the same prompt may share"
    assert_agree([again], [answers[1]])


async def test_without_the_prompt_s_length_in_the_salt_the_next_turn_is_wrong(engine, reference, monkeypatch):
    true_salt = choice_module.cache_salt
    monkeypatch.setattr(
        choice_module, "cache_salt", lambda *args, **named: true_salt(*args, **{**named, "prompt_length": 0})
    )
    requests, answers = await two_turns(engine, FULL | {"min_answer_tokens": 1})
    expected = await in_turn(reference, requests)
    assert_agree(answers[:1], expected[:1])
    with pytest.raises(Disagreement):
        assert_agree(answers[1:], expected[1:])


async def test_without_the_salt_steered_after_off_is_wrong(engine, reference, monkeypatch):
    """The tests above can fail: here the salt they guard is taken away."""
    monkeypatch.setattr(choice_module, "cache_salt", lambda *_args, **_kwargs: None)
    answers = await ask_in_turn(engine, "no salt", [OFF, FULL])
    with pytest.raises(Disagreement):
        assert_agree(answers, await ask_in_turn(reference, "no salt", [OFF, FULL]))


async def test_without_the_image_index_in_the_salt_a_later_image_is_wrong(engine, reference, monkeypatch):
    true_salt = choice_module.cache_salt
    monkeypatch.setattr(
        choice_module, "cache_salt", lambda *args, **named: true_salt(*args, **{**named, "last_image_index": 0})
    )
    pairs = []
    for images in ((6,), (6, 7)):
        answer = await send(engine, conversation(engine, images))
        pairs.append((answer, await send(reference, conversation(reference, images))))
    assert_agree([pairs[0][0]], [pairs[0][1]])
    with pytest.raises(Disagreement):
        assert_agree([pairs[1][0]], [pairs[1][1]])
