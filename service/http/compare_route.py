"""`POST /v1/compare`: one conversation at several settings of steering (`chat/comparison.py`)."""

from __future__ import annotations

from fastapi import Response

from service.chat.comparison import CompareRequest, run_comparison, take_in_comparison
from service.chat.steering_sources import STRENGTH_HEADER
from service.http.model_answer import Admitted


async def compare(asked: Admitted) -> Response:
    """Raises ApiError."""
    async with asked.body(CompareRequest) as (chat, shares):
        comparison = await take_in_comparison(
            asked.route.runner,
            chat,
            asked.settings,
            strength_header=asked.request.headers.get(STRENGTH_HEADER),
            caller=asked.caller,
            record=asked.record,
            metrics=asked.route.metrics,
            take_places=asked.take_places,
            shares=shares,
        )
        del chat
    answer = await run_comparison(
        asked.route.runner, comparison, caller=asked.caller, record=asked.record, metrics=asked.route.metrics
    )
    return Response(answer, media_type="application/json")
