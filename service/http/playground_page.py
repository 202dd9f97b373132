"""The playground as HTTP: its page, scripts and scenes (`service/playground/`), read once. Knows no model and no keys.

The page may load what this service serves and nothing else, run no script that stands in its markup, and be in no
other page's frame: a picture or an answer that smuggled markup in could do nothing with it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from fastapi import Response

from service.errors import ApiError

FOLDER = Path(__file__).parent.parent / "playground"
PAGE = "index.html"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".json": "application/json",
    ".png": "image/png",
}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # asked for again each time; what has not changed is a 304
}


class PlaygroundFile(NamedTuple):
    """One file as it is sent."""

    body: bytes
    media_type: str
    etag: str
    """Quoted; of the content alone, so all replicas have the same."""


class Playground:
    """All files of the playground, in memory: a name from outside is never a path on disk."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self._page = _read(folder / PAGE)
        self._files = {
            path.relative_to(folder).as_posix(): _read(path)
            for path in sorted(folder.rglob("*"))
            if path.suffix in MEDIA_TYPES and path.name != PAGE
        }

    @property
    def names(self) -> list[str]:
        """What there is beside the page, relative to `/playground/`."""
        return list(self._files)

    def answer(self, name: str | None, known: str) -> Response:
        """The file (None: the page), or a 304 where `known`, an If-None-Match, names it. Raises ApiError."""
        file = self._page if name is None else self._files.get(name)
        if file is None:
            raise ApiError("route_not_found", "there is no such path")
        headers = {**HEADERS, "etag": file.etag}
        if {tag.strip().removeprefix("W/") for tag in known.split(",")} & {file.etag, "*"}:
            return Response(status_code=304, headers=headers)
        return Response(file.body, headers={**headers, "content-type": file.media_type})


def _read(path: Path) -> PlaygroundFile:
    body = path.read_bytes()
    return PlaygroundFile(body, MEDIA_TYPES[path.suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')
