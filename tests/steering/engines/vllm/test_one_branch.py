"""An engine that builds no second tail: what it serves, what it refuses, and that its hook can be taken off."""

from __future__ import annotations

from dataclasses import replace

import pytest
import pytest_asyncio

from steering.errors import InvalidSteering
from steering.request import SteeringRequest, merge_sources
from tests.steering.engines.driving import ask, make_request, send
from tests.steering.engines.vllm.agreement import VOCABULARY, assert_agree
from tests.steering.engines.vllm.conftest import running_engine


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def one_branch(tiny_models):
    async with running_engine(tiny_models["mha"], branches=1) as engine:
        yield engine


async def test_one_branch_serves_what_needs_one(one_branch, reference):
    settings = {"max_tokens": 8, "top_logprobs": VOCABULARY}
    for steering in ({"strength": 1.0}, {"enabled": False}):
        answer = await ask(one_branch, steering=steering, **settings)
        expected = await ask(reference, steering=steering, **settings)
        assert_agree([answer], [expected])


@pytest.mark.parametrize(
    ("steering", "field"),
    [({"gamma": 0.5}, "steering.gamma"), ({"plausibility": 0.1}, "steering.plausibility")],
)
async def test_one_branch_refuses_what_needs_two(one_branch, steering, field):
    assert one_branch.capabilities().branches == (1,)
    with pytest.raises(InvalidSteering, match="second") as caught:
        await ask(one_branch, steering=steering)
    assert caught.value.field == field


async def test_a_default_preset_that_needs_two_is_left_out_and_said_so(one_branch):
    server = SteeringRequest(preset="paper_pope")
    request = replace(make_request(one_branch), steering=merge_sources(server=(server,)))
    answer = await send(one_branch, request)
    assert (answer.end.receipt.applied, answer.end.receipt.reason) == (False, "unsupported")


async def test_one_branch_needs_less_memory_for_keys_and_values(one_branch, engine):
    blocks = [each.vllm.vllm_config.cache_config.num_gpu_blocks for each in (one_branch, engine)]
    assert blocks[0] > blocks[1]


async def test_detaching_the_hook_turns_applied_false(one_branch):
    """Last of this engine's tests: there is no way back."""
    before = await ask(one_branch, "detached", steering={"strength": 1.0})
    await one_branch.detach_hook()
    after = await ask(one_branch, "detached", steering={"strength": 1.0})
    plain = await ask(one_branch, "detached", steering={"strength": 0.0})
    assert before.end.receipt.applied
    assert (after.end.receipt.applied, after.end.receipt.reason) == (False, "hook_detached")
    assert after.end.receipt.positions == [0]
    assert after.tokens() == plain.tokens()
