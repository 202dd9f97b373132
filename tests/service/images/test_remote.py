"""Images of https:// URLs: what is fetched, what is refused, and that nothing refused was ever connected to."""

from __future__ import annotations

import asyncio
import logging
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from service.errors import ApiError
from service.images.remote import MAX_CONCURRENT_REQUESTS, SystemResolver, is_public
from tests.service.examples import encoded, picture
from tests.service.hostile.urls import ALLOWED_HOSTS, HOSTILE_URLS
from tests.service.local_world import HOST, PUBLIC, LocalWorld, answer

PNG = encoded(picture())
URL = f"https://{HOST}/cats/1.png?size=2&sig=a%2Fb"
FIELD = "url[0]"


async def fetch(world: LocalWorld, *urls: str, max_bytes: int = 100_000, **changes) -> list[bytes]:
    images = world.images(**changes)
    wanted = [(f"url[{index}]", images.parse(url, field=FIELD)) for index, url in enumerate(urls or (URL,))]
    return await images.fetch(wanted, max_bytes=max_bytes)


async def expect_refusal(world: LocalWorld, *urls: str, **changes) -> None:
    """The one message for whatever went wrong."""
    with pytest.raises(ApiError, match=r"^url\[\d\]: could not be fetched as a") as caught:
        await fetch(world, *urls, **changes)
    assert (caught.value.code, caught.value.status) == ("invalid_image", 400)


async def test_an_image_is_fetched_from_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    world = LocalWorld()
    world.pieces = [answer(PNG)]
    async with world.running():
        assert await fetch(world) == [PNG]
    assert world.connected == [(PUBLIC, 443)]
    assert world.resolved == [HOST]
    assert world.asked_names == [HOST]
    (request,) = world.requests
    assert request.startswith("GET /cats/1.png?size=2&sig=a%2Fb HTTP/1.1\r\n")
    sent = {line.partition(":")[0].lower() for line in request.splitlines()[1:] if line}
    assert sent == {"host", "accept", "accept-encoding"}
    assert f"\r\nHost: {HOST}\r\n" in request


async def test_several_at_once_in_their_order() -> None:
    world = LocalWorld()
    world.pieces = [answer(PNG)]
    async with world.running():
        assert await fetch(world, URL, f"https://{HOST}:443/b", f"https://{HOST.upper()}/c") == [PNG] * 3
    assert len(world.connected) == 3


async def test_the_next_address_is_tried_where_one_does_not_answer() -> None:
    world = LocalWorld()
    world.names[HOST], world.unreachable = ["2606:4700::7", PUBLIC], {"2606:4700::7"}
    world.pieces = [answer(PNG)]
    async with world.running():
        assert await fetch(world) == [PNG]
    assert [address for address, _ in world.connected] == ["2606:4700::7", PUBLIC]


@pytest.mark.parametrize(
    "addresses",
    [
        [], ["127.0.0.1"], ["::1"], ["169.254.169.254"], ["10.0.0.1"], ["::ffff:8.8.8.8"], ["64:ff9b::808:808"],
        [PUBLIC, "127.0.0.1"], ["fe80::1%eth0"],
    ],
)  # fmt: skip
async def test_nothing_is_connected_to_unless_every_address_is_public(addresses: list[str]) -> None:
    world = LocalWorld()
    world.names[HOST] = addresses
    async with world.running():
        await expect_refusal(world)
    assert world.connected == []


async def test_a_name_that_changes_its_mind_gains_nothing() -> None:
    """Rebinding: the first answer is public, every later one is not; there is no second look-up."""
    world = LocalWorld()
    world.pieces = [answer(PNG)]

    async def rebinding(host: str) -> list[str]:
        world.resolved.append(host)
        return [PUBLIC] if len(world.resolved) == 1 else ["127.0.0.1"]

    async with world.running():
        assert await fetch(world, resolve=rebinding) == [PNG]
    assert (world.resolved, world.connected) == ([HOST], [(PUBLIC, 443)])


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 Other", "307 Temporary", "308 Permanent"])
async def test_no_redirect_is_followed(status: str) -> None:
    world = LocalWorld()
    world.pieces = [answer(PNG, "location: https://169.254.169.254/latest/meta-data/", status=status)]
    async with world.running():
        await expect_refusal(world)
    assert len(world.connected) == 1


