"""`POST /v1/feedback`: how good an answer was, counted by what was done to it."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Annotated

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from service.callers.keys import Caller
from service.callers.ledger import Ledger, RayLedger
from service.chat.strict_model import Strict
from service.errors import ApiError
from service.http.body import parse, read_json_body
from service.metrics.exposition import Metrics

log = logging.getLogger(__name__)
MAX_BODY_BYTES = 16 * 1024
MAX_AT_ONCE = 32
"""Requests; so many slow senders must not take the places of health checks."""


class FeedbackRequest(Strict):
    """The body of `POST /v1/feedback`."""

    request_id: str = Field(min_length=1, max_length=128)
    """The `id` of a chat completion."""
    score: Annotated[float, Field(ge=0, le=1)]
    """0 is bad, 1 is good."""


class FeedbackDesk:
    """Takes feedback, once per answer and from its own caller only."""

    def __init__(self, ledger: Ledger | RayLedger, metrics: Metrics, *, body_timeout_s: float) -> None:
        self._ledger, self._metrics, self._body_timeout_s = ledger, metrics, body_timeout_s
        self._busy: Counter[str] = Counter()
        """By the caller's name."""

    async def answer(self, request: Request) -> Response:
        """Raises ApiError."""
        caller: Caller = request.state.caller
        if self._busy.total() >= MAX_AT_ONCE or (caller.name and self._busy[caller.name] >= MAX_AT_ONCE // 2):
            raise ApiError("overloaded", "too much feedback at once; try again later")
        self._busy[caller.name] += 1
        try:
            body = await read_json_body(request, max_bytes=MAX_BODY_BYTES, timeout_s=self._body_timeout_s)
            given = parse(body, FeedbackRequest)
            await self._take(given, caller)
        finally:
            self._busy -= Counter((caller.name,))
        return JSONResponse({"object": "feedback", "request_id": given.request_id, "score": given.score})

    async def _take(self, given: FeedbackRequest, caller: Caller) -> None:
        labels = await self._ledger.claim_answer(given.request_id, caller.name)
        if labels is None:
            raise ApiError(
                "request_not_found",
                "request_id: no answer that you were given has this id, or feedback on it was sent before, or it is "
                "more than an hour old",
                param="request_id",
            )
        self._metrics.feedback.labels(**labels._asdict()).observe(given.score)
        facts = {"completion_id": given.request_id, "key": caller.name or None, "score": given.score}
        log.info("feedback", extra={"facts": {**facts, **labels._asdict()}})
