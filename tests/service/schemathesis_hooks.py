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
GOOD_URLS = [
    data_url(encoded(picture())),
    data_url(encoded(picture("blue"), "JPEG"), "image/jpeg"),
    data_url(encoded(picture(mode="RGBA"), "WEBP"), "image/webp"),
]

schemathesis.openapi.format("image-url", st.sampled_from(GOOD_URLS) | st.text().map("data:image/png;base64,{}".format))


@schemathesis.hook
def map_case(_context: schemathesis.HookContext, case: schemathesis.Case) -> schemathesis.Case:
    """A chat request that a schema calls valid becomes one that is; a broken one stays broken."""
    if case.path == "/v1/chat/completions" and isinstance(case.body, dict):
        case.body = short(case.body)
        if case.meta is not None and case.meta.generation.mode.is_positive:
            case.body = agreeing(case.body)
    return case


def short(body: dict[str, Any]) -> dict[str, Any]:
    asked = [body.get(name) for name in ("max_tokens", "max_completion_tokens")]
    return body if any(asked) else {**body, "max_tokens": MAX_TOKENS}


def agreeing(body: dict[str, Any]) -> dict[str, Any]:
    """Fields that only go together are together; OpenAPI has no way to say so."""
    body = dict(body)
    if body.get("top_logprobs") is not None:
        body["logprobs"] = True
    if body.get("stream_options") is not None:
        body["stream"] = True
    if body.get("max_completion_tokens"):
        body.pop("max_tokens", None)
    return body
