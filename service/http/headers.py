"""The headers that are this service's own: what they may hold and say, and how the contract describes them. Knows no
routes.
"""

from __future__ import annotations

import re
import uuid
from typing import Any

from starlette.datastructures import Headers

from service.chat.request import STRENGTH_HEADER
from service.errors import ApiError
from service.experiments.assignment import Assignment

REQUEST_ID_HEADER = "x-request-id"
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
UNIT_HEADER = "x-experiment-unit"
UNIT = re.compile(r"[!-~]([ -~]{0,254}[!-~])?")
ETAG, CACHE_CONTROL = "ETag", "Cache-Control"
ARM_HEADER, ASSIGNMENT_HEADER = "x-vlsae-arm", "x-vlsae-assignment"

REQUEST_ID_PARAMETER = {
    "name": REQUEST_ID_HEADER,
    "in": "header",
    "description": "Names the request in the service's log; one is made where none is given.",
    "schema": {"type": "string", "pattern": f"^{REQUEST_ID.pattern}$"},
}
HEADERS: dict[str, dict[str, Any]] = {
    REQUEST_ID_HEADER: {"description": "The request's id, taken or made.", "schema": {"type": "string"}},
    "Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 1}},
    "WWW-Authenticate": {"description": "How to present a key.", "schema": {"type": "string"}},
    ARM_HEADER: {
        "description": "While an experiment runs: the arm whose steering this is, `own` for the caller's.",
        "schema": {"type": "string"},
    },
    ASSIGNMENT_HEADER: {
        "description": "Why: `unit` by the hash of who asked, `no_unit` the default arm, since nobody was named.",
        "schema": {"enum": ["unit", "no_unit", "not_covered", "own"]},
    },
    ETAG: {"description": "Changes with the answer; for `If-None-Match`.", "schema": {"type": "string"}},
    CACHE_CONTROL: {"description": "How long the answer may be kept.", "schema": {"type": "string"}},
    "x-should-retry": {
        "description": "There where sending the request again is no use; OpenAI's clients obey it.",
        "schema": {"const": "false"},
    },
}
IF_NONE_MATCH_PARAMETER = {
    "name": "If-None-Match",
    "in": "header",
    "description": "The `ETag` of an answer that the client has: the same one is not sent again.",
    "schema": {"type": "string"},
}
NOT_ALWAYS = ("x-should-retry", ARM_HEADER, ASSIGNMENT_HEADER)
UNIT_PARAMETER = {
    "name": UNIT_HEADER,
    "in": "header",
    "description": "Who asks, for an experiment: the same unit gets the same arm. Else `user` of the body is the unit.",
    "schema": {"type": "string", "pattern": f"^{UNIT.pattern}$"},
    "example": "visitor-17",
}
STRENGTH_PARAMETER = {
    "name": STRENGTH_HEADER,
    "in": "header",
    "description": "The dial, where the body does not say: 0 is the plain model, 1 the preset.",
    "schema": {"type": "string", "pattern": r"^(0{1,3}(\.[0-9]{1,9})?|0{0,2}1(\.0{1,9})?|\.[0-9]{1,9})$"},
    "example": "0.5",
}


def request_id_of(headers: Headers) -> str:
    """The caller's, where it sent one and we accept it; else a new one."""
    given = headers.getlist(REQUEST_ID_HEADER)
    return given[0] if len(given) == 1 and REQUEST_ID.fullmatch(given[0]) else uuid.uuid4().hex


def check_request_id(headers: Headers) -> None:
    """Raises ApiError for more than one, and for what does not belong in a log."""
    given = headers.getlist(REQUEST_ID_HEADER)
    if len(given) > 1 or not all(REQUEST_ID.fullmatch(one) for one in given):
        raise ApiError(
            "invalid_header",
            f"{REQUEST_ID_HEADER}: send one of at most 128 letters, digits and . _ : -, or none",
            param=REQUEST_ID_HEADER,
        )


def unit_header_of(headers: Headers) -> str | None:
    """Raises ApiError for more than one, and for what no identifier needs."""
    given = headers.getlist(UNIT_HEADER)
    if len(given) > 1 or not all(UNIT.fullmatch(one) for one in given):
        raise ApiError(
            "invalid_header",
            f"{UNIT_HEADER}: send one of at most 256 printable ASCII characters, or none",
            param=UNIT_HEADER,
        )
    return given[0] if given else None


def assignment_headers(assignment: Assignment | None) -> dict[str, str]:
    """Whose steering it was, and why: both, or none where no experiment runs."""
    if assignment is None:
        return {}
    return {ARM_HEADER: assignment.shown, ASSIGNMENT_HEADER: assignment.reason}
