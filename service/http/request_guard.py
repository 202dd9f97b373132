"""What every request passes first: headers that are not for clients are refused, keys are asked for, and no exception
gets out.
"""

from __future__ import annotations

import logging
import re
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.callers.access import Access, require
from service.callers.keys import ANYBODY, Caller
from service.errors import ApiError
from service.http.headers import check_request_id
from service.http.routes import Route, find_route
from service.metrics.request_record import record_of

log = logging.getLogger(__name__)
PORT = re.compile(r":\d{1,5}$")
LONGEST_LENGTH = 20
"""Digits of a content-length; Python refuses to read thousands of them."""
PROXY_HEADERS = ("x-request-disconnect-disabled", "x-request-timeout-seconds")
"""Ray Serve's proxy obeys these: with them a client could keep a generation running after it has gone."""
GATEWAY_HEADER = "x-vlsae-gateway"
"""`on` in all that comes through a gateway, which lets no client say so."""


class RequestGuard:
    """ASGI middleware. Serve's proxy makes the request id where there is none, and returns it as a header."""

    def __init__(self, app: ASGIApp, *, access: Access, only_local_names: bool, behind_gateway: bool) -> None:
        """`behind_gateway`: all but probes and scrapes must come through one."""
        self._app, self._access, self._only_local_names = app, access, only_local_names
        self._behind_gateway = behind_gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            headers, route = Headers(scope=scope), find_route(scope)
            record_of(scope).route = route.path if route else "unknown"
            check_headers(headers)
            if self._only_local_names:
                check_host(headers)
            scope["state"]["caller"] = await self._admit(route, headers)
            await self._app(scope, receive, watched_send)
        except ApiError as error:
            record_of(scope).error_code = error.code
            await error.response()(scope, receive, send)
        except ClientDisconnect:
            pass  # in the middle of its body: nobody is there to be answered
        except Exception:
            log.exception("a request failed in a way nobody foresaw")
            record_of(scope).error_code = "internal_error"
            if not started:
                await ApiError("internal_error", "the server failed on this request").response()(scope, receive, send)

    async def _admit(self, route: Route | None, headers: Headers) -> Caller:
        """Raises ApiError. Who has no key is not told which paths there are."""
        if route is not None and route.scope is None:
            return ANYBODY
        if self._behind_gateway and (route is None or route.scope != "metrics"):
            check_gateway(headers)
        caller = await self._access.admit(headers)
        if route is None:
            raise ApiError("route_not_found", "there is no such path")
        assert route.scope is not None
        require(caller, route.scope)
        return caller


def check_headers(headers: Headers) -> None:
    """Raises ApiError for what a client may not send."""
    check_request_id(headers)
    if len(headers.get("content-length", "")) > LONGEST_LENGTH:
        raise ApiError("invalid_header", "content-length: this is not the length of any body", param="content-length")
    for name in PROXY_HEADERS:
        if name in headers:
            raise ApiError("invalid_header", f"{name}: this header is not accepted", param=name)


def check_gateway(headers: Headers) -> None:
    """The limits that the setting `gateway` promises are nowhere else. Raises ApiError."""
    if headers.get(GATEWAY_HEADER) != "on":
        log.warning("a request came without %s: on: past the gateway that the settings promise", GATEWAY_HEADER)
        raise ApiError("permission_denied", "this service is to be asked through its gateway, which this was not")


def check_host(headers: Headers) -> None:
    """A web page whose name was made to lead to this machine still sends its name. Raises ApiError."""
    name = PORT.sub("", headers.get("host", "")).strip("[]").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return
    try:
        ip_address(name)
    except ValueError:
        raise ApiError(
            "invalid_header", "host: without keys only IP addresses and localhost are answered to", param="host"
        ) from None
