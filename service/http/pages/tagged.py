"""Answers that a client may have already: named by their content, and not sent again to whoever has them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from fastapi import Request, Response

from service.http.answers import CACHE_CONTROL, ETAG

ASK_AGAIN = "private, no-cache"
"""Kept by the client only, and not used before the service was asked whether it is still true."""
FOR_A_YEAR = "private, max-age=31536000, immutable"


def tagged(
    request: Request,
    content: bytes,
    media_type: str,
    *,
    keep: str = ASK_AGAIN,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """With an ETag, of the content alone, so that all replicas have the same; a 304 to whoever has that one."""
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    all_headers = {**(headers or {}), ETAG: tag, CACHE_CONTROL: keep}
    known = {one.strip().removeprefix("W/") for one in ",".join(request.headers.getlist("if-none-match")).split(",")}
    if tag in known or "*" in known:
        return Response(status_code=304, headers=all_headers)
    return Response(content, headers={**all_headers, "content-type": media_type})
