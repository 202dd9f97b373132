"""All images of a request from URLs to pixels, the cheapest check first. Knows no HTTP of ours and no Ray.

The caller's quota is asked for their number; URLs are judged, base64 decoded, remote images fetched; then all are
measured by their headers; only when their sums and the quota of pixels allow it is the first pixel decoded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from service.errors import ApiError
from service.images.decoder import ImageDecoder, RgbImage, decode_data_url
from service.images.remote import RemoteImages, RemoteUrl
from service.settings import Settings

Result = TypeVar("Result")
AdmitImages = Callable[[int, int], Awaitable[None]]
"""Called twice per request with images: with their number and no pixels before anything is done for them, with no
images and all their pixels once these are measured. Raises ApiError where the caller's quota refuses them."""


async def take_images(
    sources: Sequence[tuple[str, str]],
    *,
    settings: Settings,
    decoder: ImageDecoder,
    remote: RemoteImages,
    admit_images: AdmitImages,
    take_bytes: Callable[[int], None] = lambda _count: None,
    caller: str = "",
) -> tuple[RgbImage, ...]:
    """Pixels of every (field, URL), in their order. Raises ApiError naming the field at fault.

    `take_bytes` is told of every piece that is fetched, and may raise; `caller` is whose turn it is at the decoder.
    """
    if not sources:
        return ()
    await admit_images(len(sources), 0)
    encoded = await collect(sources, settings=settings, remote=remote, take_bytes=take_bytes)
    limits: dict[str, Any] = {"max_pixels": settings.max_image_pixels, "caller": caller}
    sizes = await together(decoder.measure(data, field=field, **limits) for field, data in encoded)
    pixels = sum(sizes)
    if pixels > settings.max_request_pixels:
        raise ApiError(
            "invalid_image",
            f"messages: the images have {pixels} pixels together; at most {settings.max_request_pixels} are allowed",
            param="messages",
        )
    await admit_images(0, pixels)
    return tuple(await together(decoder.decode(data, field=field, **limits) for field, data in encoded))


async def collect(
    sources: Sequence[tuple[str, str]],
    *,
    settings: Settings,
    remote: RemoteImages,
    take_bytes: Callable[[int], None],
) -> list[tuple[str, bytes]]:
    """(field, encoded image) of every source; every URL is judged before the first is fetched."""
    found: list[tuple[str, bytes | RemoteUrl]] = []
    for field, url in sources:
        if remote.allowed and url[:5].lower() != "data:":
            found.append((field, remote.parse(url, field=field)))
        else:
            found.append((field, await decode_data_url(url, field=field, max_bytes=settings.max_image_bytes)))
    left = settings.max_body_bytes - sum(len(data) for _, data in found if isinstance(data, bytes))
    wanted = [(field, url) for field, url in found if isinstance(url, RemoteUrl)]
    fetched = iter(await remote.fetch(wanted, max_bytes=left, take_bytes=take_bytes))
    return [(field, data if isinstance(data, bytes) else next(fetched)) for field, data in found]


async def together(work: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """All at once; of several failures the first in order, so that the same request gets the same answer. What comes
    after it and has not begun never does."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return [await task for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
