"""Decoding: what a picture becomes, what is refused, and what a broken decoder costs."""

from __future__ import annotations

import asyncio
import os
import signal
import struct
import zlib
from collections.abc import AsyncIterator

import pytest
from PIL import Image

from service.errors import ApiError
from service.images import worker
from service.images.decoder import DecoderLimits, ImageDecoder, RgbImage
from tests.service.examples import encoded, picture
from tests.service.hostile.pictures import jpeg_of_scans, jpeg_with_fill, webp_canvas

LIMITS = DecoderLimits()
FIELD = "messages[0].content[1].image_url.url"


@pytest.fixture
async def decoder() -> AsyncIterator[ImageDecoder]:
    decoder = ImageDecoder(workers=1, limits=LIMITS)
    yield decoder
    decoder.close()


async def decode(decoder: ImageDecoder, data: bytes, max_pixels: int = 25_000_000) -> RgbImage:
    return await decoder.decode(data, field=FIELD, max_pixels=max_pixels)


def first_pixel(image: RgbImage) -> tuple[int, ...]:
    return tuple(image.rows[:3])


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack("!I", len(content)) + name + content + struct.pack("!I", zlib.crc32(name + content))


def bare_png(
    width: int, height: int, data: bytes = b"", *, bits: int = 8, colour: int = 2, extra: bytes = b""
) -> bytes:
    """A PNG that announces a size, whatever its data."""
    header = struct.pack("!IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def grey_png(bits: int, samples: tuple[int, int], transparent: int) -> bytes:
    """Eight rows of eight pixels, of the first sample in the left half; one sample is transparent."""
    row = "".join(f"{samples[place // 4]:0{bits}b}" for place in range(8))
    rows = (b"\0" + int(row, 2).to_bytes(bits, "big")) * 8
    return bare_png(8, 8, rows, bits=bits, colour=0, extra=chunk(b"tRNS", struct.pack("!H", transparent)))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(picture()), (255, 0, 0)),
        (encoded(picture(), "JPEG"), (254, 0, 0)),
        (encoded(picture(), "WEBP", lossless=True), (255, 0, 0)),
        (encoded(picture(), "GIF"), (255, 0, 0)),
        (encoded(Image.new("P", (8, 8), 0), "GIF", transparency=0), (255, 255, 255)),
        (encoded(picture(mode="CMYK"), "JPEG"), (255, 0, 0)),
        (encoded(picture(mode="P")), (255, 0, 0)),
        (encoded(picture("white", mode="1")), (255, 255, 255)),
        (encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 128))), (255, 127, 127)),
        (encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 0))), (255, 255, 255)),
        (encoded(Image.new("LA", (8, 8), (0, 128))), (127, 127, 127)),
        (encoded(Image.new("P", (8, 8), 0), transparency=0), (255, 255, 255)),
        (encoded(Image.new("I;16", (8, 8), 32_768)), (128, 128, 128)),
        (encoded(Image.new("I;16", (8, 8), 65_535)), (255, 255, 255)),
    ],
    ids=[
        "png",
        "jpeg",
        "webp",
        "gif",
        "clear-gif",
        "cmyk",
        "palette",
        "1-bit",
        "alpha",
        "clear",
        "grey-alpha",
        "clear-palette",
        "16-bit",
        "16-bit-white",
    ],
)
async def test_any_mode_becomes_rgb_on_white(decoder: ImageDecoder, data: bytes, expected: tuple[int, ...]) -> None:
    image = await decode(decoder, data)
    assert first_pixel(image) == expected
    assert len(image.rows) == 3 * image.width * image.height


