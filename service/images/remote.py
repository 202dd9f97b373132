"""Images of `https://` URLs, fetched from the hosts an operator allows. Off unless there are such hosts.

A URL is parsed once, by one strict expression. Its host must be in the list; its name is resolved once per connection,
every address must be public, and the connection goes to an address that was checked, so that a name that changes its
mind in between gains nothing. The name stays for the certificate and the Host header. No redirect is followed, no proxy
of the environment is used, and what went wrong is told to the log alone. Knows nothing of requests, pixels or Ray.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from ipaddress import IPv4Address, IPv6Network, ip_address, ip_network
from ssl import SSLContext
from typing import NamedTuple, cast

import httpcore

from service.errors import ApiError

log = logging.getLogger(__name__)
PORT = 443
MAX_URL_CHARACTERS = 4096
MAX_CONCURRENT_REQUESTS = 16
"""Requests of one ingress replica whose images are being fetched; one more is refused, none waits."""
LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
PATH = r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})*"
HTTPS_URL = re.compile(rf"https://(?P<host>{LABEL}(?:\.{LABEL})*)(?::443)?(?P<target>/{PATH}(?:\?(?:{PATH}|\?)*)?)")
NOT_PUBLIC = tuple(map(ip_network, (
    "168.63.129.16/32",  # a cloud's own services
    "192.0.0.0/24", "192.88.99.0/24",  # protocol assignments, relays of 6to4
    "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20",  # protocol assignments with Teredo, documentation, 6to4
)))  # fmt: skip
"""Beside what Python knows: these lead into an operator's own network, or carry another address inside them."""
UNICAST_IPV6 = IPv6Network("2000::/3")
"""All that is assigned to hosts so far: loopback, link-local, unique local, multicast, mapped, NAT64 lie outside."""
MEDIA_TYPES = ("image/jpeg", "image/png", "image/webp", "image/gif")

Resolver = Callable[[str], Awaitable[Sequence[str]]]
"""Host name to its addresses, IPv4 and IPv6; raises OSError."""


class RemoteUrl(NamedTuple):
    """The two parts of a URL that are not the same for all."""

    host: str
    """In lower case."""
    target: str
    """Path and query as they go over the wire."""


class NotFetched(Exception):
    """Why an image was not taken; for the log, never for the client."""


class SystemResolver:
    """This machine's resolver, in threads of its own: a name server that does not answer holds up nothing else."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(MAX_CONCURRENT_REQUESTS, thread_name_prefix="image-host")

    async def __call__(self, host: str) -> list[str]:
        found = await asyncio.get_running_loop().run_in_executor(self._threads, self._look_up, host)
        return [str(address[0]) for *_, address in found]

    @staticmethod
    def _look_up(host: str) -> list[tuple]:
        return socket.getaddrinfo(host, PORT, type=socket.SOCK_STREAM)


class CheckedConnector(httpcore.AsyncNetworkBackend):
    """Connects to a host's address after judging all of its addresses."""

    def __init__(self, resolve: Resolver, connector: httpcore.AsyncNetworkBackend) -> None:
        self._resolve, self._connector = resolve, connector

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Raises NotFetched where an address is not public, ConnectError where none of them answers."""
        addresses = list(dict.fromkeys(await self._resolve(host)))
        if not addresses or not all(map(is_public, addresses)):
            raise NotFetched("the host's addresses are not all public")
        for address in addresses:
            try:
                return await self._connector.connect_tcp(address, port, timeout, local_address, socket_options)
            except httpcore.ConnectError:
                continue
        raise httpcore.ConnectError("no address answers")


def tcp_connector() -> httpcore.AsyncNetworkBackend:
    """What really connects. httpcore hides its type where anyio is not installed; here it is."""
    return cast(httpcore.AsyncNetworkBackend, httpcore.AnyIOBackend())


def is_public(address: str) -> bool:
    """Whether it belongs to a host of the public Internet. False as well for what is no address in its usual form."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    assigned = isinstance(parsed, IPv4Address) or parsed in UNICAST_IPV6
    special = parsed.is_multicast or any(parsed in network for network in NOT_PUBLIC)
    return assigned and parsed.is_global and not special


