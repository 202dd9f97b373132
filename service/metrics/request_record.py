"""What is known of one HTTP request, filled in on its way, and how it is told when it has ended: a line of the log, and
a span for OpenTelemetry, sent to a collector where one is set. No prompt, no picture, no key and no header value ever
enters it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from opentelemetry.trace import (
    INVALID_SPAN,
    NoOpTracer,
    Span,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import Scope

from service import APPLICATION, VERSION
from service.artifacts import MAIN
from service.errors import ERROR_KINDS
from service.experiments.arms import NO_ARM
from service.experiments.assignment import Assignment
from steering.engines.base import Receipt

requests = logging.getLogger("service.requests")
QUIET_ROUTES = frozenset(("/healthz", "/readyz", "/metrics"))
"""Asked by machines every few seconds; logged only when refused."""
LOGGED = (
    "request_id", "completion_id", "method", "route", "status", "error_code", "key", "duration_s",
    "time_to_first_token_s", "inter_token_s", "stream", "finish", "prompt_tokens", "completion_tokens", "choices",
    "empty_choices", "images", "image_pixels", "artifact",
)  # fmt: skip
LOGGED_OF_RECEIPT = ("artifact", "applied", "reason", "preset", "strength", "arm")
EXPORT_EVERY_MS = 1000
EXPORT_TIMEOUT_S = 5
W3C = TraceContextTextMapPropagator()


@dataclass(kw_only=True)
class RequestRecord:
    """One request; None is 'not known' or 'has none'."""

    request_id: str
    method: str
    arrived: float = field(default_factory=time.monotonic)
    """time.monotonic() at its first byte."""
    route: str = "unknown"
    """The route's template, never the path that the client wrote."""
    status: int | None = None
    """HTTP status that went out; None: the client left before there was one."""
    error_code: str | None = None
    """A key of ERROR_KINDS, where the client was told of an error, be it inside a stream."""
    key: str | None = None
    """The name of the caller's key."""
    completion_id: str | None = None
    stream: bool | None = None
    images: int = 0
    image_pixels: int = 0
    artifact: str = MAIN
    """The name of the one that was to answer."""
    assignment: Assignment | None = None
    """What the experiment in force meant for it."""
    time_to_first_token_s: float | None = None
    inter_token_s: float | None = None
    """Mean time between two tokens of a choice."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    choices: int | None = None
    """Of a whole answer."""
    empty_choices: int | None = None
    """Those without any text."""
    finish: str | None = None
    """stop, length, cancelled or error, where the request reached the model."""
    receipt: Receipt | None = None
    duration_s: float = 0.0
    span: Span = INVALID_SPAN
    """The trace's span of this request; invalid where nothing is traced."""

    @property
    def arm(self) -> str:
        """What metrics count it under."""
        return NO_ARM if self.assignment is None else self.assignment.label

    @property
    def failed(self) -> bool:
        """Whether the service is at fault. A stream that breaks has the status 200, a client that left has none."""
        status = ERROR_KINDS[self.error_code].status if self.error_code else self.status
        return status is not None and status >= 500

    def facts(self) -> dict[str, object]:
        """What the log says, flat, without what is not known."""
        facts: dict[str, object] = {name: _rounded(getattr(self, name)) for name in LOGGED}
        facts["images"], facts["image_pixels"] = self.images or None, self.image_pixels or None
        facts["artifact"] = self.artifact if self.completion_id else None
        if self.receipt:
            facts["steering"] = {
                **{name: getattr(self.receipt, name) for name in LOGGED_OF_RECEIPT},
                "relative_shift": _mean(self.receipt.relative_shift),
                "mismatch": _mean([one.before for one in self.receipt.mismatch or () if one is not None]),
            }
        facts["experiment"] = self.assignment and assignment_facts(self.assignment)
        return {name: value for name, value in facts.items() if value is not None}


