"""What surrounds every request. Before it: an id and a record; headers that are not for clients are refused, keys are
asked for. After it: no exception has got out; a log line, the counters and a trace.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from contextlib import suppress
from ipaddress import ip_address

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.routing import Route as ServedRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.callers.keys import ANYBODY, Caller, KeyRing, authenticate, require
from service.callers.ledger import Ledger, RayLedger, charge
from service.errors import ApiError
from service.experiments.assignment import Assignment
from service.http.routes import BY_PATH, Route
from service.metrics.exposition import Metrics
from service.metrics.request_record import RequestRecord, Tracing, log_request
from service.settings import Settings

log = logging.getLogger(__name__)
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
REQUEST_ID_HEADER = "x-request-id"
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
REQUEST_IDS = (REQUEST_ID_HEADER, REQUEST_ID, "128 letters, digits and . _ : -")
ARM_HEADER, ASSIGNMENT_HEADER = "x-vlsae-arm", "x-vlsae-assignment"
PORT = re.compile(r":\d{1,5}$")
LONGEST_LENGTH = 20
"""Digits of a content-length; Python refuses to read thousands of them."""
PROXY_HEADERS = ("x-request-disconnect-disabled", "x-request-timeout-seconds")
"""Ray Serve's proxy obeys these: with them a client could keep a generation running after it has gone."""
GATEWAY_HEADER = "x-vlsae-gateway"
"""`on` in all that comes through a gateway, which lets no client say so."""


class Middleware:
    """ASGI's outermost. Serve's proxy makes the request id where there is none, and returns it as a header."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        tracing: Tracing,
        keys: KeyRing | None,
        ledger: Ledger | RayLedger,
        settings: Settings,
        proxied: bool,
    ) -> None:
        """Without `keys` everybody may do everything. `proxied`: behind Serve's proxy."""
        self._app, self._metrics, self._tracing, self._keys, self._ledger = app, metrics, tracing, keys, ledger
        self._settings, self._proxied = settings, proxied

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        method = scope["method"] if scope["method"] in METHODS else "other"
        record = RequestRecord(request_id=request_id_of(headers), method=method)
        scope["state"] = {**scope.get("state", {}), "record": record}

        async def observed_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status, answered = message["status"], MutableHeaders(scope=message)
                answered.update(assignment_headers(record.assignment))
                if not self._proxied:
                    answered[REQUEST_ID_HEADER] = record.request_id
            await send(message)

        with self._tracing.request(record, headers):
            try:
                await self._answer(record, headers, scope, receive, observed_send)
            finally:
                record.duration_s = time.monotonic() - record.arrived
                self._metrics.count_response(record)
                log_request(record)

    async def _answer(
        self, record: RequestRecord, headers: Headers, scope: Scope, receive: Receive, send: Send
    ) -> None:
        try:
            route = find_route(scope)
            record.route = route.path if route else "unknown"
            check_headers(headers)
            if self._settings.only_local_names:
                check_host(headers)
            scope["state"]["caller"] = caller = await self._admit(route, headers)
            record.key = caller.name or None
            await self._app(scope, receive, send)
        except ApiError as error:
            record.error_code = error.code
            await error.response()(scope, receive, send)
        except ClientDisconnect:
            pass  # in the middle of its body: nobody is there to be answered
        except Exception:
            log.exception("a request failed in a way nobody foresaw")
            record.error_code = "internal_error"
            if record.status is None:
                await ApiError("internal_error", "the server failed on this request").response()(scope, receive, send)

    async def _admit(self, route: Route | None, headers: Headers) -> Caller:
        """Raises ApiError. Who has no key is not told which paths there are."""
        if route is not None and route.scope is None:
            return ANYBODY
        if self._settings.behind_gateway and (route is None or route.scope != "metrics"):  # scrapes need none
            check_gateway(headers)
        caller = ANYBODY
        if self._keys is not None:
            caller = authenticate(self._keys, headers.getlist("authorization"))
            await charge(self._ledger, caller, requests=1)
        if route is None:
            raise ApiError("route_not_found", "there is no such path")
        assert route.scope is not None, "those are public"
        require(caller, route.scope)
        return caller


def find_route(scope: Scope) -> Route | None:
    """The route that a request is for, whatever its method, which is the router's matter."""
    for served in scope["app"].routes:
        if isinstance(served, ServedRoute) and served.matches(scope)[0] is not Match.NONE:
            return BY_PATH.get(served.path)
    return None


def request_id_of(headers: Headers) -> str:
    """The caller's, where it sent one and we accept it; else a new one."""
    with suppress(ApiError):
        return only(headers, *REQUEST_IDS) or uuid.uuid4().hex
    return uuid.uuid4().hex


def only(headers: Headers, name: str, form: re.Pattern[str], of: str) -> str | None:
    """The one header of this name, if any. Raises ApiError for more, and for what is not in its form."""
    given = headers.getlist(name)
    if len(given) > 1 or not all(form.fullmatch(one) for one in given):
        raise ApiError("invalid_header", f"{name}: send one of at most {of}, or none", param=name)
    return given[0] if given else None


def check_headers(headers: Headers) -> None:
    """Raises ApiError for what a client may not send."""
    only(headers, *REQUEST_IDS)
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


def assignment_headers(assignment: Assignment | None) -> dict[str, str]:
    """Whose steering it was, and why: both, or none where no experiment runs."""
    if assignment is None:
        return {}
    return {ARM_HEADER: assignment.shown, ASSIGNMENT_HEADER: assignment.reason}
