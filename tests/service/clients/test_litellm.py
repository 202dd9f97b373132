"""The contract through LiteLLM."""

from __future__ import annotations

from typing import Any

import litellm
import pytest

from tests.service.asking import QUESTION
from tests.service.clients.seen import ENOUGH_TOKENS, ITS_ERROR, NO_TOOLS, TOO_STRONG, Seen, options, page
from tests.service.running_server import RunningServer

pytestmark = [
    pytest.mark.service,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince211"),  # its own
]
STEERING, SCHEMA, RECEIPT = page("LiteLLM")
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def complete(server: RunningServer, *turns: Any, **changes: Any) -> Any:
    """A LiteLLM provider's name stands before the model's."""
    fixed = {"api_base": f"{server.url}/v1", "api_key": "unused", "max_retries": 0, "temperature": 0}
    asked = {"messages": turns or (QUESTION,), "max_tokens": ENOUGH_TOKENS, **changes}
    return litellm.completion(model=f"openai/{server.name}", **{**fixed, **asked, "messages": [*asked["messages"]]})


def joined(chunks: list) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def test_an_answer_and_the_same_streamed(server: RunningServer) -> None:
    answer = complete(server)
    said = answer.choices[0].message
    assert said.content
    chunks = list(complete(server, stream=True, stream_options={"include_usage": True}))
    assert joined(chunks) == said.content
    assert len(chunks) > 3
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    built = litellm.stream_chunk_builder(chunks)
    assert built is not None
    assert built.choices[0].message.content == said.content  # pyright: ignore[reportAttributeAccessIssue]


def test_its_own_answer_may_be_sent_back(server: RunningServer) -> None:
    said = complete(server).choices[0].message
    assert said.provider_specific_fields, "a field that nobody else has"
    for turn in (said, said.model_dump()):
        assert complete(server, QUESTION, turn, {"role": "user", "content": "And now ?"}).choices[0].message.content


def test_an_answer_by_a_schema(server: RunningServer) -> None:
    asked = options(SCHEMA, Seen=Seen)
    seen = Seen.model_validate_json(complete(server, **asked).choices[0].message.content)
    assert Seen.model_validate_json(joined(list(complete(server, stream=True, **asked)))) == seen


def test_steering_and_the_receipt(server: RunningServer) -> None:
    answer = complete(server, **options(STEERING))
    receipt = eval(RECEIPT, {"answer": answer})
    assert (receipt["applied"], receipt["strength"]) == (True, 0.8)
    chunks = list(complete(server, stream=True, **options(STEERING)))
    assert chunks[-1].steering == receipt
    assert not any(hasattr(chunk, "steering") for chunk in chunks[:-1])
    # with usage, the last chunk has no choice, and of such a chunk it keeps the usage only
    counted = list(complete(server, stream=True, stream_options={"include_usage": True}, **options(STEERING)))
    assert not any(hasattr(chunk, "steering") for chunk in counted)


@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_its_own(server: RunningServer, stream: bool) -> None:
    """With our message; what it does not keep is `param` and `code`."""
    with pytest.raises(litellm.BadRequestError, match=ITS_ERROR) as caught:  # pyright: ignore
        list(complete(server, stream=stream, extra_body=TOO_STRONG))
    assert caught.value.status_code == 400
    assert caught.value.param is None


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_tools_are_refused(server: RunningServer, choice: str) -> None:
    with pytest.raises(litellm.BadRequestError, match=NO_TOOLS):  # pyright: ignore
        complete(server, tools=[TOOL], tool_choice=choice)
