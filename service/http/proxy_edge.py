"""What stands between a client and Ray Serve's HTTP proxy, in the proxy's own process.

Serve answers in plain text where it has nobody to ask, lets even a probe wait until a lost replica is back, ends a
stream in the middle where a replica is lost, waits for ever for a client that takes nothing, keeps all that a client
sends, and lets one that was refused go on sending. Here each becomes what an OpenAI client understands, or an end.
Serve calls `middlewares` where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it. Knows no model, of the settings only
how large a body and all bodies may be, and routes but to count by them.
"""

from __future__ import annotations

import asyncio
import logging
import os

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from service.chat.admission import MemoryBudget
from service.errors import ApiError
from service.http.edge_exchange import Exchange
from service.http.http_connection import bound_connections
from service.http.request_guard import check_headers
from service.http.request_id import REQUEST_ID_HEADER, request_id_of
from service.http.routes import BY_PATH
from service.metrics.meter import Metrics
from service.metrics.request_record import RequestRecord
from service.settings import ENVIRONMENT_PREFIX, Settings

log = logging.getLogger(__name__)
VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
IMPORT_PATH = "service.http.proxy_edge.middlewares"
"""Its value."""
LIMITS = {field: ENVIRONMENT_PREFIX + field.upper() for field in ("max_body_bytes", "max_memory_bytes")}
"""Settings, by the variable in which the proxy's process can see them. Serve keeps what has come of a body in memory,
read or not."""
MAX_IDLE_BODY_BYTES = 16 * 1024
"""Of a body that nobody reads: only a POST has one that somebody does."""
IGNORED_HEADERS = ("x-session-id", "serve-multiplexed-model-id")
"""Serve's proxy would choose replicas by these, also with `_` for `-`, and fail where one is not UTF-8."""
WRITE_TIMEOUT_S = 30.0
"""A client that takes no piece for so long, while there is more than the buffers hold, is treated as gone."""
LINGER_S = 2.0
"""How long a refused client may go on sending before the connection is closed: closed at once, it might lose the
answer."""
GET_TIMEOUT_S = 5.0
"""What is only looked up is answered by then, or the process that should have is not there."""
ROUTE_LIST = "/-/routes"


def middlewares() -> list[Middleware]:
    """For Ray Serve, which asks for them before it starts its server."""
    bound_connections()
    defaults = Settings.model_fields
    limits = {field: int(os.environ.get(variable) or defaults[field].default) for field, variable in LIMITS.items()}
    return [Middleware(ProxyEdge, metrics=Metrics(), **limits)]


class ProxyEdge:
    """ASGI middleware around Serve's proxy."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        max_body_bytes: int,
        max_memory_bytes: int,
        write_timeout_s: float = WRITE_TIMEOUT_S,
        linger_s: float = LINGER_S,
        get_timeout_s: float = GET_TIMEOUT_S,
    ) -> None:
        """`max_memory_bytes`: of all bodies whose answers have not begun, and of large answers."""
        self._app, self._metrics, self._write_timeout_s = app, metrics, write_timeout_s
        self._max_body_bytes, self._linger_s, self._get_timeout_s = max_body_bytes, linger_s, get_timeout_s
        self._memory = MemoryBudget(max_memory_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/-/healthz":  # KubeRay's probes understand Serve's own answer
            await self._app(scope, receive, send)
            return
        refused = settle_headers(scope)
        limit = self._max_body_bytes if scope["method"] == "POST" else MAX_IDLE_BODY_BYTES
        if scope["path"] == ROUTE_LIST or not scope["path"].startswith("/"):
            refused = ApiError("route_not_found", "there is no such path")
        with self._memory.share("") as body, self._memory.share("") as answer:
            exchange = Exchange(
                scope,
                receive,
                send,
                write_timeout_s=self._write_timeout_s,
                max_body_bytes=limit,
                held_body=body,
                held_answer=answer,
            )
            exchange.refused = refused
            if refused is None:
                exchange.refuse_by_length()
            if exchange.refused is None:
                await self._ask(scope, exchange)
            await exchange.finish(self._linger_s)
        if exchange.told is not None:
            self._count(scope, exchange)

    async def _ask(self, scope: Scope, exchange: Exchange) -> None:
        """Serve's proxy, for as long as it may take; that it failed is logged, and what it left open says the rest."""
        timer = None
        if scope["method"] != "POST":
            timer = asyncio.get_running_loop().call_later(self._get_timeout_s, exchange.give_up)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except Exception:
            log.exception("Serve's proxy failed on a request")
        finally:
            if timer is not None:
                timer.cancel()

    def _count(self, scope: Scope, exchange: Exchange) -> None:
        """As the application counts what it answers."""
        told = exchange.told
        assert told is not None
        route = scope["path"] if scope["path"] in BY_PATH else "unknown"
        status = 200 if exchange.broke_off else told.status
        record = RequestRecord(request_id="", method=scope["method"], route=route, status=status, error_code=told.code)
        self._metrics.count_response(record)


def settle_headers(scope: Scope) -> ApiError | None:
    """What is wrong with a client's headers, if anything. From here on none is left that is only Serve's to know, and
    the request has one id, which Serve logs and returns.
    """
    scope["headers"] = [
        (name, value)
        for name, value in scope["headers"]
        if name.decode("latin-1").lower().replace("_", "-") not in IGNORED_HEADERS
    ]
    headers, refused = MutableHeaders(scope=scope), None
    try:
        check_headers(headers)
    except ApiError as error:
        refused = error
    headers[REQUEST_ID_HEADER] = request_id_of(headers)
    return refused
