"""Off is plain vLLM, to the last bit: same settings and batch composition, with and without steered neighbours."""

from __future__ import annotations

import pytest
import pytest_asyncio

from tests.steering.engines.driving import Answer, make_request
from tests.steering.engines.vllm.agreement import VOCABULARY
from tests.steering.engines.vllm.conftest import running_engine
from tests.steering.engines.vllm.conversations import in_one_step

OFF = {"enabled": False}
NEIGHBOURS = [{"strength": 1.0}, {"strength": 0.5, "form": "union"}, {"gamma": 0.5}, {"plausibility": 0.3}]


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=["first runner", "second runner"])
async def pair(request, tiny_models, engine, second_runner_engine):
    """A steered engine, and vLLM without our model class on the same runner."""
    second = request.param == "second runner"
    steered = second_runner_engine if second else engine
    async with running_engine(tiny_models["mha"], steered=False, second_runner=second) as plain:
        yield steered, plain


async def in_one_batch(engine, settings: list[dict]) -> list[Answer]:
    """All admitted in one step and of one length, so that every step has the same rows in every engine."""
    requests = [
        make_request(
            engine, f"{index} of them", (index,), chosen, max_tokens=12, top_logprobs=VOCABULARY,
            logit_bias={257: -100.0},
        )
        for index, chosen in enumerate(settings)
    ]  # fmt: skip
    return await in_one_step(engine, requests)


@pytest.mark.parametrize("neighbours", [[OFF] * 4, NEIGHBOURS], ids=["off neighbours", "steered neighbours"])
async def test_an_off_row_has_plain_vllm_s_bits(pair, neighbours):
    engine, plain = pair
    expected = await in_one_batch(plain, [OFF] * 8)
    answers = await in_one_batch(engine, [OFF, *neighbours, OFF, {"strength": 0.0}, OFF])
    for index in (0, 5, 6, 7):
        assert answers[index].logprobs() == expected[index].logprobs()
        assert answers[index].tokens() == expected[index].tokens()
    for index in range(1, 5):
        assert (answers[index].logprobs() == expected[index].logprobs()) == (neighbours[0] == OFF)
