"""The playground as HTTP: its page, scripts and scenes (`service/playground/`), read once. Knows no model and no keys.

The page may load what this service serves and nothing else, run no script that stands in its markup, and be in no
other page's frame: a picture or an answer that smuggled markup in could do nothing with it.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import Request, Response

from service.errors import ApiError
from service.http.pages.tagged import tagged

FOLDER = Path(__file__).parents[2] / "playground"
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
}


class Playground:
    """All files of the playground, in memory: a name from outside is never a path on disk."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self._page = (folder / PAGE).read_bytes()
        self._files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.suffix in MEDIA_TYPES and path.name != PAGE
        }

    @property
    def names(self) -> list[str]:
        """What there is beside the page, relative to `/playground/`."""
        return list(self._files)

    async def page(self, request: Request) -> Response:
        return tagged(request, self._page, MEDIA_TYPES[".html"], headers=HEADERS)

    async def file(self, request: Request) -> Response:
        """Raises ApiError."""
        name = request.path_params["file"]
        if name not in self._files:
            raise ApiError("route_not_found", "there is no such path")
        return tagged(request, self._files[name], MEDIA_TYPES[Path(name).suffix], headers=HEADERS)
