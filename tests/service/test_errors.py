"""The error table: statuses, OpenAI's shape, and paths as a client writes them."""

from __future__ import annotations

import copy
import json

import httpx2  # what the client is made of
import openai
import pytest

from service.errors import (
    AGAIN_IS_NO_USE,
    ERROR_KINDS,
    LATER,
    ApiError,
    field_path,
    from_steering_error,
)
from steering.errors import BadArtifact, EngineUnavailable, InvalidSteering
from tests.pages import read, sections


@pytest.mark.parametrize("code", ERROR_KINDS)
def test_every_kind_has_openai_s_shape(code: str) -> None:
    response = ApiError(code, "what to do", param="field").response()
    error = json.loads(bytes(response.body))["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["message"], error["param"], error["code"]) == ("what to do", "field", code)
    assert response.status_code == ERROR_KINDS[code].status


@pytest.mark.parametrize("code", ERROR_KINDS)
def test_retry_after_exactly_where_trying_again_helps(code: str) -> None:
    status = ERROR_KINDS[code].status
    assert ("retry-after" in ApiError(code, "").response().headers) == (status in (429, 503))


@pytest.mark.parametrize("code", [code for code, kind in ERROR_KINDS.items() if kind.status == 503])
def test_openai_s_clients_repeat_only_what_may_be_answered(code: str) -> None:
    calls = 0

    def refuse(_request: httpx2.Request) -> httpx2.Response:
        nonlocal calls
        calls += 1
        refusal = ApiError(code, "no", retry_after_s=0.0).response()
        return httpx2.Response(refusal.status_code, headers=dict(refusal.headers), content=bytes(refusal.body))

    client = openai.OpenAI(
        base_url="http://test/v1", api_key="any", http_client=httpx2.Client(transport=httpx2.MockTransport(refuse))
    )
    with pytest.raises(openai.InternalServerError):
        client.models.list()
    assert calls == (1 if code in AGAIN_IS_NO_USE else 1 + client.max_retries)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InvalidSteering("no image", field="steering"), 400, "invalid_steering"),
        (InvalidSteering("no such preset", field="steering.preset"), 400, "invalid_steering"),
        (InvalidSteering("too long", field="messages"), 400, "invalid_value"),
        (BadArtifact("of another model", field="artifact"), 503, "bad_artifact"),
        (EngineUnavailable("stopping"), 503, "engine_unavailable"),
    ],
)
def test_the_library_s_families(error, status: int, code: str) -> None:
    answer = from_steering_error(error)
    assert (answer.status, answer.code, answer.param, answer.message) == (status, code, error.field, error.message)


def test_survives_the_way_between_processes() -> None:
    error = copy.copy(ApiError("invalid_value", "n: too many", param="n"))
    assert (error.code, error.message, error.param) == ("invalid_value", "n: too many", "n")


def test_field_path() -> None:
    assert (
        field_path(("messages", 0, "<user>", "content", "<parts>", 2, "<text>", "text"))
        == "messages[0].content[2].text"
    )
    assert field_path(("logit_bias", "12", "[key]")) == "logit_bias.12"
    assert field_path(()) is None
    assert len(field_path(("x" * 5000,)) or "") == 200


@pytest.mark.parametrize("code", ERROR_KINDS)
def test_whether_to_wait_is_what_the_header_says(code: str) -> None:
    headers = ApiError(code, "").headers()
    assert (ERROR_KINDS[code].retry == LATER) == ("Retry-After" in headers and "x-should-retry" not in headers)


def test_the_service_s_page_has_the_table() -> None:
    """By status."""
    rows = ["| status | `code` | when | what to do | again? |", "|---|---|---|---|---|"]
    for code, kind in sorted(ERROR_KINDS.items(), key=lambda item: item[1].status):
        rows.append(f"| {kind.status} | `{code}` | {kind.when} | {kind.remedy} | {kind.retry} |")
    assert "\n".join(rows) in sections(read("service/README.md"))["Errors"]
