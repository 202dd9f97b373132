"""`POST /v1/feedback`: how good an answer was, counted by what was done to it. Comments are never stored or logged."""

from __future__ import annotations

import logging
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.errors import ApiError, from_validation_error
from service.keys import Caller
from service.ledger import AnswerLabels
from service.ledger_client import LedgerClient
from service.metrics import Metrics
from steering.engines.base import Receipt

log = logging.getLogger(__name__)
MAX_BODY_BYTES = 16 * 1024
STRENGTH_BUCKETS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""A strength is counted under the smallest of these that is not below it."""


class FeedbackRequest(BaseModel):
    """The body of `POST /v1/feedback`."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    request_id: str = Field(min_length=1, max_length=128)
    """The `id` of a chat completion."""
    score: Annotated[float, Field(ge=0, le=1)]
    """0 is bad, 1 is good."""
    comment: str | None = Field(default=None, max_length=1000)
    """Accepted, and neither kept nor logged."""


def parse_feedback(body: bytes) -> FeedbackRequest:
    """Raises ApiError naming the first field at fault."""
    try:
        return FeedbackRequest.model_validate_json(body)
    except ValidationError as error:
        raise from_validation_error(error) from None


async def take_feedback(request: FeedbackRequest, caller: Caller, ledger: LedgerClient, metrics: Metrics) -> None:
    """Count it, once per answer and from its own caller only; else an ApiError that does not say which of it was."""
    labels = await ledger.claim_answer(request.request_id, caller.name)
    if labels is None:
        raise ApiError(
            "request_not_found",
            "request_id: no answer that you were given has this id, or feedback on it was sent before, or it is more "
            "than an hour old",
            param="request_id",
        )
    metrics.feedback.labels(**labels._asdict()).observe(request.score)
    log.info("feedback %s: score %g, %s", request.request_id, request.score, labels)


def labels_of(receipt: Receipt) -> AnswerLabels:
    """What feedback on an answer with this receipt is counted by."""
    strength = receipt.strength or 0.0
    return AnswerLabels(
        arm=receipt.arm or "none",
        preset=receipt.preset or "none",
        strength=f"{next(bucket for bucket in STRENGTH_BUCKETS if strength <= bucket):g}",
        applied="true" if receipt.applied else "false",
    )
