"""Spans for OpenTelemetry, sent to a collector where one is set. Attributes are numbers and names, as in the log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry.trace import NoOpTracer, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers

from service import VERSION
from service.metrics.request_record import RequestRecord

SERVICE_NAME = "vl-sae-steering"
EXPORT_EVERY_MS = 1000
EXPORT_TIMEOUT_S = 5
W3C = TraceContextTextMapPropagator()


class Tracing:
    """A request is one span, the steps of its work are its children."""

    def __init__(self, endpoint: str | None) -> None:
        """`endpoint`: a collector's base URL (OTLP over HTTP); None: nothing is traced."""
        self._provider = _provider(endpoint) if endpoint else None
        self._tracer: Tracer = self._provider.get_tracer(SERVICE_NAME, VERSION) if self._provider else NoOpTracer()

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
    provider = TracerProvider(resource=Resource.create({"service.name": SERVICE_NAME, "service.version": VERSION}))
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
