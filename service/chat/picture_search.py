"""Which concepts a picture holds: the model sees it in a conversation of its own, plain and for one token, and the
receipt's explanation tells. Knows no HTTP.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from contextlib import aclosing

from service.chat.request import ChatRunner, RequestContext
from service.model.job import ModelJob, Turn
from steering.engines.base import GenerationEnd, Sampling
from steering.explanation import ConceptActivity
from steering.request import RequestedSteering, SteeringRequest

QUESTION = "Describe the image."
"""Behind the picture, where it changes nothing of what the picture holds."""
LOOK_ONLY = RequestedSteering(settings=SteeringRequest(enabled=False, explain="answer"))


async def concepts_in(
    runner: ChatRunner, url: str, context: RequestContext, *, field: str
) -> Sequence[ConceptActivity]:
    """The strongest first. Raises ApiError; `field` is where the URL stood. Counted as a request of one picture."""
    job = ModelJob(
        request_id=f"search-{uuid.uuid4().hex}",
        turns=(Turn("user", (None, QUESTION)),),
        images=await runner.decode([(field, url)], context),
        max_tokens=1,
        sampling=Sampling(max_tokens=1, temperature=0),
        steering=LOOK_ONLY,
        tenant=context.caller.name,
    )
    async with aclosing(runner.run(job, context)) as events:
        async for event in events:
            if isinstance(event, GenerationEnd):
                (told,) = event.receipt.explanation or (None,)
                assert told is not None, "it was asked for"
                return told.image
    raise AssertionError("an engine ends with a GenerationEnd")
