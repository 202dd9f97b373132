"""`POST /v1/compare`: one conversation at several settings of steering (`chat/comparison.py`)."""

from __future__ import annotations

from service.chat.comparison import CompareRequest, run_comparison, take_in_comparison
from service.http.model_answer import Admitted


async def compare(asked: Admitted) -> None:
    """Raises ApiError."""
    runner, context = asked.shared.runner, asked.context
    async with asked.body(CompareRequest) as request:
        comparison = await take_in_comparison(runner, request, context, take_places=asked.take_places)
        del request
    await asked.reply.whole(await run_comparison(runner, comparison, context))
