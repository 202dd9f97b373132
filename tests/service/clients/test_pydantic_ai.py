"""The contract through pydantic-ai's `OpenAIChatModel`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from pydantic_ai import Agent, BinaryContent, NativeOutput
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.service.clients.seen import ENOUGH_TOKENS, ITS_ERROR, NO_TOOLS, PICTURE_PNG, TOO_STRONG, Seen, options, page
from tests.service.running_server import RunningServer

pytestmark = [pytest.mark.service, pytest.mark.slow]
STEERING, SCHEMA, RECEIPT = page("pydantic-ai")
QUESTION = [BinaryContent(PICTURE_PNG, media_type="image/png"), "Describe the picture ."]


@pytest.fixture
async def model(server: RunningServer) -> AsyncIterator[OpenAIChatModel]:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        settings: Any = {"temperature": 0, "max_tokens": ENOUGH_TOKENS}
        yield OpenAIChatModel(server.name, provider=OpenAIProvider(openai_client=client), settings=settings)


async def test_an_answer_and_the_same_streamed(model: OpenAIChatModel) -> None:
    agent = Agent(model, instructions="be brief")
    answer = await agent.run(QUESTION)
    assert answer.output
    async with agent.run_stream(QUESTION) as stream:
        pieces = [piece async for piece in stream.stream_text(delta=True, debounce_by=None)]
    assert "".join(pieces) == answer.output
    assert len(pieces) > 3
    assert stream.response.usage.output_tokens == answer.response.usage.output_tokens > 0
    assert (await agent.run("And now ?", message_history=answer.all_messages())).output


async def test_an_answer_by_a_schema(model: OpenAIChatModel) -> None:
    agent: Agent[None, Seen] = Agent(model, **options(SCHEMA, NativeOutput=NativeOutput, Seen=Seen))
    seen = (await agent.run(QUESTION)).output
    assert isinstance(seen, Seen)
    async with agent.run_stream(QUESTION) as stream:
        assert [partly async for partly in stream.stream_output(debounce_by=None)][-1] == seen


async def test_steering_and_the_receipt(model: OpenAIChatModel) -> None:
    agent = Agent(model, **options(STEERING))
    receipt = eval(RECEIPT, {"answer": await agent.run(QUESTION)})
    assert (receipt["applied"], receipt["strength"]) == (True, 0.8)
    async with agent.run_stream(QUESTION) as stream:
        await stream.get_output()
    details = stream.response.provider_details or {}
    assert [chunk["response"]["steering"] for chunk in details["unmapped"]["chunks"]] == [receipt]


async def test_errors_are_its_own(model: OpenAIChatModel) -> None:
    agent = Agent(model, model_settings={"extra_body": TOO_STRONG})
    with pytest.raises(ModelHTTPError, match=ITS_ERROR) as whole:
        await agent.run(QUESTION)
    with pytest.raises(ModelHTTPError, match=ITS_ERROR) as streamed:
        async with agent.run_stream(QUESTION):
            pass
    for error in (whole.value, streamed.value):
        assert error.status_code == 400
        assert isinstance(error.body, dict)
        assert (error.body["param"], error.body["code"]) == ("steering.strength", "invalid_value")


async def test_tools_are_refused(model: OpenAIChatModel) -> None:
    """It asks for a tool wherever an output type has no mode of its own."""
    with pytest.raises(ModelHTTPError, match=NO_TOOLS):
        await Agent(model, output_type=Seen).run(QUESTION)