class ByteBudget:
    """What all images of one request may still take together."""

    def __init__(self, max_bytes: int, take_bytes: Callable[[int], None]) -> None:
        self._left, self._take_bytes = max_bytes, take_bytes

    def spend(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise NotFetched("the request's images are too large together")
        self._take_bytes(count)


class RemoteImages:
    """Fetches the images of one request at a time for up to MAX_CONCURRENT_REQUESTS of them."""

    def __init__(
        self,
        hosts: str,
        *,
        timeout_s: float,
        max_image_bytes: int,
        resolve: Resolver | None = None,
        connector: httpcore.AsyncNetworkBackend | None = None,
        tls: SSLContext | None = None,
    ) -> None:
        """`hosts` are exact names separated by commas; the last three stand in for the world in tests."""
        self._hosts = frozenset(host.lower() for host in hosts.split(",") if host)
        self._timeout_s, self._max_image_bytes = timeout_s, max_image_bytes
        self._resolve, self._connector, self._given_tls = resolve, connector, tls
        self._fetching = 0

    @cached_property
    def _backend(self) -> CheckedConnector:
        return CheckedConnector(self._resolve or SystemResolver(), self._connector or tcp_connector())

    @cached_property
    def _tls(self) -> SSLContext:
        return self._given_tls or httpcore.default_ssl_context()

    def parse(self, url: str, *, field: str) -> RemoteUrl:
        """Raises ApiError naming `field` for what is not an https:// URL of an allowed host."""
        found = HTTPS_URL.fullmatch(url) if len(url) <= MAX_URL_CHARACTERS else None
        if found is None:
            raise ApiError(
                "invalid_image",
                f"{field}: must be a data: URL with base64, or https://HOST/PATH of at most {MAX_URL_CHARACTERS} "
                "characters without a user, a fragment or a port other than 443",
                param=field,
            )
        host = found["host"].lower()
        if host not in self._hosts:
            raise ApiError(
                "invalid_image", f"{field}: images of this host are not fetched; send a data: URL", param=field
            )
        return RemoteUrl(host, found["target"])

    async def fetch(
        self,
        urls: Sequence[tuple[str, RemoteUrl]],
        *,
        max_bytes: int,
        take_bytes: Callable[[int], None] = lambda _count: None,
    ) -> list[bytes]:
        """The encoded images of (field, URL), within one time limit and `max_bytes` together. Raises ApiError.

        `take_bytes` is told of every piece before it is kept, and may raise.
        """
        if not urls:
            return []
        if self._fetching >= MAX_CONCURRENT_REQUESTS:
            raise ApiError("overloaded", "too many requests with remote images at once; try again later")
        self._fetching += 1
        try:
            return await self._fetch_in_time(urls, ByteBudget(max_bytes, take_bytes))
        finally:
            self._fetching -= 1

    async def _fetch_in_time(self, urls: Sequence[tuple[str, RemoteUrl]], budget: ByteBudget) -> list[bytes]:
        pool = httpcore.AsyncConnectionPool(
            ssl_context=self._tls, network_backend=self._backend, max_connections=len(urls)
        )
        try:
            async with asyncio.timeout(self._timeout_s), pool, asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._fetch_one(pool, url, field, budget)) for field, url in urls]
            return [task.result() for task in tasks]
        except TimeoutError:
            field, url = urls[0]
            raise self._refusal(field, url, "the time is over") from None
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _fetch_one(
        self, pool: httpcore.AsyncConnectionPool, url: RemoteUrl, field: str, budget: ByteBudget
    ) -> bytes:
        address = httpcore.URL(scheme=b"https", host=url.host.encode(), port=PORT, target=url.target.encode())
        headers = [("Host", url.host), ("Accept", ", ".join(MEDIA_TYPES)), ("Accept-Encoding", "identity")]
        try:
            async with pool.stream("GET", address, headers=headers) as response:
                check_head(response, self._max_image_bytes)
                body = bytearray()
                async for piece in response.aiter_stream():
                    budget.spend(len(piece))
                    body += piece
                    if len(body) > self._max_image_bytes:
                        raise NotFetched("the image is too large")
                return bytes(body)
        except NotFetched as error:
            raise self._refusal(field, url, str(error)) from None
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
            raise self._refusal(field, url, type(error).__name__) from None

    def _refusal(self, field: str, url: RemoteUrl, reason: str) -> ApiError:
        """One answer for every reason: whoever asks learns nothing about the network behind this server."""
        log.info("a remote image of %s was not taken: %s", url.host, reason)
        return ApiError(
            "invalid_image",
            f"{field}: could not be fetched as a JPEG, PNG, WebP or GIF image of at most {self._max_image_bytes} bytes "
            f"within {self._timeout_s:g} s; send a data: URL",
            param=field,
        )


def check_head(response: httpcore.Response, max_bytes: int) -> None:
    """Raises NotFetched for an answer whose body need not be read."""
    if response.status != 200:
        raise NotFetched(f"status {response.status}")
    headers = {name.lower(): value for name, value in response.headers}
    media_type = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if media_type.decode("latin-1") not in MEDIA_TYPES:
        raise NotFetched("not one of the media types")
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise NotFetched("the body is encoded")
    if int(headers.get(b"content-length", b"0")) > max_bytes:
        raise NotFetched("the image is too large")
