"""Spans as a real collector receives them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from service.errors import ApiError
from service.http.api import build_api
from service.images.decoder import DecoderLimits, ImageDecoder
from service.settings import Settings
from tests.service.examples import ScriptedModel, body, delta, image_part, user
from tests.service.trace_collector import TraceCollector, attributes, collecting_traces

CHAT = "/v1/chat/completions"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Left(ScriptedModel):
    """Its client leaves after one token."""

    async def generate(self, job):
        async for event in ScriptedModel(delta(0, "a")).generate(job):
            yield event
        raise asyncio.CancelledError


async def asked(
    collector: TraceCollector, *events, model: ScriptedModel | None = None, flags: str = "01", stream: bool = False
) -> httpx.Response:
    """One request that belongs to a trace of its caller's, to a service that ends after it."""
    settings = Settings(model="/models/tiny", artifact="/a", allow_anonymous=True, traces_endpoint=collector.endpoint)
    decoder = ImageDecoder(workers=1, limits=DecoderLimits(max_side=999))
    api = build_api(settings, model or ScriptedModel(*events), decoder)
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-{flags}", "x-request-id": "r-1"}
    try:
        async with api.router.lifespan_context(api):
            transport = httpx.ASGITransport(app=api)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.post(
                    CHAT, json=body(user(image_part(), "a secret"), stream=stream), headers=headers
                )
    finally:
        decoder.close()


@pytest.fixture
async def collector() -> AsyncIterator[TraceCollector]:
    with collecting_traces() as collector:
        yield collector


async def test_a_request_and_its_steps(collector: TraceCollector) -> None:
    assert (await asked(collector)).status_code == 200
    spans = collector.trace(TRACE)
    request = spans.pop(f"POST {CHAT}")
    assert request.kind == Span.SPAN_KIND_SERVER
    assert request.parent_span_id.hex() == PARENT
    assert set(spans) == {"images", "queue", "generation"}
    assert {span.parent_span_id for span in spans.values()} == {request.span_id}
    began = [spans[name].start_time_unix_nano for name in ("images", "queue", "generation")]
    assert began == sorted(began)
    known = attributes(request)
    assert known["http.response.status_code"] == 200
    assert known["gen_ai.usage.output_tokens"] == 3
    assert (known["vlsae.request_id"], known["vlsae.images"], known["vlsae.applied"]) == ("r-1", 1, True)
    assert b"secret" not in collector.received


async def test_a_failure(collector: TraceCollector) -> None:
    assert (await asked(collector, ApiError("engine_unavailable", "a secret"))).status_code == 503
    spans = collector.trace(TRACE)
    request = spans[f"POST {CHAT}"]
    assert request.status.code == spans["generation"].status.code == Status.STATUS_CODE_ERROR
    assert spans["images"].status.code == Status.STATUS_CODE_UNSET
    assert attributes(request)["error.type"] == "engine_unavailable"
    assert b"secret" not in collector.received


async def test_a_stream_that_breaks_has_failed_though_its_status_is_200(collector: TraceCollector) -> None:
    broken = ApiError("engine_unavailable", "a secret")
    assert (await asked(collector, delta(0, "a"), broken, stream=True)).status_code == 200
    request = collector.trace(TRACE)[f"POST {CHAT}"]
    assert request.status.code == Status.STATUS_CODE_ERROR


async def test_a_client_that_leaves_is_no_failure(collector: TraceCollector) -> None:
    with pytest.raises(asyncio.CancelledError):
        await asked(collector, model=Left())
    spans = collector.trace(TRACE)
    assert attributes(spans[f"POST {CHAT}"])["vlsae.finish"] == "cancelled"
    assert {span.status.code for span in spans.values()} == {Status.STATUS_CODE_UNSET}


async def test_a_caller_that_does_not_sample_is_obeyed(collector: TraceCollector) -> None:
    assert (await asked(collector, flags="00")).status_code == 200
    assert collector.received == b""


@pytest.mark.slow
async def test_without_a_collector_the_request_is_answered() -> None:
    with collecting_traces() as gone:
        pass
    assert (await asked(gone)).status_code == 200
