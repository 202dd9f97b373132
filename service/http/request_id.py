"""What names a request in answers, logs and traces: the caller's own id, or one that we make. Knows HTTP headers."""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import Headers

from service.errors import ApiError

REQUEST_ID_HEADER = "x-request-id"
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


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
