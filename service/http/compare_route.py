"""`POST /v1/compare`: one conversation at several settings of steering (`chat/comparison.py`)."""

from __future__ import annotations

from fastapi import Response

from service.chat.comparison import run_comparison, take_in_comparison
from service.chat.request import STRENGTH_HEADER
from service.http.model_answer import Admitted


async def compare(asked: Admitted) -> Response:
    """Raises ApiError."""
    async with asked.body() as (body, body_share):
        comparison = await take_in_comparison(
            asked.route.runner,
            body,
            asked.settings,
            strength_header=asked.request.headers.get(STRENGTH_HEADER),
            caller=asked.caller,
            record=asked.record,
            metrics=asked.route.metrics,
            take_places=asked.take_places,
            body_share=body_share,
            held=asked.held,
        )
    del body
    answer = await run_comparison(
        asked.route.runner, comparison, caller=asked.caller, record=asked.record, metrics=asked.route.metrics
    )
    return Response(answer, media_type="application/json")
