"""Explanations and edits of the reference engine against the equations, computed densely from whole forward passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from steering.artifact import load_artifact
from steering.lvlm.token_spans import expand_image_tokens
from steering.request import ConceptEdit
from steering.settings import resolve
from tests.steering.engines.driving import ask, make_request, send
from tests.steering.reference import explained, next_token_logprobs

VOCABULARY = 261
EDITS = {"3": ConceptEdit(factor=0.0), "17": ConceptEdit(add=1.5), "40": ConceptEdit(factor=2.0, add=-0.5)}


@pytest.fixture(scope="module")
def plain(tiny_llava, tiny_artifact):
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval(), AutoProcessor.from_pretrained(tiny_llava), load_artifact(tiny_artifact)


def known(plain, request):
    """Settings, expanded prompt, pixels."""
    model, processor, artifact = plain
    settings = resolve(request.steering, presets=artifact.config.presets, default_preset="captions", has_image=True)
    pixels = processor.image_processor(images=list(request.images), return_tensors="pt")["pixel_values"]
    prompt = expand_image_tokens(request.prompt_token_ids, model.config.image_token_id, [4] * len(request.images))
    return settings, prompt, pixels


def assert_told(concepts, want, code, number):
    """The strongest of a code, with what each of the three codes holds of it."""
    strongest = want[code].sort(descending=True, stable=True).values[:number]
    assert len(concepts) == int((strongest > 0).sum())
    for one, activation in zip(concepts, strongest, strict=False):
        assert want[code][one.id] == pytest.approx(float(activation), abs=1e-5)
        for name in ("image", "text", "steered"):
            assert getattr(one, name) == pytest.approx(float(want[name][one.id]), abs=1e-5)


@pytest.mark.parametrize(
    "steering",
    [
        {"form": "difference", "strength": 0.7, "alpha": 1.5, "beta_up": 0.9, "beta_down": 0.4},
        {"form": "published", "strength": 1.0, "alpha": 0.8, "mode": "exact"},
        {"enabled": False},
        {"strength": 0.5, "concepts": EDITS},
    ],
    ids=["difference", "published, exact", "off", "edited"],
)
async def test_what_is_told_follows_from_the_equations(engine, plain, steering):
    request = make_request(engine, images=(3, 4), steering={**steering, "explain": "tokens"})
    answer: Any = await send(engine, request)
    settings, prompt, pixels = known(plain, request)
    told, tokens = answer.end.receipt.explanation[0], answer.tokens()
    assert len(told.tokens) == answer.end.completion_tokens[0] > 3
    for place, of_token in enumerate(told.tokens):
        want = explained(plain[0], plain[2], settings, prompt, tokens[:place], pixels)
        assert of_token.mismatch.before == pytest.approx(want["before"], abs=1e-5)
        assert of_token.mismatch.after == pytest.approx(want["after"], abs=1e-5)
        assert_told(of_token.text, want, "text", 3)
    assert_told(told.image, want, "image", 10)
    assert_told(told.text, want, "text", 10)
    assert told.mismatch == told.tokens[-1].mismatch


@pytest.mark.parametrize("mode", ["causal", "exact"])
@pytest.mark.parametrize("max_shift", [4.0, 0.05])
async def test_edited_answers_follow_from_the_equations(engine, plain, mode, max_shift):
    asked = {"form": "difference", "mode": mode, "strength": 0.5, "concepts": EDITS, "max_shift": max_shift}
    request = make_request(engine, steering=asked, top_logprobs=VOCABULARY, max_tokens=6)
    answer = await send(engine, request)
    settings, prompt, pixels = known(plain, request)
    generated: list[int] = []
    for token, logprobs in zip(answer.tokens(), answer.logprobs(), strict=True):
        want = next_token_logprobs(plain[0], plain[2], settings, prompt, generated, pixels, 1)
        got = torch.tensor([logprobs[index] for index in range(VOCABULARY)])
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
        generated.append(token)
    assert (answer.end.receipt.clamped_positions[0] > 0) == (max_shift < 1)


@pytest.mark.parametrize("steering", [{}, {"enabled": False}, {"mode": "exact"}])
async def test_explaining_changes_no_bit(engine, steering):
    silent = await ask(engine, steering=steering, top_logprobs=VOCABULARY)
    told = await ask(engine, steering={**steering, "explain": "tokens"}, top_logprobs=VOCABULARY)
    assert told.logprobs() == silent.logprobs()


async def test_edits_stand_alone_where_the_dial_is_at_zero(engine):
    edit = {"concepts": {"5": ConceptEdit(add=2.0)}}
    alone = await ask(engine, steering={**edit, "strength": 0.0}, top_logprobs=VOCABULARY)
    under_off = await ask(engine, steering={**edit, "preset": "off"}, top_logprobs=VOCABULARY)
    plain = await ask(engine, steering={"enabled": False}, top_logprobs=VOCABULARY)
    assert alone.end.receipt.applied
    assert alone.logprobs()[0] == under_off.logprobs()[0] != plain.logprobs()[0]
