"""How many values a JSON body holds, counted before anything is made of it. Knows no field and does not parse.

A validator says everything that is wrong: 20 MB of `1,1,1,...` in the wrong place took minutes and 14 GB to refuse.
"""

from __future__ import annotations

import re

from service.errors import ApiError

MAX_TOKENS = 50_000
"""Strings, commas and opening brackets of one body. The longest conversation that is allowed has about 30,000."""
MAX_ESCAPES = 2_000_000
"""Backslashes of one body. Each is slow to read; base64 with every slash escaped has a third of this in 48 MiB."""
TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[,\[{]', re.DOTALL)
"""A string, to its end or the body's, or what stands before one more value."""


def check_structure(body: bytes) -> None:
    """Raises ApiError for a body of too many values or escapes; how long its strings are does not matter here."""
    if body.count(b"\\") > MAX_ESCAPES:
        raise ApiError("request_too_large", f"the body may have at most {MAX_ESCAPES} backslashes")
    if sum(map(body.count, (b",", b"[", b"{"))) <= MAX_TOKENS // 4:
        return  # each is followed by two strings at most; counting bytes costs next to nothing for large images
    for count, _ in enumerate(TOKEN.finditer(body), start=1):
        if count > MAX_TOKENS:
            raise ApiError("request_too_large", f"the body may have at most {MAX_TOKENS} names, values and brackets")
