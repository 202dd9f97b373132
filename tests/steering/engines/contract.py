"""What every engine must do: imported by each engine's test module, which brings the fixture `engine`.

The fixture is any engine on a tiny LLaVA of `tests/tiny_models.py` with its artifact.
"""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import replace
from typing import Any

import pytest

from steering.engines.base import ResponseFormat, Sampling
from steering.errors import EngineUnavailable, InvalidSteering
from steering.request import ConceptEdit
from tests.steering.engines.driving import LATER_TURN, ask, make_request, prompt_text_tokens, send
from tests.steering.engines.vllm.agreement import compare
from tests.tiny_models import drawn_image

VOCABULARY = 261


async def assert_soon_idle(engine) -> None:
    """Within two seconds nothing runs any more."""
    for _ in range(200):
        if engine.health().running == 0:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{engine.health().running} sequences still run")


async def test_controls_keep_the_size_of_the_shift_and_change_its_direction(engine):
    answers = {
        control: await ask(
            engine, steering={"control": control, "control_seed": 4}, max_tokens=1, top_logprobs=VOCABULARY
        )
        for control in ("none", "reversed", "random", "other_image")
    }
    shift = {name: answer.end.receipt.relative_shift[0] for name, answer in answers.items()}
    assert shift["reversed"] == pytest.approx(shift["none"], rel=1e-5)
    assert shift["random"] == pytest.approx(shift["none"], rel=1e-5)
    first = {name: tuple(sorted(answer.logprobs()[0].items())) for name, answer in answers.items()}
    assert len(set(first.values())) == 4
    assert answers["random"].end.receipt.control == "random"
    assert answers["random"].end.receipt.canary == "verified"
    assert answers["none"].end.receipt.control is None


async def test_choices_are_seeded_apart_and_repeatably(engine):
    first = await ask(engine, n=3, temperature=1.0, seed=11, max_tokens=16)
    again = await ask(engine, n=3, temperature=1.0, seed=11, max_tokens=16)
    other = await ask(engine, n=3, temperature=1.0, seed=99, max_tokens=16)
    texts = [first.tokens(choice) for choice in range(3)]
    assert texts == [again.tokens(choice) for choice in range(3)]
    assert texts != [other.tokens(choice) for choice in range(3)]
    assert texts[0] != texts[1]
    assert len(first.end.receipt.positions) == len(first.end.completion_tokens) == 3


async def test_a_stop_string_across_tokens_ends_the_choice_before_it(engine):
    whole = await ask(engine, max_tokens=12)
    text = whole.text()
    stop = text[4:6]
    cut = await ask(engine, max_tokens=12, stop=(stop,))
    assert cut.text() == text[: text.index(stop)]
    assert cut.finish_reasons() == {0: "stop"}
    assert whole.finish_reasons()[0] in ("length", "stop")


async def test_closing_the_stream_frees_the_slot(engine):
    stream = engine.generate(make_request(engine, max_tokens=200))
    await anext(stream)
    assert engine.health().running == 1
    await stream.aclose()
    await assert_soon_idle(engine)


async def test_choices_of_a_closed_stream_all_end(engine):
    stream = engine.generate(make_request(engine, n=3, max_tokens=200, logit_bias={257: -100.0}))
    await anext(stream)
    await stream.aclose()
    await assert_soon_idle(engine)


async def test_a_vanishing_temperature_is_greedy_and_harms_nobody(engine):
    greedy, tiny = await asyncio.gather(ask(engine), ask(engine, temperature=1e-39, seed=1))
    assert greedy.tokens() == tiny.tokens()


async def test_cancel_wakes_who_still_listens(engine):
    request = make_request(engine, max_tokens=200, logit_bias={257: -100.0})

    async def listen():
        return await send(engine, request)

    listening = asyncio.create_task(listen())
    while engine.health().running == 0:
        await asyncio.sleep(0.01)
    engine.cancel(request.request_id)
    with pytest.raises(EngineUnavailable, match="cancelled"):
        await asyncio.wait_for(listening, timeout=10)


async def test_a_second_request_under_the_id_of_one_that_is_not_over_is_refused(engine):
    request = make_request(engine, max_tokens=100, logit_bias={257: -100.0})

    async def assert_refused() -> None:
        with pytest.raises(InvalidSteering, match="running already; use another one") as caught:
            await send(engine, request)
        assert caught.value.field == "request_id"

    stream = engine.generate(request)
    first = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    await assert_refused()  # the first is being prepared
    await first
    await assert_refused()  # the first is running
    await stream.aclose()
    assert (await send(engine, replace(request, sampling=Sampling(max_tokens=2)))).finish_reasons() == {0: "length"}


