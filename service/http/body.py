"""A request's body: read whole with bounds of size and time, its values counted, then parsed. Knows no field.

A validator says everything that is wrong: 20 MB of `1,1,1,...` in the wrong place took minutes and 14 GB to refuse.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from service.chat.admission import Share
from service.errors import ApiError, from_validation_error
from service.settings import COPIES_OF_A_BODY, MIB, Settings

Fields = TypeVar("Fields", bound=BaseModel)
WIDE_COPIES = 3
"""A text with one character from outside the basic plane takes four bytes for each of its characters."""
MAX_TOKENS = 50_000
"""Strings, commas and opening brackets of one body. The longest conversation that is allowed has about 30,000."""
MAX_ESCAPES = 2_000_000
"""Backslashes of one body. Each is slow to read; base64 with every slash escaped has a third of this in 48 MiB."""
TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[,\[{]', re.DOTALL)
"""A string, to its end or the body's, or what stands before one more value."""


async def read_json_body(
    request: Request, *, max_bytes: int, timeout_s: float, take: Callable[[int], None] = lambda _bytes: None
) -> bytes:
    """The body, refused as soon as it is known to be too large, too slow or not said to be JSON.

    `take` is told the bytes of every piece, and may raise.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError("unsupported_media_type", "content-type: must be application/json", param="content-type")
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            check_size(int(request.headers.get("content-length", "0")), max_bytes)
            async for piece in request.stream():
                take(len(piece))
                body += piece
                check_size(len(body), max_bytes)
    except TimeoutError:
        raise ApiError("body_timeout", f"the whole body must arrive within {timeout_s:g} s; send it again") from None
    return bytes(body)


def check_size(size: int, max_bytes: int) -> None:
    """Raises ApiError."""
    if size > max_bytes:
        raise ApiError("request_too_large", f"the body may have at most {max_bytes} bytes")


async def read_fields(request: Request, settings: Settings, share: Share, fields: type[Fields]) -> Fields:
    """The body's fields; `share` is told all that is held on the way. Raises ApiError."""
    body = await read_json_body(
        request,
        max_bytes=settings.max_body_bytes,
        timeout_s=settings.body_timeout_s,
        take=lambda piece_bytes: share.take(COPIES_OF_A_BODY * piece_bytes),
    )
    if not body.isascii() or b"\\u" in body:
        share.take(WIDE_COPIES * len(body))
    return await parse_in_time(body, fields)


async def parse_in_time(body: bytes, fields: type[Fields]) -> Fields:
    """See `parse`; a large body in a thread, so that others are served between the steps of its work."""
    if len(body) <= MIB:
        return parse(body, fields)
    return await asyncio.to_thread(parse, body, fields)


def parse(body: bytes, fields: type[Fields]) -> Fields:
    """Raises ApiError naming the first field at fault."""
    check_structure(body)
    try:
        return fields.model_validate_json(body)
    except ValidationError as error:
        raise from_validation_error(error) from None


def check_structure(body: bytes) -> None:
    """Raises ApiError for a body of too many values or escapes; how long its strings are does not matter here."""
    if body.count(b"\\") > MAX_ESCAPES:
        raise ApiError("request_too_large", f"the body may have at most {MAX_ESCAPES} backslashes")
    if sum(map(body.count, (b",", b"[", b"{"))) <= MAX_TOKENS // 4:
        return  # each is followed by two strings at most; counting bytes costs next to nothing for large images
    for count, _ in enumerate(TOKEN.finditer(body), start=1):
        if count > MAX_TOKENS:
            raise ApiError("request_too_large", f"the body may have at most {MAX_TOKENS} names, values and brackets")