@pytest.mark.parametrize(
    "wire",
    [
        answer(PNG, status="404 Not Found"),
        answer(PNG, status="206 Partial Content"),
        answer(PNG, status="500 Oops"),
        answer(PNG, media_type="text/html"),
        answer(PNG, media_type="image/svg+xml"),
        answer(PNG, "content-encoding: gzip"),
        answer(PNG, "content-length: 20000"),
        answer(PNG[:50], "content-length: 60"),
        answer(PNG, "content-length: -1"),
        answer(PNG, "content-length: " + "9" * 5000),
        answer(PNG, "content-length: 5", "transfer-encoding: chunked"),
        answer(b"zz\r\nabc\r\n", "transfer-encoding: chunked"),
        answer(b"4e20\r\n" + bytes(20_000) + b"\r\n0\r\n\r\n", "transfer-encoding: chunked"),
        answer(PNG, "x-long: " + "a" * 200_000),
        PNG,
        b"\r\n",
    ],
    ids=[
        "404", "206", "500", "html", "svg", "gzip", "long", "cut", "negative length", "endless length",
        "two lengths", "bad chunk", "long chunk", "long header", "no HTTP", "a line",
    ],
)  # fmt: skip
async def test_answers_that_are_refused(wire: bytes) -> None:
    world = LocalWorld()
    world.pieces = [wire]
    async with world.running():
        await expect_refusal(world)


async def test_an_endless_body_is_cut_off_at_the_limit() -> None:
    world, sent = LocalWorld(), 0

    def endless():
        nonlocal sent
        yield answer(b"", "transfer-encoding: chunked")
        while True:
            sent += 1000
            yield b"3e8\r\n" + bytes(1000) + b"\r\n"

    world.pieces = endless()
    async with world.running():
        await expect_refusal(world, timeout_s=60)
    assert sent < 10_000_000


async def test_all_images_of_a_request_are_bounded_together() -> None:
    world = LocalWorld()
    world.pieces = [answer(PNG)]
    async with world.running():
        assert len(await fetch(world, URL, URL, max_bytes=2 * len(PNG))) == 2
        await expect_refusal(world, URL, URL, max_bytes=2 * len(PNG) - 1)


@pytest.mark.parametrize("pieces", [(), [b"HTTP/1.1 200 OK\r\n"] + [b"x: y\r\n"] * 100], ids=["silent", "trickling"])
async def test_there_is_one_time_limit(pieces) -> None:
    world = LocalWorld()
    world.pieces, world.pause_s = pieces, 0.05
    async with world.running():
        await expect_refusal(world, timeout_s=0.3)


@pytest.mark.parametrize("certified", ["other.example", "*.images.example"])
async def test_the_certificate_must_be_the_host_s(certified: str) -> None:
    world = LocalWorld()
    async with world.running(certified):
        await expect_refusal(world)
    assert world.requests == []


async def test_the_certificate_must_be_trusted() -> None:
    world = LocalWorld()
    async with world.running():
        world.authority = trustme.CA()
        await expect_refusal(world)
    assert world.requests == []


async def test_a_host_that_nobody_knows_or_reaches() -> None:
    world = LocalWorld()
    await expect_refusal(world, f"https://{HOST}/a", hosts=f"{HOST},gone.example")
    await expect_refusal(world, "https://gone.example/a", hosts=f"{HOST},gone.example")


