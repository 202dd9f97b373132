"""Data URLs: what encoders write is taken, however it is cut into pieces, and nothing else."""

from __future__ import annotations

import base64
import random

import pytest

from service.errors import ApiError
from service.images.data_url import PIECE_CHARACTERS, decode_data_url
from tests.service.examples import data_url

FIELD = "messages[0].content[1].image_url.url"


async def test_data_urls() -> None:
    kinds = ["image/png", "image/jpeg", "image/jpg", "image/pjpeg", "image/webp", "image/gif", "IMAGE/PNG"]
    with_parameters = ["image/jpeg;charset=utf-8", 'image/png;name="a b.png";charset=utf-8', "image/png; q=1 "]
    for media_type in kinds + with_parameters:
        assert await decode_data_url(data_url(b"abc", media_type), field=FIELD, max_bytes=3) == b"abc"
    assert await decode_data_url("DATA:Image/Jpeg;BASE64,YWJj", field=FIELD, max_bytes=3) == b"abc"


@pytest.mark.parametrize("size", [1, 2, 3, 57, 58, 3 * PIECE_CHARACTERS // 4, PIECE_CHARACTERS + 1])
async def test_base64_as_encoders_write_it(size: int) -> None:
    """What Python, the command `base64` and mail make, and without padding what JavaScript's encoders do."""
    data = random.Random(size).randbytes(size)
    plain, broken = base64.b64encode(data).decode(), base64.encodebytes(data).decode()
    spaced = " " + " \t\r\n".join(plain[at : at + 61] for at in range(0, len(plain), 61)) + "\r\n"
    for text in (plain, broken, spaced, base64.urlsafe_b64encode(data).decode()):
        for written in (text, text.replace("=", "")):
            url = "data:image/png;base64," + written
            assert await decode_data_url(url, field=FIELD, max_bytes=size) == data
    with pytest.raises(ApiError, match="at most") as caught:
        await decode_data_url(data_url(data), field=FIELD, max_bytes=size - 1)
    assert caught.value.status == 413


async def test_a_long_data_url_is_decoded_in_pieces() -> None:
    long = random.Random(0).randbytes(3 * PIECE_CHARACTERS)
    for data in (long[:-1], long[:-2], long, long[: 3 * PIECE_CHARACTERS // 4], long[: 3 * PIECE_CHARACTERS // 4 + 1]):
        assert await decode_data_url(data_url(data), field=FIELD, max_bytes=len(data)) == data
    url = data_url(long)
    first = url.index(",") + 1
    for at, letters in ((PIECE_CHARACTERS - 2, "=="), (PIECE_CHARACTERS - 1, "="), (PIECE_CHARACTERS, "="), (9, "=")):
        broken = url[: first + at] + letters + url[first + at + len(letters) :]
        with pytest.raises(ApiError, match="not valid base64"):
            await decode_data_url(broken, field=FIELD, max_bytes=len(long))


@pytest.mark.parametrize(
    ("url", "status", "says"),
    [
        ("https://example.org/a.png", 400, "only data: URLs"),
        ("http://169.254.169.254/latest", 400, "only data: URLs"),
        ("file:///etc/passwd", 400, "only data: URLs"),
        ("", 400, "only data: URLs"),
        ("data:text/plain;base64,aGk=", 400, "only data: URLs"),
        ("data:image/svg+xml;base64,aGk=", 400, "only data: URLs"),
        ("data:image/png" + ";a=b" * 99 + ";base64,aGk=", 400, "only data: URLs"),
        ("data:image/png,aGk=", 400, "only data: URLs"),
        ("data:image/png;base64,%%%%", 400, "not valid base64"),
        ("data:image/png;base64,abcde", 400, "not valid base64"),
        ("data:image/png;base64,a", 400, "not valid base64"),
        ("data:image/png;base64,a===", 400, "not valid base64"),
        ("data:image/png;base64,abcd==", 400, "not valid base64"),
        ("data:image/png;base64,====", 400, "not valid base64"),
        ("data:image/png;base64,aG=k", 400, "not valid base64"),
        ("data:image/png;base64,aGk=aGk=", 400, "not valid base64"),
        ("data:image/png;base64,aGk\xa0", 400, "not valid base64"),
        ("data:image/png;base64,aG\0k", 400, "not valid base64"),
        ("data:image/png;base64,ä", 400, "not valid base64"),
        ("data:image/png;base64," + "A" * 2000, 413, "at most 1000 bytes"),
    ],
)
async def test_urls_that_are_refused(url: str, status: int, says: str) -> None:
    with pytest.raises(ApiError, match=says) as caught:
        await decode_data_url(url, field=FIELD, max_bytes=1000)
    assert (caught.value.status, caught.value.param) == (status, FIELD)