@pytest.mark.parametrize("steering", [{}, {"enabled": False}, {"preset": "off"}, {"gamma": 0.7}])
async def test_explaining_changes_no_token(engine, steering):
    silent: Any = await ask(engine, steering=steering, top_logprobs=VOCABULARY, n=2)
    told: Any = await ask(engine, steering={**steering, "explain": "tokens"}, top_logprobs=VOCABULARY, n=2)
    ties = [compare(told, silent, choice)[1] for choice in range(2)]  # the second may find its prompt in a cache
    assert silent.end.receipt.explanation is None
    receipts = [
        replace(one.end.receipt, explanation=None, mismatch=None, relative_shift=[], positions=[])
        for one in (told, silent)
    ]
    assert receipts[0] == receipts[1]
    for choice in range(2):
        explanation = told.end.receipt.explanation[choice]
        assert len(explanation.tokens) == told.end.completion_tokens[choice]
        assert explanation.mismatch == told.end.receipt.mismatch[choice] == explanation.tokens[-1].mismatch
        if not silent.end.receipt.applied:
            assert explanation.mismatch.after == explanation.mismatch.before
            assert all(one.steered == one.text for one in (*explanation.image, *explanation.text))
    if not silent.end.receipt.applied:
        assert silent.end.receipt.mismatch is None
        return
    for one, other, tie in zip(silent.end.receipt.mismatch, told.end.receipt.mismatch, ties, strict=True):
        assert tie or (one.before, one.after) == pytest.approx((other.before, other.after), abs=1e-3)


async def test_edits_and_their_bound_are_told(engine):
    edit = {"strength": 0.0, "concepts": {"5": ConceptEdit(add=4.0)}, "explain": True}
    free = (await ask(engine, steering={**edit, "max_shift": 4.0})).end.receipt
    assert free.applied
    assert free.edits == {"5": ConceptEdit(factor=1.0, add=4.0)}
    assert free.clamped_positions == [0]
    bound: Any = (await ask(engine, steering={**edit, "max_shift": free.relative_shift[0] / 2})).end.receipt
    assert bound.clamped_positions == bound.positions
    assert bound.relative_shift[0] == pytest.approx(free.relative_shift[0] / 2, rel=1e-3)
    assert bound.explanation[0].mismatch.after != bound.explanation[0].mismatch.before


async def test_text_only_by_default_is_served_plain_and_says_so(engine):
    answer = await ask(engine, images=())
    assert not answer.end.receipt.applied
    assert answer.end.receipt.reason == "no_image"


async def test_images_reach_the_answer(engine):
    one = await ask(engine, images=(1,), max_tokens=1, top_logprobs=VOCABULARY)
    two = await ask(engine, images=(2,), max_tokens=1, top_logprobs=VOCABULARY)
    assert one.logprobs() != two.logprobs()
    assert drawn_image(1).tobytes() != drawn_image(2).tobytes()


async def test_a_later_turn_s_earlier_answer_is_steered_only_where_no_place_in_the_answer_is_named(engine):
    def positions(answer):
        return answer.end.receipt.min_answer_tokens, answer.end.receipt.positions[0]

    settings = {"max_tokens": 6, "logit_bias": {257: -100.0}}
    request = make_request(engine, LATER_TURN, **settings)
    assert positions(await send(engine, request)) == (None, prompt_text_tokens(request) + 5)
    for wait, steered in ((0, 6), (2, 4), (5, 1)):
        answer = await ask(engine, LATER_TURN, steering={"min_answer_tokens": wait}, **settings)
        assert positions(answer) == (wait, steered)