async def test_exif_orientation_is_applied(decoder: ImageDecoder) -> None:
    upright = Image.new("RGB", (48, 32), "red")
    upright.paste("blue", (24, 0, 48, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    image = await decode(decoder, encoded(upright, "JPEG", exif=exif, quality=95))
    assert (image.width, image.height) == (32, 48)
    assert image.rows[0] > 200  # red on top
    assert image.rows[-1] > 200  # blue below


async def test_a_broken_exif_block_does_not_spoil_the_picture(decoder: ImageDecoder) -> None:
    image = await decode(decoder, encoded(picture(), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff junk"))
    assert (image.width, image.height) == (48, 32)


async def test_a_phone_s_second_picture_is_left_out(decoder: ImageDecoder) -> None:
    image = await decode(decoder, encoded(picture(), "MPO", save_all=True, append_images=[picture("blue")]))
    assert first_pixel(image) == (254, 0, 0)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not a complete"),
        (b"hello" * 100, "not a complete"),
        (encoded(picture(), "BMP"), "not a complete"),
        (encoded(Image.effect_noise((99, 99), 50))[:-500], "not a complete"),
        (encoded(Image.effect_noise((99, 99), 50), "JPEG")[:-500], "not a complete"),
        (bare_png(0, 0), "not a complete"),
        (bare_png(100, 100, b"\x00"), "not a complete"),
        (encoded(picture(size=(3, 3))), "too small"),
        (encoded(picture(size=(1, 60))), "too small"),
        (encoded(picture(mode="1", size=(20_000, 500))), "too large"),
        (encoded(picture(mode="1", size=(5001, 5000))), "too large"),
        (encoded(picture(mode="1", size=(4, 400))), "too large"),
        (bare_png(65_000, 65_000), "too large"),
        (webp_canvas(16_000, 16_000), "too large"),
        (encoded(picture(), save_all=True, append_images=[picture("blue")]), "animated"),
        (encoded(picture(), "WEBP", save_all=True, append_images=[picture("blue")]), "animated"),
        (encoded(picture(), "GIF", save_all=True, append_images=[picture("blue")]), "animated"),
    ],
    ids=[
        "empty", "junk", "bmp", "cut-png", "cut-jpeg", "0x0", "no-rows", "3x3", "1-wide", "20000-wide",
        "25-megapixels", "thread", "bomb", "webp-bomb", "apng", "webp-animation", "gif-animation",
    ],
)  # fmt: skip
async def test_refused(decoder: ImageDecoder, data: bytes, says: str) -> None:
    with pytest.raises(ApiError, match=says) as caught:
        await decode(decoder, data)
    assert (caught.value.status, caught.value.param) == (400, FIELD)
    assert "PIL" not in caught.value.message
    assert (await decode(decoder, encoded(picture()))).width == 48, "the decoder goes on"


async def test_the_size_is_judged_before_the_pixels() -> None:
    """Decoding this one takes more memory than there is."""
    small = ImageDecoder(workers=1, limits=DecoderLimits(memory_bytes=128 * 1024**2))
    huge = bare_png(8000, 8000, bytes(8000 * 24_001))
    with pytest.raises(ApiError, match="not a complete"):
        await decode(small, huge, max_pixels=10**9)
    with pytest.raises(ApiError, match="at most 100 pixels"):
        await decode(small, huge, max_pixels=100)
    small.close()


async def test_memory_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.images.decoder.CLOCK_PER_CPU", 100)  # however busy the machine is
    small = ImageDecoder(workers=1, limits=DecoderLimits(memory_bytes=256 * 1024**2))
    with pytest.raises(ApiError, match="not a complete"):
        await decode(small, encoded(picture(mode="1", size=(9000, 9000))), max_pixels=10**9)
    assert (await decode(small, encoded(picture()))).width == 48
    small.close()


async def test_a_decoder_that_hangs_is_killed_and_replaced(
    decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await decode(decoder, encoded(picture()))).width == 48
    (process,) = decoder._processes
    os.kill(process.pid, signal.SIGSTOP)
    with monkeypatch.context() as impatient:
        impatient.setattr("service.images.decoder.CLOCK_PER_CPU", 0.05)
        with pytest.raises(ApiError, match="too busy") as caught:
            await decode(decoder, encoded(picture()))
    assert caught.value.code == "overloaded", "the image is not to blame"
    assert process.poll() is not None
    assert (await decode(decoder, encoded(picture()))).width == 48


async def test_a_killed_decoder_costs_nothing(decoder: ImageDecoder) -> None:
    await decode(decoder, encoded(picture()))
    (process,) = decoder._processes
    process.kill()
    process.wait()
    assert (await decode(decoder, encoded(picture()))).width == 48


async def test_a_cancelled_request_does_not_mix_up_the_next(decoder: ImageDecoder) -> None:
    slow = asyncio.create_task(decode(decoder, encoded(picture("blue", size=(4000, 4000)))))
    await asyncio.sleep(0.15)
    slow.cancel()
    images = await asyncio.gather(*(decode(decoder, encoded(picture(color))) for color in ("red", "lime")))
    assert [first_pixel(image) for image in images] == [(255, 0, 0), (0, 255, 0)]


async def test_the_decoder_has_no_secrets(decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    await decode(decoder, encoded(picture()))
    (process,) = decoder._processes
    with open(f"/proc/{process.pid}/environ", "rb") as environment:
        assert b"secret" not in environment.read()


async def test_closing_ends_the_processes(decoder: ImageDecoder) -> None:
    await decode(decoder, encoded(picture()))
    (process,) = decoder._processes
    decoder.close()
    assert process.wait(timeout=5) == -signal.SIGKILL


@pytest.mark.parametrize("hidden", [b"", b"\xff\xfe\x00\x06\xff\xd9\xff\xd9"], ids=["", "behind an end in a comment"])
async def test_a_jpeg_that_asks_for_the_same_pass_again_and_again(decoder: ImageDecoder, hidden: bytes) -> None:
    whole = jpeg_of_scans(65, size=(64, 64))
    with pytest.raises(ApiError, match="more than 64 scans"):
        await decode(decoder, whole[:2] + hidden + whole[2:])
    few = jpeg_of_scans(20, size=(64, 64))
    assert (await decode(decoder, few[:2] + hidden + few[2:])).width == 64


async def test_a_video_behind_a_photograph_has_no_scans(decoder: ImageDecoder) -> None:
    assert (await decode(decoder, encoded(picture(), "JPEG") + b"\xff\xda" * 1000)).width == 48


async def test_fill_bytes_in_a_scan_cost_no_time(decoder: ImageDecoder) -> None:
    """A search that were quadratic over them would run into the decoder's time limit."""
    data = jpeg_with_fill(200_000)
    assert await decoder.measure(data, field=FIELD, max_pixels=10_000) == 48 * 32
    assert (await decode(decoder, data)).width == 48


async def test_an_image_that_takes_too_much_cpu_time_is_to_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.images.decoder.CLOCK_PER_CPU", 100)  # however busy the machine is
    impatient = ImageDecoder(workers=1, limits=DecoderLimits(timeout_s=0.5))
    assert (await decode(impatient, encoded(picture()))).width == 48
    with pytest.raises(ApiError, match="takes too long") as caught:
        await decode(impatient, jpeg_of_scans(50, size=(5000, 5000)))
    assert (caught.value.code, caught.value.param) == ("invalid_image", FIELD)
    assert (await decode(impatient, encoded(picture()))).width == 48
    impatient.close()


async def test_what_fails_on_our_side_leaves_no_answer_for_the_next_image(
    decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two images of the same size: the first one's pixels must not be taken for the second one's."""

    class NoMemory:
        size = worker.ANSWER.size

        def unpack(self, _answer: bytes) -> None:
            raise MemoryError

    await decode(decoder, encoded(picture()))
    with monkeypatch.context() as failing:
        failing.setattr("service.images.decoder.worker.ANSWER", NoMemory())
        with pytest.raises(MemoryError):
            await decode(decoder, encoded(picture("blue")))
    assert first_pixel(await decode(decoder, encoded(picture("red")))) == (255, 0, 0)


async def test_callers_take_turns_at_the_decoder() -> None:
    decoder = ImageDecoder(workers=1, limits=LIMITS)
    ended: list[str] = []

    async def one(caller: str) -> None:
        await decoder.decode(encoded(picture()), field=FIELD, max_pixels=10**6, caller=caller)
        ended.append(caller)

    async with asyncio.TaskGroup() as group:
        for caller in ("greedy",) * 8 + ("other",):
            group.create_task(one(caller))
    decoder.close()
    assert ended.index("other") <= 2


@pytest.mark.parametrize(
    ("bits", "samples", "greys"),
    [(1, (0, 1), (0, 255)), (2, (1, 2), (85, 170)), (4, (3, 8), (51, 136)), (8, (3, 200), (3, 200)),
     (16, (9000, 51_400), (35, 200))],
)  # fmt: skip
async def test_a_grey_that_is_transparent_is_white(
    decoder: ImageDecoder, bits: int, samples: tuple[int, int], greys: tuple[int, int]
) -> None:
    for hidden, sample in enumerate(samples):
        image = await decode(decoder, grey_png(bits, samples, transparent=sample))
        seen = (image.rows[0], image.rows[3 * 7])
        assert seen == tuple(255 if place == hidden else grey for place, grey in enumerate(greys))