def assignment_facts(assignment: Assignment) -> dict[str, object]:
    """What a report needs to know."""
    facts = {
        "name": assignment.experiment,
        "salt": assignment.seed,
        "default": assignment.default,
        "arm": assignment.label,
        "share": assignment.arm.weight if assignment.arm is not None and assignment.reason == "unit" else None,
        "unit": assignment.unit,
    }
    return {name: value for name, value in facts.items() if value is not None}


def _rounded(value: object) -> object:
    return round(value, 6) if isinstance(value, float) else value


def _mean(numbers: list[float]) -> float | None:
    return round(sum(numbers) / len(numbers), 6) if numbers else None


def record_of(scope: Scope) -> RequestRecord:
    """The record of the request that this ASGI scope belongs to."""
    return scope["state"]["record"]


def log_request(record: RequestRecord) -> None:
    """The one line of a request."""
    if record.route in QUIET_ROUTES and record.status == 200:
        return
    level = logging.INFO
    if record.error_code == "internal_error":
        level = logging.ERROR
    elif record.failed:
        level = logging.WARNING
    requests.log(level, "request", extra={"facts": record.facts()})


class Tracing:
    """A request is one span, the steps of its work are its children."""

    def __init__(self, endpoint: str | None) -> None:
        """`endpoint`: a collector's base URL (OTLP over HTTP); None: nothing is traced."""
        self._provider = _provider(endpoint) if endpoint else None
        self._tracer: Tracer = self._provider.get_tracer(APPLICATION, VERSION) if self._provider else NoOpTracer()

    @contextmanager
    def request(self, record: RequestRecord, headers: Headers) -> Iterator[None]:
        """The whole request, continuing the caller's trace where `traceparent` names one.

        `tracestate` is left out: it is text of the caller's, and would be passed on to the collector.
        """
        carrier = {"traceparent": headers["traceparent"]} if "traceparent" in headers else {}
        record.span = self._tracer.start_span(record.method, W3C.extract(carrier), kind=SpanKind.SERVER)
        try:
            yield
        finally:
            if record.span.is_recording():
                _describe(record)
            record.span.end()

    @contextmanager
    def step(self, record: RequestRecord, name: str) -> Iterator[None]:
        """A part of the request's work."""
        parent = set_span_in_context(record.span)
        span = self._tracer.start_span(name, parent)
        try:
            yield
        except Exception:  # a client that leaves is none
            span.set_status(Status(StatusCode.ERROR))
            raise
        finally:
            span.end()

    def close(self) -> None:
        """Send what is left."""
        if self._provider:
            self._provider.shutdown()


def _provider(endpoint: str):
    """OpenTelemetry's SDK is imported only where it is wanted."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces", timeout=EXPORT_TIMEOUT_S)
    provider = TracerProvider(resource=Resource.create({"service.name": APPLICATION, "service.version": VERSION}))
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=EXPORT_EVERY_MS))
    return provider


def _describe(record: RequestRecord) -> None:
    """OpenTelemetry's names where there are any, ours for the rest."""
    span, receipt, assignment = record.span, record.receipt, record.assignment
    span.update_name(f"{record.method} {record.route}")
    attributes = {
        "http.request.method": record.method,
        "http.route": record.route,
        "http.response.status_code": record.status,
        "error.type": record.error_code,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "gen_ai.response.id": record.completion_id,
        "vlsae.request_id": record.request_id,
        "vlsae.key": record.key,
        "vlsae.images": record.images,
        "vlsae.image_pixels": record.image_pixels,
        "vlsae.time_to_first_token_s": record.time_to_first_token_s,
        "vlsae.finish": record.finish,
        "vlsae.applied": receipt and receipt.applied,
        "vlsae.preset": receipt and receipt.preset,
        "vlsae.strength": receipt and receipt.strength,
        "vlsae.experiment": assignment and assignment.experiment,
        "vlsae.arm": assignment and assignment.label,
    }
    for name, value in attributes.items():
        if value is not None:
            span.set_attribute(name, value)
    if record.failed:
        span.set_status(Status(StatusCode.ERROR))
