"""The contract through LangChain's `ChatOpenAI`."""

from __future__ import annotations

import base64
from typing import Any

import openai
import pytest
from langchain_core.exceptions import ModelInvalidRequestError
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from tests.service.clients.seen import ENOUGH_TOKENS, ITS_ERROR, NO_TOOLS, PICTURE_PNG, TOO_STRONG, Seen, options, page
from tests.service.running_server import RunningServer

pytestmark = [pytest.mark.service, pytest.mark.slow]
STEERING, SCHEMA, RECEIPT = page("LangChain")
PICTURE_PART = {"type": "image", "base64": base64.b64encode(PICTURE_PNG).decode(), "mime_type": "image/png"}
QUESTION = HumanMessage([PICTURE_PART, {"type": "text", "text": "Describe the picture ."}])


def model(server: RunningServer, alias: str = "", **changes: Any) -> ChatOpenAI:
    common = {"max_retries": 0, "temperature": 0, "max_tokens": ENOUGH_TOKENS, **changes}
    return ChatOpenAI(base_url=f"{server.url}/v1", api_key=SecretStr("unused"), model=server.name + alias, **common)


def test_an_answer_and_the_same_streamed(server: RunningServer) -> None:
    chat = model(server, stream_usage=True)
    answer = chat.invoke([SystemMessage("be brief"), QUESTION])
    assert answer.text
    chunks = list(chat.stream([SystemMessage("be brief"), QUESTION]))
    assert "".join(chunk.text for chunk in chunks) == answer.text
    assert len(chunks) > 3
    assert isinstance(answer, AIMessage)
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] > 0
    [usage] = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert usage["output_tokens"] == answer.usage_metadata["output_tokens"]
    assert chat.invoke([QUESTION, answer, HumanMessage("And now ?")]).text


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")  # its own
def test_an_answer_by_a_schema(server: RunningServer) -> None:
    structured = model(server).with_structured_output(Seen, **options(SCHEMA))
    seen = structured.invoke([QUESTION])
    assert isinstance(seen, Seen)
    assert list(structured.stream([QUESTION]))[-1] == seen


def test_steering_and_no_receipt(server: RunningServer) -> None:
    """It keeps nothing of an answer that it does not know, so nothing of the receipt; what it can do is ask a model
    that is steered or an error."""
    text = HumanMessage("hello")
    assert model(server, **options(STEERING)).invoke([QUESTION]).text
    with pytest.raises(ModelInvalidRequestError, match="no image"):
        model(server, **options(STEERING)).invoke([text])
    for message in (model(server).invoke([QUESTION]), list(model(server).stream([QUESTION]))[-1]):
        assert "relative_shift" not in repr(message)
    assert RECEIPT == "llava:steered"
    assert model(server, ":steered").invoke([QUESTION]).text
    with pytest.raises(ModelInvalidRequestError, match="no image"):
        model(server, ":steered").invoke([text])


def test_errors_are_its_own(server: RunningServer) -> None:
    chat = model(server, extra_body=TOO_STRONG)
    for ask in (lambda: chat.invoke([QUESTION]), lambda: list(chat.stream([QUESTION]))):
        with pytest.raises(ModelInvalidRequestError, match=ITS_ERROR) as caught:
            ask()
        assert isinstance(caught.value, openai.BadRequestError)
        assert (caught.value.param, caught.value.code) == ("steering.strength", "invalid_value")


def test_tools_are_refused(server: RunningServer) -> None:
    with pytest.raises(ModelInvalidRequestError, match=NO_TOOLS):
        model(server).with_structured_output(Seen, method="function_calling").invoke([QUESTION])
    with pytest.raises(ModelInvalidRequestError, match=NO_TOOLS):
        model(server).bind_tools([Seen]).invoke([QUESTION])
