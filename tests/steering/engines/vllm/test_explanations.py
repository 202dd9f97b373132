"""Explanations and edits inside vLLM: the reference engine's, on both runners, from a cache, and of plain answers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from steering.request import ConceptEdit
from tests.steering.engines.driving import ask
from tests.steering.engines.vllm.agreement import VOCABULARY, compare

EDITS = {"3": ConceptEdit(factor=0.0), "17": ConceptEdit(add=1.5), "40": ConceptEdit(factor=2.0, add=-0.5)}
ASKED = [
    {"strength": 0.6},
    {"enabled": False},
    {"strength": 0.5, "concepts": EDITS, "max_shift": 4.0},
    {"strength": 0.5, "concepts": EDITS, "max_shift": 0.05},
    {"strength": 0.8, "form": "union", "gamma": 0.7},
]


def assert_same(told, expected) -> None:
    assert told.mismatch.before == pytest.approx(expected.mismatch.before, abs=1e-4)
    assert told.mismatch.after == pytest.approx(expected.mismatch.after, abs=1e-4)
    for name in ("image", "text"):
        assert_same_concepts(getattr(told, name), getattr(expected, name))
    assert (told.tokens is None) == (expected.tokens is None)
    for one, other in zip(told.tokens or (), expected.tokens or (), strict=True):
        assert one.mismatch.before == pytest.approx(other.mismatch.before, abs=1e-4)
        assert_same_concepts(one.text, other.text)


def assert_same_concepts(told, expected) -> None:
    """Equal strengths in order; who is equally strong may stand in another order."""
    assert [one.text for one in told] == pytest.approx([one.text for one in expected], abs=1e-4)
    of = {one.id: one for one in expected}
    shared = [one for one in told if one.id in of]
    assert len(shared) >= len(told) - 1
    for one in shared:
        assert (one.image, one.steered) == pytest.approx((of[one.id].image, of[one.id].steered), abs=1e-4)


@pytest.mark.parametrize("how", ["answer", "tokens"])
@pytest.mark.parametrize("steering", ASKED, ids=["steered", "off", "edited", "clamped", "two branches"])
async def test_what_is_told_is_the_reference_engine_s(either_engine, reference, steering, how):
    asked = {
        "steering": {**steering, "explain": how},
        "top_logprobs": VOCABULARY,
        "images": (3, 4),
        "text": f"what {how}?",
    }
    expected: Any = await ask(reference, **asked)
    answers: list[Any] = [
        await ask(either_engine, **asked),
        await ask(either_engine, **asked),
    ]  # the second from the cache
    clamped = expected.end.receipt.clamped_positions
    assert answers[0].end.receipt.clamped_positions == clamped
    assert (answers[1].end.receipt.clamped_positions[0] > 0) == (clamped[0] > 0)  # those of the cache do not count
    for answer in answers:
        _, tie = compare(answer, expected)
        if not tie:
            assert_same(answer.end.receipt.explanation[0], expected.end.receipt.explanation[0])


async def test_an_answer_that_a_stop_string_ended_is_told_at_its_end(either_engine, reference):
    asked = {"text": "and now?", "steering": {"explain": True, "strength": 0.3}, "max_tokens": 40}
    whole = (await ask(reference, **asked)).text()
    asked |= {"stop": (whole[4:6],), "top_logprobs": VOCABULARY}
    answer: Any = await ask(either_engine, **asked)
    expected: Any = await ask(reference, **asked)
    _, tie = compare(answer, expected)
    assert not tie
    assert_same(answer.end.receipt.explanation[0], expected.end.receipt.explanation[0])


async def test_neighbours_are_told_of_themselves(engine, reference):
    each = [{"steering": {"explain": how, "strength": 0.1 * n}, "images": (n,), "top_logprobs": VOCABULARY}
            for n, how in enumerate(["tokens", True, None, "tokens"], start=1)]  # fmt: skip
    answers: list[Any] = await asyncio.gather(*(ask(engine, **one) for one in each))
    for answer, one in zip(answers, each, strict=True):
        expected: Any = await ask(reference, **one)
        _, tie = compare(answer, expected)
        if tie or one["steering"]["explain"] is None:
            continue
        assert_same(answer.end.receipt.explanation[0], expected.end.receipt.explanation[0])
