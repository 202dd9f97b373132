"""The engine's contract on vLLM, and what is vLLM's own: structured output, parameters, who may run."""

from __future__ import annotations

import asyncio

import pytest

from steering.engines.base import ResponseFormat
from steering.engines.vllm.engine import VllmEngine
from steering.engines.vllm.plugin.wire import EXTRA_ARG
from steering.errors import EngineUnavailable, InvalidSteering
from tests.steering.engines.contract import *  # noqa: F403 - the tests every engine must pass
from tests.steering.engines.driving import ask, make_request, send
from tests.steering.engines.vllm.agreement import VOCABULARY, compare


async def test_capabilities_tell_what_the_engine_can(engine):
    capabilities = engine.capabilities()
    assert (capabilities.engine, capabilities.model_family) == ("vllm", "llava")
    assert capabilities.modes == ("causal",)
    assert capabilities.branches == (1, 2)
    assert capabilities.context_tokens == 256


async def test_mode_exact_is_refused(engine):
    with pytest.raises(InvalidSteering, match="causal") as caught:
        await ask(engine, steering={"mode": "exact"})
    assert caught.value.field == "steering.mode"


async def test_a_zero_delta_is_not_called_steering(engine):
    nothing = {"strength": 1.0, "form": "difference", "beta_up": 0.0, "beta_down": 0.0}
    answer, off = await ask(engine, steering=nothing), await ask(engine, steering={"enabled": False})
    assert answer.tokens() == off.tokens()
    assert (answer.end.receipt.applied, answer.end.receipt.reason) == (False, "delta_0")


async def test_a_schema_that_only_vllm_cannot_compile_is_named(engine):
    """Its compiler keeps rules of other grammars and loses this one's."""
    schema = '{"type": "string", "pattern": "^a{300}$"}'
    with pytest.raises(InvalidSteering) as caught:
        await ask(engine, max_tokens=10, response_format=ResponseFormat(json_schema=schema))
    assert caught.value.field == "response_format.json_schema.schema"


async def test_choices_share_a_request_and_each_has_its_receipt(engine, reference):
    settings = {"n": 3, "max_tokens": 6, "top_logprobs": VOCABULARY, "steering": {"gamma": 0.7}}
    answer, expected = await ask(engine, "three times", **settings), await ask(reference, "three times", **settings)
    assert answer.end.receipt.positions == expected.end.receipt.positions
    assert len(set(answer.end.receipt.positions)) == 1
    assert answer.end.receipt.positions[0] > 6
    for choice in range(3):
        compare(answer, expected, choice)


async def test_cancelled_before_its_first_step(engine):
    request = make_request(engine, max_tokens=100)
    listening = asyncio.create_task(send(engine, request))
    await asyncio.sleep(0)
    engine.cancel(request.request_id)
    with pytest.raises(EngineUnavailable, match="cancelled"):
        await asyncio.wait_for(listening, timeout=10)
    assert await engine.vllm.collective_rpc("count_steered_sequences") == [0]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ('{"id": "a", "scale": 9}', "vl_sae.scale"),
        ('{"id": "a", "scale": "1"}', "vl_sae.scale"),
        ('{"id": "a", "scale": NaN}', "vl_sae.scale"),
        ('{"id": "a", "beta_up": -0.1}', "vl_sae.beta_up"),
        ('{"id": "a", "gamma": 1.5}', "vl_sae.gamma"),
        ('{"id": "a", "form": "sideways"}', "vl_sae.form"),
        ('{"id": "a", "control_seed": 1.5}', "vl_sae.control_seed"),
        ('{"id": "a", "min_answer_tokens": -1}', "vl_sae.min_answer_tokens"),
        ('{"id": "a", "concepts": {}}', "vl_sae.concepts"),
        ('{"scale": 1}', "vl_sae.id"),
        ("{", "vl_sae"),
        ("[1]", "vl_sae"),
        (3, "vl_sae"),
        ({"id": "a", "plausibility": 2}, "vl_sae.plausibility"),
    ],
)
async def test_vllm_s_own_extra_args_are_checked(engine, given, named):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    prompt = {"prompt_token_ids": [1, 2, 3]}
    parameters = SamplingParams(max_tokens=1, detokenize=False, extra_args={EXTRA_ARG: given})
    with pytest.raises(VLLMValidationError, match=f"^{named}: "):
        async for _ in engine.vllm.generate(prompt, parameters, "bad"):
            pass


async def test_an_engine_that_is_not_running_says_so(tiny_models):
    engine = VllmEngine(tiny_models["mha"].model, tiny_models["mha"].artifact)
    with pytest.raises(EngineUnavailable, match="not running"):
        _ = engine.vllm
    assert not engine.health().alive
