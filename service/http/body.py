"""A request's body: read whole, with bounds of size and time. Knows nothing of what is in it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fastapi import Request

from service.errors import ApiError


async def read_json_body(
    request: Request, *, max_bytes: int, timeout_s: float, take: Callable[[int], None] = lambda _bytes: None
) -> bytes:
    """The body, refused as soon as it is known to be too large, too slow or not said to be JSON.

    `take` is told the bytes of every piece, and may raise.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError("unsupported_media_type", "content-type: must be application/json", param="content-type")
    too_large = ApiError("request_too_large", f"the body may have at most {max_bytes} bytes")
    if int(request.headers.get("content-length", "0")) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for piece in request.stream():
                take(len(piece))
                body += piece
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError("body_timeout", f"the whole body must arrive within {timeout_s:g} s; send it again") from None
    return bytes(body)
