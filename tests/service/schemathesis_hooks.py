"""What schemathesis cannot read off the OpenAPI document: pictures, which fields go together, how long answers get.

`SCHEMATHESIS_HOOKS=tests.service.schemathesis_hooks` loads it into `schemathesis run`.
"""

from __future__ import annotations

from typing import Any

import schemathesis
from hypothesis import strategies as st

from tests.service.examples import data_url, encoded, picture

MAX_TOKENS = 4
"""Of an answer whose request says nothing else: what is tested is the contract, not the model's patience."""
CONVERSATIONS = ("/v1/chat/completions", "/v1/compare")
GOOD_URLS = [
    data_url(encoded(picture())),
    data_url(encoded(picture("blue"), "JPEG"), "image/jpeg"),
    data_url(encoded(picture(mode="RGBA"), "WEBP"), "image/webp"),
]

schemathesis.openapi.format("image-url", st.sampled_from(GOOD_URLS) | st.text().map("data:image/png;base64,{}".format))


@schemathesis.hook
def map_case(_context: schemathesis.HookContext, case: schemathesis.Case) -> schemathesis.Case:
    """What a schema calls valid becomes valid; what is broken is broken in one place, so that it is that one's test."""
    if case.meta is None:
        return case
    modes = {location.value: component.mode for location, component in case.meta.components.items()}
    broken_body = "body" in modes and modes["body"].is_negative
    linked = case.meta.phase.name.value == "stateful"  # its body comes from an answer, whatever the mode says
    if not linked and (broken_body or case.method.lower() != case.operation.method.lower()):
        case.headers.clear()  # they are judged first
    if case.path in CONVERSATIONS and isinstance(case.body, dict):
        case.body = agreeing(case.body)
    return case


def agreeing(body: dict[str, Any]) -> dict[str, Any]:
    """Fields that only go together are together, which OpenAPI cannot say; fields of a wrong type stay as they are."""
    body = dict(body)
    if body.get("top_logprobs") not in (None, 0) and body.get("logprobs") in (None, False):
        body["logprobs"] = True
    if body.get("stream_options") is not None and body.get("stream") in (None, False):
        body["stream"] = True
    asked = [body.get(name) for name in ("max_tokens", "max_completion_tokens")]
    if all(type(tokens) is int and tokens > 0 for tokens in asked):
        body["max_tokens"] = body["max_completion_tokens"]
    if asked == [None, None]:
        body["max_tokens"] = MAX_TOKENS
    return body
