"""Puts a batch of requests to an engine at once and times what comes back. Knows no model and no condition."""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise

from steering.engines.base import Engine, GenerationEnd, GenerationRequest, TextDelta
from tests.benchmarks.steering.two_full_passes import TwoFullPasses


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One batch, from sending its requests to the end of the last, receipts included."""

    tokens_per_s: float
    """Generated tokens over all of the time: prefill, decoding and receipts."""
    decode_tokens_per_s: float
    """The same from the moment on at which every request has its first token: no prefill in it."""
    first_token_s: float
    """Time to first token; median over the batch's requests, which are sent at once."""
    inter_token_s: float
    """Gap between a request's tokens; median over the batch."""
    seconds: float
    steered_positions: int
    """What the receipts count, summed over the batch."""


@dataclass(frozen=True, kw_only=True)
class _Stream:
    """When one request's tokens came."""

    arrivals: list[float]
    """One per token."""
    ended: float
    end: GenerationEnd


async def time_batch(engine: Engine, requests: list[GenerationRequest]) -> Timing:
    """Send all requests at once and wait for the last. Raises RuntimeError where one generated too little."""
    started = time.perf_counter()
    streams = await asyncio.gather(*(_follow(engine, request) for request in requests))
    for request, stream in zip(requests, streams, strict=True):
        if len(stream.arrivals) != request.sampling.max_tokens:
            raise RuntimeError(
                f"{request.request_id} generated {len(stream.arrivals)} tokens, not {request.sampling.max_tokens}: "
                "batches that do different work cannot be compared"
            )
    seconds = max(stream.ended for stream in streams) - started
    return Timing(
        tokens_per_s=sum(len(stream.arrivals) for stream in streams) / seconds,
        decode_tokens_per_s=_decode_rate([stream.arrivals for stream in streams]),
        first_token_s=statistics.median(stream.arrivals[0] - started for stream in streams),
        inter_token_s=statistics.median(after - before for one in streams for before, after in pairwise(one.arrivals)),
        seconds=seconds,
        steered_positions=sum(sum(stream.end.receipt.positions) for stream in streams),
    )


def _decode_rate(arrivals: list[list[float]]) -> float:
    """Tokens a second between the last request's first token and the first request's last."""
    begins, ends = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    if ends <= begins:
        return float("nan")
    return sum(begins < moment <= ends for times in arrivals for moment in times) / (ends - begins)


async def _follow(engine: Engine, request: GenerationRequest) -> _Stream:
    arrivals: list[float] = []
    async for event in engine.generate(request):
        now = time.perf_counter()
        if isinstance(event, TextDelta):
            arrivals.extend([now] * len(event.token_ids))
        else:
            return _Stream(arrivals=arrivals, ended=now, end=event)
    raise RuntimeError(f"{request.request_id} ended without GenerationEnd")


def time_loop(loop: TwoFullPasses, request: GenerationRequest) -> Timing:
    """The same for one request to the procedure as published."""
    started = time.perf_counter()
    _, arrivals = loop.generate(request.prompt_token_ids, request.images[0], request.sampling.max_tokens)
    seconds = time.perf_counter() - started
    return Timing(
        tokens_per_s=len(arrivals) / seconds,
        decode_tokens_per_s=_decode_rate([arrivals]),
        first_token_s=arrivals[0] - started,
        inter_token_s=statistics.median(after - before for before, after in pairwise(arrivals)),
        seconds=seconds,
        steered_positions=0,
    )