async def test_fetching_is_bounded_and_places_are_given_back() -> None:
    world = LocalWorld()
    async with world.running():
        images = world.images(timeout_s=20)
        wanted = [(FIELD, images.parse(URL, field=FIELD))]
        waiting = [asyncio.create_task(images.fetch(wanted, max_bytes=9)) for _ in range(MAX_CONCURRENT_REQUESTS)]
        while len(world.requests) < MAX_CONCURRENT_REQUESTS:
            await asyncio.sleep(0.01)
        with pytest.raises(ApiError) as caught:
            await images.fetch(wanted, max_bytes=9)
        assert caught.value.code == "overloaded"
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        world.pieces = [answer(PNG)]
        assert await images.fetch(wanted, max_bytes=10_000) == [PNG]


@pytest.mark.parametrize("name", [name for name, url in HOSTILE_URLS.items() if url[:5] != "data:"])
async def test_a_hostile_url_connects_to_nothing(name: str) -> None:
    world = LocalWorld()
    images = world.images(ALLOWED_HOSTS, resolve=SystemResolver())
    with pytest.raises(ApiError) as caught:
        await images.fetch([(FIELD, images.parse(HOSTILE_URLS[name], field=FIELD))], max_bytes=9)
    assert (caught.value.code, caught.value.param) == ("invalid_image", FIELD)
    assert world.connected == []


@pytest.mark.parametrize(
    "url",
    [
        f"https://{HOST}/",
        f"https://{HOST}/a/b%20c/~d;e=1,f@2:3!$&'()*+.png",
        f"https://{HOST}/?a=/b?c",
    ],
)
def test_unusual_urls_that_are_fine(url: str) -> None:
    assert LocalWorld().images().parse(url, field=FIELD) == (HOST, url.removeprefix(f"https://{HOST}"))


def test_without_hosts_nothing_is_allowed() -> None:
    images = LocalWorld().images("")
    with pytest.raises(ApiError, match="not fetched"):
        images.parse(URL, field=FIELD)


async def test_the_log_has_the_host_and_the_reason_but_no_path(caplog: pytest.LogCaptureFixture) -> None:
    world = LocalWorld()
    world.names[HOST] = ["10.0.0.1"]
    with caplog.at_level(logging.INFO, logger="service.images.remote"):
        await expect_refusal(world)
    assert HOST in caplog.text
    assert "not all public" in caplog.text
    assert "sig=" not in caplog.text


async def test_what_is_fetched_counts_as_held_before_it_is_kept() -> None:
    world, taken = LocalWorld(), []
    world.pieces = [answer(PNG)]

    def take(count: int) -> None:
        taken.append(count)
        if sum(taken) > len(PNG):
            raise ApiError("overloaded", "no room")

    async with world.running():
        images = world.images()
        wanted = [(FIELD, images.parse(URL, field=FIELD))]
        assert await images.fetch(wanted, max_bytes=100_000, take_bytes=take) == [PNG]
        assert sum(taken) == len(PNG)
        with pytest.raises(ApiError, match="no room"):
            await images.fetch(wanted, max_bytes=100_000, take_bytes=take)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "10.1.2.3", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254", "168.63.129.16",
        "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.1.1",
        "198.18.0.1", "198.19.255.255", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.1.1.1", "240.0.0.1",
        "255.255.255.255", "::", "::1", "::127.0.0.1", "::ffff:8.8.8.8", "::ffff:127.0.0.1", "64:ff9b::808:808",
        "64:ff9b:1::1", "100::1", "2001::1", "2001:20::1", "2001:db8::1", "2002:808:808::1", "3fff::1", "fc00::1",
        "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "5f00::1",
        "", "localhost", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "8.8.8.8 ", "８.8.8.8", "8.8.8.8:443",
    ],
)  # fmt: skip
def test_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "8.8.8.8", "100.63.255.255", "172.32.0.1", "2606:4700::1111", "2a00:1450:4001::1"]
)
def test_public(address: str) -> None:
    assert is_public(address)


@given(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)))
def test_what_the_standard_library_calls_special_is_not_public(address: IPv4Address | IPv6Address) -> None:
    parsed = ip_address(address)
    special = parsed.is_private or parsed.is_multicast or parsed.is_reserved or parsed.is_loopback
    assert not (special and is_public(str(address)))
