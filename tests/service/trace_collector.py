"""A collector of OpenTelemetry traces (OTLP over HTTP, protobuf) on loopback, for tests to look into."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class TraceCollector:
    """What has arrived so far."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.received = b""
        """All bodies, one after the other."""
        self._spans: list[Span] = []

    def take(self, body: bytes) -> None:
        self.received += body
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                self._spans += scope.spans

    def trace(self, trace_id: str) -> dict[str, Span]:
        """Spans of one trace by name, once its request's own span is there; that is the last to end."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            spans = {span.name: span for span in list(self._spans) if span.trace_id.hex() == trace_id}
            if any(span.kind == Span.SPAN_KIND_SERVER for span in spans.values()):
                return spans
            time.sleep(0.05)
        raise AssertionError(f"no trace {trace_id} has arrived")


@contextmanager
def collecting_traces() -> Iterator[TraceCollector]:
    """A collector that listens inside the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            collector.take(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Not on the test's output."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector = TraceCollector(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def attributes(span: Span) -> dict[str, object]:
    """As Python values."""
    return {one.key: getattr(one.value, one.value.WhichOneof("value") or "") for one in span.attributes}
