"""The contract through instructor, around OpenAI's client."""

from __future__ import annotations

from typing import Any

import instructor
import openai
import pydantic
import pytest
from instructor import Mode
from instructor.core.exceptions import IncompleteOutputException, InstructorRetryException

from tests.service.asking import QUESTION, joined, text
from tests.service.clients.seen import ENOUGH_TOKENS, ITS_ERROR, NO_TOOLS, PICTURE_URL, TOO_STRONG, Seen, options, page
from tests.service.running_server import RunningServer

pytestmark = [pytest.mark.service, pytest.mark.slow]
STEERING, SCHEMA, RECEIPT = page("instructor")


def completions(server: RunningServer, **mode: Any) -> Any:
    """The table's mode, unless told otherwise."""
    client = instructor.from_openai(server.client(), **(mode or options(SCHEMA, Mode=Mode)))
    return client.chat.completions


def asked(server: RunningServer, **changes: Any) -> dict[str, Any]:
    fixed = {"model": server.name, "temperature": 0, "max_tokens": ENOUGH_TOKENS, "messages": [QUESTION]}
    return {**fixed, "response_model": Seen, "max_retries": 0, **changes}


def test_an_answer_and_the_same_streamed(server: RunningServer) -> None:
    """Without a model it is OpenAI's client."""
    free = asked(server, response_model=None)
    answer = completions(server).create(**free)
    assert text(answer)
    assert joined(list(completions(server).create(stream=True, **free))) == text(answer)


def test_an_answer_by_a_schema(server: RunningServer) -> None:
    seen = completions(server).create(**asked(server))
    assert isinstance(seen, Seen)
    partly = list(completions(server).create_partial(**asked(server)))
    assert partly[-1].model_dump() == seen.model_dump()
    picture = instructor.Image.from_base64(PICTURE_URL)
    in_its_words = [{"role": "user", "content": [picture, "Describe the picture ."]}]
    assert completions(server).create(**asked(server, messages=in_its_words)).model_dump() == seen.model_dump()
    with pytest.raises(IncompleteOutputException):
        completions(server).create(**asked(server, max_tokens=3))


def test_it_asks_again_where_a_validator_objects(server: RunningServer) -> None:
    """With the answer and the objection as further turns."""
    looks = []

    class Picky(Seen):
        @pydantic.field_validator("shape")
        @classmethod
        def _second_look(cls, shape: str) -> str:
            looks.append(shape)
            if len(looks) == 1:
                raise ValueError("look again")
            return shape

    assert isinstance(completions(server).create(**asked(server, response_model=Picky, max_retries=1)), Picky)
    assert len(looks) == 2


def test_steering_and_the_receipt(server: RunningServer) -> None:
    seen, answer = completions(server).create_with_completion(**asked(server), **options(STEERING))
    receipt = eval(RECEIPT, {"answer": answer})
    assert isinstance(seen, Seen)
    assert (receipt["applied"], receipt["strength"]) == (True, 0.8)


@pytest.mark.parametrize("streamed", [False, True])
def test_errors_are_its_own(server: RunningServer, streamed: bool) -> None:
    ask = completions(server).create_partial if streamed else completions(server).create
    with pytest.raises(InstructorRetryException, match=ITS_ERROR) as caught:
        list(ask(**asked(server, extra_body=TOO_STRONG)))
    cause = caught.value.__cause__
    assert isinstance(cause, openai.BadRequestError)
    assert (cause.param, cause.code) == ("steering.strength", "invalid_value")


def test_tools_are_refused(server: RunningServer) -> None:
    with pytest.raises(InstructorRetryException, match=NO_TOOLS):
        completions(server, mode=Mode.TOOLS).create(**asked(server))
