"""All images of a request: what is checked before what, and that nothing is decoded for nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from service.errors import ApiError
from service.images.decoder import DecoderLimits, ImageDecoder, take_images, together
from service.settings import Settings
from tests.service.examples import data_url, encoded, picture
from tests.service.images.test_decoder import bare_png

SETTINGS = Settings(model="/models/tiny", artifact="/a")
GOOD = data_url(encoded(picture()))
UNDECODABLE = data_url(bare_png(100, 100, b"\x00"))
"""Its header is in order; it has no rows."""
USED_UP = ApiError("rate_limit_exceeded", "the quota is used up")


@pytest.fixture
async def decoder() -> AsyncIterator[ImageDecoder]:
    decoder = ImageDecoder(workers=2, limits=DecoderLimits())
    yield decoder
    decoder.close()


async def take(decoder: ImageDecoder, *urls: str, settings: Settings = SETTINGS, used_up: str = ""):
    """The pictures, and what the quota was asked for; `used_up` is what it has no more of, "images" or "pixels"."""
    asked = []

    async def admit_images(count: int, pixels: int) -> None:
        asked.append((count, pixels))
        if {"images": count, "pixels": pixels, "": 0}[used_up]:
            raise USED_UP

    sources = [(f"url[{index}]", url) for index, url in enumerate(urls)]
    return await take_images(sources, settings=settings, decoder=decoder, remote=None, admit_images=admit_images), asked


async def test_the_quota_is_asked_for_the_number_and_then_for_the_pixels(decoder: ImageDecoder) -> None:
    images, asked = await take(decoder, GOOD, data_url(encoded(picture("blue", (40, 10)))))
    assert [(image.width, image.height) for image in images] == [(48, 32), (40, 10)]
    assert asked == [(2, 0), (0, 48 * 32 + 400)]


async def test_without_images_it_is_not_asked(decoder: ImageDecoder) -> None:
    assert await take(decoder) == ((), [])


async def test_a_quota_of_images_refuses_before_anything_is_done_for_them(decoder: ImageDecoder) -> None:
    with pytest.raises(ApiError, match="quota"):
        await take(decoder, "data:image/png;base64,%%%%", used_up="images")
    with pytest.raises(ApiError, match="quota"):
        await take(decoder, GOOD, used_up="images")
    assert decoder._processes == set(), "nothing was measured"


async def test_a_quota_of_pixels_refuses_before_anything_is_decoded(decoder: ImageDecoder) -> None:
    with pytest.raises(ApiError, match="quota"):
        await take(decoder, GOOD, UNDECODABLE, used_up="pixels")
    with pytest.raises(ApiError, match=r"^url\[1\]: not a complete"):
        await take(decoder, GOOD, UNDECODABLE)


async def test_a_bad_header_or_too_many_pixels_cost_no_pixels(decoder: ImageDecoder) -> None:
    few = SETTINGS.model_copy(update={"max_image_pixels": 1536})
    with pytest.raises(ApiError, match="4608 pixels together; at most 3072"):
        await take(decoder, GOOD, GOOD, GOOD, settings=few, used_up="pixels")
    with pytest.raises(ApiError, match=r"^url\[1\]: the image is too large"):
        await take(decoder, GOOD, data_url(bare_png(65_000, 65_000)), used_up="pixels")


async def test_of_several_faults_the_first_is_named(decoder: ImageDecoder) -> None:
    slow = data_url(encoded(picture(size=(4000, 4000)))[:-2000])
    for _ in range(3):
        with pytest.raises(ApiError, match=r"^url\[0\]: not a complete"):
            await take(decoder, slow, UNDECODABLE, UNDECODABLE)


async def test_images_are_decoded_side_by_side(decoder: ImageDecoder) -> None:
    asking = asyncio.create_task(take(decoder, *[data_url(encoded(picture(size=(3000, 3000))))] * 2))
    most = 0
    while not asking.done():
        most = max(most, len(decoder._processes))
        await asyncio.sleep(0.01)
    await asking
    assert most == 2


async def test_after_a_failure_what_comes_later_is_given_up() -> None:
    ended = []

    async def one(name: str, fails: bool, wait_s: float) -> None:
        await asyncio.sleep(wait_s)
        ended.append(name)
        if fails:
            raise ValueError(name)

    with pytest.raises(ValueError, match="second"):
        await together(
            [one("first", False, 0.02), one("second", True, 0), one("third", True, 0), one("last", False, 60)]
        )
    assert ended == ["second", "third", "first"]
