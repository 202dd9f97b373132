"""What surrounds every request: its id, its record, and at its end a log line, the counters and a trace."""

from __future__ import annotations

import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.http.headers import REQUEST_ID_HEADER, assignment_headers, request_id_of
from service.metrics.logs import log_request
from service.metrics.meter import Metrics
from service.metrics.request_record import RequestRecord
from service.metrics.tracing import Tracing

METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


class RequestObserver:
    """Outermost ASGI middleware."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, tracing: Tracing, proxied: bool) -> None:
        """`proxied`: Serve's proxy stands before us; it makes the request id where there is none and returns it."""
        self._app, self._metrics, self._tracing, self._proxied = app, metrics, tracing, proxied

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
                await self._app(scope, receive, observed_send)
            finally:
                self._end(record, scope)

    def _end(self, record: RequestRecord, scope: Scope) -> None:
        if "caller" in scope["state"]:
            record.key = scope["state"]["caller"].name or None
        record.duration_s = time.monotonic() - record.arrived
        self._metrics.count_response(record)
        log_request(record)