@pytest.mark.parametrize("ended_by", ["length", "stop"])
async def test_an_answer_that_ends_before_steering_begins_is_the_plain_one_and_says_so(engine, ended_by):
    """Also where the engine has computed ahead, behind a stop string."""
    settings = {"max_tokens": 12, "logit_bias": {257: -100.0}, "top_logprobs": VOCABULARY}
    plain = await ask(engine, steering={"enabled": False}, **settings)
    if ended_by == "stop":
        settings["stop"] = (plain.text()[4:6],)
        plain = await ask(engine, steering={"enabled": False}, **settings)
    (generated,) = plain.end.completion_tokens
    late = await ask(engine, steering={"strength": 1.0, "min_answer_tokens": generated}, **settings)
    assert (late.tokens(), late.logprobs(), late.text()) == (plain.tokens(), plain.logprobs(), plain.text())
    assert late.finish_reasons() == {0: ended_by}
    receipt = late.end.receipt
    assert (receipt.applied, receipt.reason) == (False, "no_text_position")
    assert (receipt.positions, receipt.relative_shift, receipt.min_answer_tokens) == ([0], [0.0], generated)


async def test_structured_output_follows_its_schema_steered_too(engine):
    schema = json.dumps({"type": "object", "properties": {"seen": {"type": "boolean"}}, "required": ["seen"],
                         "additionalProperties": False})  # fmt: skip
    wanted = ResponseFormat(json_schema=schema)
    for steering in ({"enabled": False}, {"strength": 1.0}, {"gamma": 0.5}):
        answer = await ask(engine, steering=steering, max_tokens=100, n=2, response_format=wanted)
        for choice in range(2):
            assert isinstance(json.loads(answer.text(choice))["seen"], bool)
            assert answer.finish_reasons()[choice] == "stop"
        assert answer.end.receipt.applied == (steering != {"enabled": False})
    anything = await ask(engine, max_tokens=60, response_format=ResponseFormat())
    assert anything.text().startswith("{")


async def test_logprobs_are_those_of_what_the_grammar_allows(engine):
    wanted = ResponseFormat(json_schema='{"enum": ["a", "b"]}')
    answer = await ask(engine, max_tokens=100, top_logprobs=VOCABULARY, response_format=wanted)
    quote, letter, *_ = answer.logprobs()
    assert sorted(quote.values())[-2:] == [-9999.0, 0.0]
    possible = [logprob for logprob in letter.values() if logprob > -9999.0]
    assert len(possible) == 2
    assert sum(math.exp(logprob) for logprob in possible) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "multipleOf": 7},
        {"type": "array", "uniqueItems": True},
        {"type": "string", "pattern": "(?<=a)b"},
        {"type": "object", "properties": {"a": False}, "required": ["a"]},
        {"$ref": "#"},
        {"type": "string", "pattern": "^((a{0,30}){0,30}){0,30}$"},
    ],
    ids=str,
)
async def test_a_schema_that_cannot_be_followed_is_refused_and_harms_nobody(engine, schema, monkeypatch):
    monkeypatch.setattr("steering.engines.grammar_trial.CPU_S", 1.0)
    with pytest.raises(InvalidSteering) as caught:
        await ask(engine, max_tokens=10, response_format=ResponseFormat(json_schema=json.dumps(schema)))
    assert caught.value.field == "response_format.json_schema.schema"
    assert (await ask(engine, max_tokens=2, logit_bias={257: -100.0})).finish_reasons() == {0: "length"}


async def test_plausibility_leaves_a_grammar_something_to_choose(engine):
    """What the base branch favours is not what the grammar allows: with all others at -inf nothing would be left."""
    for plausibility in (0.8, 1.0):
        answer = await ask(
            engine, steering={"plausibility": plausibility}, max_tokens=100,
            response_format=ResponseFormat(json_schema='{"type": "boolean"}'),
        )  # fmt: skip
        assert json.loads(answer.text()) in (True, False)
        assert answer.end.receipt.applied


async def test_what_cannot_be_done_is_refused_with_the_field(engine):
    async def refusal(**kwargs):
        with pytest.raises(InvalidSteering) as caught:
            await ask(engine, **kwargs)
        return caught.value.field

    assert await refusal(images=(), steering={"strength": 0.5}) == "steering"
    assert await refusal(steering={"preset": "nonsense"}) == "steering.preset"
    assert await refusal(images=(), steering={"explain": True}) == "steering.explain"
    for key in ("cat", "-1", "9999", "1" * 30, "٣"):
        assert await refusal(steering={"concepts": {key: ConceptEdit(factor=0.0)}}) == "steering.concepts"
    twice = {"7": ConceptEdit(factor=0.0), "07": ConceptEdit(factor=2.0)}
    assert await refusal(steering={"concepts": twice}) == "steering.concepts"
    assert await refusal(text="y" * 400) == "messages"
    assert await refusal(max_tokens=250) == "max_tokens"
