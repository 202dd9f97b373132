"""The engine against the equations, against plain transformers, and against itself in other batches."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from steering.artifact import load_artifact
from steering.engines.huggingface.engine import HuggingFaceEngine
from steering.errors import BadArtifact, EngineUnavailable
from steering.lvlm.token_spans import expand_image_tokens
from steering.request import SteeringRequest, merge_sources
from steering.settings import resolve
from tests.steering.engines.contract import *  # noqa: F403 - the tests every engine must pass
from tests.steering.engines.driving import LATER_TURN, ask, make_request, prompt_text_tokens, send
from tests.steering.reference import next_token_logprobs
from tests.tiny_models import save_tiny_artifact, save_tiny_llava

VOCABULARY = 261
FORMS, MODES = ("published", "difference", "union"), ("causal", "exact")
BRANCHES = {1: {"gamma": 1.0, "plausibility": 0.0}, 2: {"gamma": 0.6, "plausibility": 0.3}}
SETTINGS = [
    {"form": form, "mode": mode, "alpha": 1.5, "beta_up": 0.7, "beta_down": 0.9, "strength": 0.8} | BRANCHES[branches]
    for form, mode, branches in itertools.product(FORMS, MODES, BRANCHES)
]
LABELS = [f"{one['form']}-{one['mode']}-{1 if one['gamma'] == 1 else 2}" for one in SETTINGS]


@pytest.fixture(scope="module")
def plain_model(tiny_llava):
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval(), AutoProcessor.from_pretrained(tiny_llava)


def expanded_inputs(plain_model, request):
    model, processor = plain_model
    pixels = processor.image_processor(images=list(request.images), return_tensors="pt")["pixel_values"]
    counts = [4] * len(request.images)
    return expand_image_tokens(request.prompt_token_ids, model.config.image_token_id, counts), pixels


def assert_matches_reference(plain_model, artifact, request, answer, min_text_tokens=1, tolerance=1e-4):
    """Every step's full logprobs, teacher-forced on the engine's own tokens."""
    settings = resolve(request.steering, presets=artifact.config.presets, default_preset="captions", has_image=True)
    prompt, pixels = expanded_inputs(plain_model, request)
    generated: list[int] = []
    assert len(answer.logprobs()) >= 3
    for token, logprobs in zip(answer.tokens(), answer.logprobs(), strict=True):
        expected = next_token_logprobs(plain_model[0], artifact, settings, prompt, generated, pixels, min_text_tokens)
        got = torch.tensor([logprobs[index] for index in range(VOCABULARY)])
        torch.testing.assert_close(got, expected.clamp(min=-9999.0), atol=tolerance, rtol=0)
        generated.append(token)


@pytest.mark.parametrize("settings", SETTINGS, ids=LABELS)
async def test_every_form_mode_and_branch_count_follows_the_equations(engine, plain_model, tiny_artifact, settings):
    request = make_request(engine, steering=settings, max_tokens=6, top_logprobs=VOCABULARY)
    answer = await send(engine, request)
    assert answer.end.receipt.applied
    assert answer.end.receipt.relative_shift[0] > 0.01
    assert_matches_reference(plain_model, load_artifact(tiny_artifact), request, answer)


@pytest.mark.parametrize("wait", [0, 2, 6])
async def test_steering_begins_at_a_place_in_the_answer_of_a_later_turn(engine, plain_model, tiny_artifact, wait):
    """Every mode and branch count, together; the length of what stands before the answer plays no part."""
    requests = [
        make_request(
            engine, LATER_TURN + "?" * index, steering=settings | {"min_answer_tokens": wait}, max_tokens=9,
            top_logprobs=VOCABULARY, logit_bias={257: -100.0},
        )
        for index, settings in enumerate(SETTINGS[:4])
    ]  # fmt: skip
    answers = await asyncio.gather(*(send(engine, request) for request in requests))
    for request, answer in zip(requests, answers, strict=True):
        assert_matches_reference(plain_model, load_artifact(tiny_artifact), request, answer)
        assert answer.end.receipt.positions == [9 - wait]
        assert answer.end.receipt.relative_shift[0] > 0.01


async def test_concurrent_requests_with_different_settings_follow_the_equations(engine, plain_model, tiny_artifact):
    asked = [*SETTINGS, {"strength": 0.0}, {"control": "reversed"}]
    requests = [
        make_request(
            engine, "x" * (5 * index), (index, index + 1)[: 1 + index % 2], settings, max_tokens=4 + index % 3,
            top_logprobs=VOCABULARY,
        )
        for index, settings in enumerate(asked)
    ]  # fmt: skip
    answers = await asyncio.gather(*(send(engine, request) for request in requests))
    artifact = load_artifact(tiny_artifact)
    for request, answer in zip(requests, answers, strict=True):
        assert_matches_reference(plain_model, artifact, request, answer)


@pytest.mark.parametrize("mode", MODES)
async def test_min_text_tokens_delays_the_first_steered_position(tiny_llava, plain_model, tmp_path, mode):
    folder = save_tiny_artifact(tmp_path / "artifact", tiny_llava, min_text_tokens=30)
    engine = HuggingFaceEngine(tiny_llava, folder)
    await engine.start()
    requests = [
        make_request(engine, steering=SETTINGS[0] | {"mode": mode} | wait, max_tokens=11, top_logprobs=VOCABULARY)
        for wait in ({}, {"min_answer_tokens": 2}, {"min_answer_tokens": 8})
    ]
    answers = [await send(engine, request) for request in requests]
    await engine.stop()
    for request, answer in zip(requests, answers, strict=True):
        assert_matches_reference(plain_model, load_artifact(folder), request, answer, min_text_tokens=30)
    prompt_text = prompt_text_tokens(requests[0])
    assert prompt_text + 2 < 30 < prompt_text + 8, "either place is the later one once"
    by_text, by_answer = prompt_text + 10 - 29, 11 - 8
    assert [answer.end.receipt.positions for answer in answers] == [
        [by_text if mode == "causal" else prompt_text + 10], [by_text], [by_answer]
    ]  # fmt: skip


async def test_a_prompt_that_ends_at_the_image_is_steered_from_its_first_token(engine, plain_model, tiny_artifact):
    request = make_request(engine, steering=SETTINGS[0], max_tokens=5, top_logprobs=VOCABULARY)
    cut = request.prompt_token_ids[: request.prompt_token_ids.index(260) + 1]
    request = type(request)(**{**vars(request), "prompt_token_ids": cut})
    answer = await send(engine, request)
    assert answer.end.receipt.positions == [4]
    plain = await send(
        engine, type(request)(**{**vars(request), "steering": merge_sources(SteeringRequest(strength=0))})
    )
    assert plain.logprobs()[0] == answer.logprobs()[0]


@pytest.mark.parametrize("num_kv_heads", [4, 2], ids=["MHA", "GQA"])
async def test_strength_0_is_plain_transformers_generate(tmp_path, num_kv_heads):
    model_folder = save_tiny_llava(tmp_path / "model", num_kv_heads=num_kv_heads)
    engine = HuggingFaceEngine(model_folder, save_tiny_artifact(tmp_path / "artifact", model_folder))
    await engine.start()
    request = make_request(engine, steering={"strength": 0.0}, max_tokens=20, top_logprobs=VOCABULARY)
    answer = await send(engine, request)
    off = await ask(engine, steering={"enabled": False}, max_tokens=20, top_logprobs=VOCABULARY)
    await engine.stop()
    model: Any = AutoModelForImageTextToText.from_pretrained(
        model_folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    tokens, pixels = expanded_inputs((model, AutoProcessor.from_pretrained(model_folder)), request)
    made = model.generate(
        input_ids=torch.tensor([tokens]), pixel_values=pixels, attention_mask=torch.ones(1, len(tokens)),
        max_new_tokens=20, do_sample=False, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    new_tokens = made.sequences[0, len(tokens) :].tolist()
    assert answer.tokens() == [token for token in new_tokens if token != 257]
    for ours, logits in zip(answer.logprobs(), made.logits, strict=False):
        got = torch.tensor([ours[index] for index in range(VOCABULARY)])
        torch.testing.assert_close(got, logits[0].log_softmax(-1), atol=1e-5, rtol=0)
    assert answer.tokens() == off.tokens()
    assert answer.logprobs() == off.logprobs()
    assert (answer.end.receipt.reason, off.end.receipt.reason) == ("strength_0", "disabled")


async def test_detaching_the_hook_turns_applied_false(engine):
    before = await ask(engine, steering={"strength": 1.0})
    engine.detach_hook()
    after = await ask(engine, steering={"strength": 1.0})
    plain = await ask(engine, steering={"strength": 0.0})
    assert before.end.receipt.applied
    assert before.end.receipt.reason is None
    assert not after.end.receipt.applied
    assert after.end.receipt.reason == "hook_detached"
    assert after.end.receipt.positions == [0]
    assert after.tokens() == plain.tokens()


async def test_more_requests_than_slots_all_progress(tiny_llava, tiny_artifact):
    engine = HuggingFaceEngine(tiny_llava, tiny_artifact, max_batch_size=3)
    await engine.start()
    alone = [(await ask(engine, "q" * index, max_tokens=5 + index)).tokens() for index in range(8)]
    together = await asyncio.gather(*(ask(engine, "q" * index, max_tokens=5 + index) for index in range(8)))
    health = engine.health()
    await engine.stop()
    assert [answer.tokens() for answer in together] == alone
    assert health.alive
    assert health.waiting == 0


@pytest.mark.parametrize("mode", MODES)
async def test_a_zero_delta_is_not_called_steering(engine, mode):
    nothing = {"strength": 1.0, "form": "difference", "beta_up": 0.0, "beta_down": 0.0, "mode": mode}
    answer, off = await ask(engine, steering=nothing), await ask(engine, steering={"enabled": False})
    assert answer.tokens() == off.tokens()
    assert (answer.end.receipt.applied, answer.end.receipt.reason) == (False, "delta_0")


async def test_a_request_whose_sampling_fails_fails_alone(engine):
    broken = make_request(engine, temperature=1.0, logit_bias={9999: 1.0})
    fine, failed = await asyncio.gather(ask(engine), send(engine, broken), return_exceptions=True)
    assert isinstance(failed, EngineUnavailable)
    assert not isinstance(fine, BaseException)
    assert fine.finish_reasons()


def test_the_engine_outlives_the_event_loop_of_a_caller(tiny_llava, tiny_artifact):
    engine = HuggingFaceEngine(tiny_llava, tiny_artifact)
    asyncio.run(engine.start())

    async def first_event_only():
        await anext(engine.generate(make_request(engine, max_tokens=150, logit_bias={257: -100.0})))

    for _ in range(3):
        asyncio.run(first_event_only())
    answer = asyncio.run(ask(engine))
    assert answer.finish_reasons()
    asyncio.run(engine.stop())


async def test_an_engine_that_is_not_running_says_so(tiny_llava, tiny_artifact):
    engine = HuggingFaceEngine(tiny_llava, tiny_artifact)
    await engine.start()
    request = make_request(engine)
    await engine.stop()
    with pytest.raises(EngineUnavailable):
        await send(engine, request)


async def test_an_artifact_of_another_model_is_refused(tiny_artifact, tmp_path):
    stranger = save_tiny_llava(tmp_path / "stranger", seed=1)
    with pytest.raises(BadArtifact, match="states differ"):
        await HuggingFaceEngine(stranger, tiny_artifact).start()


async def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(BadArtifact, match="nowhere") as caught:
        await HuggingFaceEngine(tmp_path / "nowhere", None).start()
    assert caught.value.field == "model"
