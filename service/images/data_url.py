"""Encoded images inside `data:` URLs, as browsers, mail and the command `base64` write them. Never parses an image."""

from __future__ import annotations

import asyncio
import binascii
import re

from service.errors import ApiError

DATA_URL = re.compile(
    r"data: *image/(?:p?jpe?g|(?:x-)?png|webp|gif) *(?:;[^,;]{0,200}){0,8}; *base64 *,", re.IGNORECASE | re.ASCII
)
"""With parameters, which say nothing of a picture. What the image really is, the decoder finds out."""
WHITE_SPACE = b" \t\r\n\v\f"
"""Anywhere in base64: the command `base64` breaks its lines."""
TO_STANDARD = bytes.maketrans(b"-_", b"+/")
"""From the alphabet of URLs (RFC 4648, section 5), which some encoders write; the two never disagree."""
PIECE_CHARACTERS = 4 * 256 * 1024
"""Of base64 that is decoded in one step."""


async def decode_data_url(url: str, *, field: str, max_bytes: int) -> bytes:
    """The encoded image inside a `data:` URL; `field` names it in errors. Others are served between the pieces."""
    prefix = DATA_URL.match(url)
    if prefix is None:
        raise ApiError(
            "invalid_image",
            f"{field}: only data: URLs are accepted, as in data:image/png;base64,... (JPEG, PNG, WebP or GIF)",
            param=field,
        )
    encoded, rest = bytearray(), b""
    try:
        for start in range(prefix.end(), len(url), PIECE_CHARACTERS):
            if start > prefix.end():
                await asyncio.sleep(0)
            rest += url[start : start + PIECE_CHARACTERS].encode("ascii").translate(TO_STANDARD, WHITE_SPACE)
            whole = max(len(rest) - 1, 0) // 4 * 4  # the last group may be the padded one
            encoded += decode_groups(rest[:whole])
            rest = rest[whole:]
            if len(encoded) > max_bytes:
                break
        encoded += decode_last_group(rest)
    except ValueError:
        raise ApiError("invalid_image", f"{field}: the data: URL is not valid base64", param=field) from None
    if len(encoded) > max_bytes:
        raise ApiError("request_too_large", f"{field}: an image may have at most {max_bytes} bytes", param=field)
    return bytes(encoded)


def decode_groups(text: bytes) -> bytes:
    """Whole groups of four base64 characters, none of them padded. Raises ValueError."""
    if b"=" in text:
        raise ValueError("padding stands at the end")
    return binascii.a2b_base64(text, strict_mode=True)


def decode_last_group(text: bytes) -> bytes:
    """Two to four characters, whether padded or not; nothing where nothing is left. Raises ValueError."""
    letters = text.rstrip(b"=")
    if len(text) > 4 or (text and not letters):
        raise ValueError("too much padding")
    return binascii.a2b_base64(letters + b"=" * (-len(letters) % 4), strict_mode=True)
