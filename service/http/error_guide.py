"""What each error means to whoever gets it: when it comes, what to do, whether to send the request again.

The table in the README and the OpenAPI document are made of this. Knows no routes and raises nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from service.errors import ERROR_KINDS

NO, LATER, YES = "no", "after `Retry-After`", "yes"


class Advice(NamedTuple):
    """One line of the table, in words for a client's programmer."""

    when: str
    remedy: str
    retry: str
    """Whether the same request, sent again, may be answered."""


GUIDE = {
    "invalid_json": Advice("the body is not JSON in UTF-8", "send valid JSON", NO),
    "invalid_value": Advice("a value of a wrong type, out of its range, or at odds with another field",
                            "`param` names the field, the message what is allowed", NO),
    "missing_field": Advice("a required field is not there", "send the field in `param`", NO),
    "unknown_field": Advice("a field that nobody here knows; often a typing error", "leave it out", NO),
    "unsupported_value": Advice("a known field asks for what this service, or its engine, cannot do",
                                "leave the field out", NO),
    "invalid_header": Advice("a header has an impossible value, or is not for clients", "correct it or leave it out",
                             NO),
    "invalid_image": Advice("not a complete JPEG, PNG, WebP or GIF of one frame; too large or too small; or its URL "
                            "is not accepted or not answered", "send another image, as a `data:` URL", NO),
    "invalid_steering": Advice("steering that was asked for is impossible: no image, no such preset",
                               "change the field in `param`, or do not ask for it", NO),
    "context_length_exceeded": Advice("prompt and `max_tokens` are more than the model's context",
                                      "shorten the conversation or ask for fewer tokens; the message has the numbers",
                                      NO),
    "invalid_api_key": Advice("no key, an unknown one, or one that has expired", "send `Authorization: Bearer KEY`",
                              NO),
    "permission_denied": Advice("the key lacks the scope that the path or the field needs", "use a key that has it",
                                NO),
    "model_not_found": Advice("no such model", "take a name from `GET /v1/models`", NO),
    "concept_not_found": Advice("there is no such concept, it has no such picture, or the service has no artifact",
                                "take an `id` or `thumbnail` from `GET /v1/concepts`", NO),
    "request_not_found": Advice("feedback on an answer that this key was not given, or has judged, or more than an "
                                "hour ago", "send the `id` of a recent completion, once", NO),
    "route_not_found": Advice("no such path", "see `GET /openapi.json`", NO),
    "method_not_allowed": Advice("the path has another method", "see the header `Allow`", NO),
    "body_timeout": Advice("the body took too long to arrive", "send it without pauses", YES),
    "request_too_large": Advice("the body, its texts, an image, or all images together are above a limit, or above "
                                "what the key may send in a minute", "send less", NO),
    "unsupported_media_type": Advice("the body is not said to be JSON", "send `Content-Type: application/json`", NO),
    "rate_limit_exceeded": Advice("the key's requests, images or pixels of this minute are used up, or the "
                                  "address's requests",
                                  "wait as long as `Retry-After` says", LATER),
    "overloaded": Advice("too many requests, connections or bytes at once", "wait; `Retry-After` is an estimate",
                         LATER),
    "engine_unavailable": Advice("the model loads, makes no progress, or was lost with this request",
                                 "wait; nothing of the request is kept", LATER),
    "shutting_down": Advice("the service stops and takes no new requests", "wait for the next one to take its place",
                            LATER),
    "request_timeout": Advice("the answer took longer than a request may", "ask for fewer tokens or choices", NO),
    "bad_artifact": Advice("the artifact does not belong to the model", "tell the operator", NO),
    "internal_error": Advice("a fault of the service", "tell the operator the header `x-request-id`", YES),
}  # fmt: skip


def markdown_table() -> str:
    """The README's table of errors, by status."""
    rows = ["| status | `code` | when | what to do | again? |", "|---|---|---|---|---|"]
    for code, kind in sorted(ERROR_KINDS.items(), key=lambda item: item[1].status):
        advice = GUIDE[code]
        rows.append(f"| {kind.status} | `{code}` | {advice.when} | {advice.remedy} | {advice.retry} |")
    return "\n".join(rows)
