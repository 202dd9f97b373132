"""A second answer that nobody sees, to be held against the one that was shown. Knows no HTTP.

It runs when its request has been answered, with places and memory of its own, and only while this process has little
else to do: whoever asks then makes it end. What is dropped is counted, and nobody waits for it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import NamedTuple

from service.chat.admission import MemoryBudget, Overloaded, Share
from service.chat.differences import similarity
from service.chat.request import RequestContext
from service.chat.streaming import Event
from service.errors import ApiError
from service.experiments.arms import over_default
from service.metrics.exposition import Metrics
from service.metrics.request_record import RequestRecord
from service.model.client import ModelClient
from service.model.job import ModelJob
from service.model.object_store import SHADOWS_OF_MEMORY
from service.settings import BYTES_PER_PIXEL, Settings
from steering.engines.base import GenerationEnd, TextDelta

log = logging.getLogger(__name__)
PLACES = 2
"""Shadows at a time, from their requests' beginning on."""
QUIET_SHARE = 8
"""This part of the engine's batch may be in use by callers, of this process, while a shadow runs."""
SHADOW = "shadow"


class Alike(NamedTuple):
    """How far two answers agree, all choices together."""

    same: bool
    similarity: float
    """Mean over choices of `differences.similarity`: 1 is the same."""
    shown_tokens: int
    shadow_tokens: int


class Shadow:
    """One that may come to run."""

    def __init__(self, job: ModelJob, record: RequestRecord, share: Share) -> None:
        self.job, self.record, self._share = job, record, share
        self.shown: dict[int, list[int]] = defaultdict(list)
        """Choice to its tokens."""
        self.started = False
        self.outcome = "dropped"

    async def watching(self, events: AsyncIterator[Event]) -> AsyncGenerator[Event, None]:
        """The events as they are shown."""
        async for event in events:
            _keep(self.shown, event)
            yield event

    def give_back(self) -> None:
        self._share.give_back()


class Shadows:
    """All of one ingress process."""

    def __init__(
        self,
        model: ModelClient,
        metrics: Metrics,
        *,
        memory_bytes: int,
        running: Callable[[], int],
        ending: Callable[[], bool],
    ) -> None:
        """`memory_bytes` are the callers'; `running` tells how many requests of theirs there are now, `ending` whether
        the process is to go away."""
        self._model, self._metrics, self._callers_running, self._ending = model, metrics, running, ending
        self._memory = MemoryBudget(memory_bytes // SHADOWS_OF_MEMORY)
        self._planned: set[Shadow] = set()
        self.running: set[asyncio.Task[None]] = set()
        """Those that give way to callers."""

    @contextmanager
    def planned(self, job: ModelJob, context: RequestContext) -> Iterator[Shadow | None]:
        """One with its place and memory taken, which starts when the block has answered its request; None for most
        requests, and where there is no room (which is counted)."""
        settings = context.settings
        shadow = self._plan(job, settings, context.record)
        del job  # its pixels
        try:
            yield shadow
            if shadow and not self._ending() and self._quiet(settings):
                self._start(shadow, settings.request_timeout_s)
        finally:
            if shadow and not shadow.started:
                self._end(shadow)

    def _plan(self, job: ModelJob, settings: Settings, record: RequestRecord) -> Shadow | None:
        asked = settings.experiment and settings.experiment.shadow
        own = record.assignment is None or record.assignment.reason == "own"
        if not asked or own or random.random() >= asked.share:
            return None
        share = Share(self._memory, "")
        try:
            share.take(sum(BYTES_PER_PIXEL * image.width * image.height for image in job.images))
        except Overloaded:
            self._count("dropped")
            return None
        if len(self._planned) >= PLACES or not self._quiet(settings):
            share.give_back()
            self._count("dropped")
            return None
        steering = over_default(asked.steering, settings.default_steering, arm=SHADOW)
        changes = {"steering": steering, "artifact": asked.artifact or settings.default_artifact}
        shadow = Shadow(replace(job, request_id=f"{SHADOW}-{uuid.uuid4().hex}", **changes), record, share)
        self._planned.add(shadow)
        return shadow

    def _start(self, shadow: Shadow, timeout_s: float) -> None:
        shadow.started = True
        task = asyncio.create_task(self._run(shadow, timeout_s))
        self.running.add(task)
        task.add_done_callback(lambda ended: self._ended(ended, shadow))  # one that never began ends here, too

    def make_way(self, settings: Settings) -> None:
        """A caller's request has come: those that run end where it is one too many."""
        if not self._quiet(settings):
            self.close()

    def close(self) -> None:
        for task in self.running:
            task.cancel()

    def _quiet(self, settings: Settings) -> bool:
        return self._callers_running() <= max(1, settings.engine.max_batch_size // QUIET_SHARE)

    async def _run(self, shadow: Shadow, timeout_s: float) -> None:
        began = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                tokens, end = await self._answer(shadow.job)
            if end is not None:
                alike = await asyncio.to_thread(compare, shadow.shown, tokens)
                shadow.outcome = "same" if alike.same else "different"
                self._metrics.shadow_similarity.observe(alike.similarity)
                self._tell(shadow, alike, end, time.monotonic() - began)
        except (ApiError, TimeoutError) as error:
            shadow.outcome = "dropped" if isinstance(error, ApiError) and error.code == "overloaded" else "failed"
        except Exception:
            log.exception("a shadow failed in a way nobody foresaw")
            shadow.outcome = "failed"

    async def _answer(self, job: ModelJob) -> tuple[dict[int, list[int]], GenerationEnd | None]:
        """No end: the process is to go away."""
        tokens: dict[int, list[int]] = defaultdict(list)
        async with aclosing(self._model.generate(job)) as events:
            async for event in events:
                if self._ending():
                    break
                if isinstance(event, GenerationEnd):
                    return tokens, event
                if isinstance(event, TextDelta):
                    _keep(tokens, event)
        return tokens, None

    def _tell(self, shadow: Shadow, alike: Alike, end: GenerationEnd, took_s: float) -> None:
        assignment = shadow.record.assignment
        assert assignment is not None
        facts = {
            "completion_id": shadow.record.completion_id,
            "experiment": {"name": assignment.experiment, "salt": assignment.seed, "arm": assignment.label},
            **alike._asdict(),
            "greedy": shadow.job.sampling.temperature == 0,
            "applied": end.receipt.applied,
            "artifact": end.receipt.artifact,
            "duration_s": round(took_s, 6),
        }
        log.info("shadow", extra={"facts": facts})

    def _ended(self, task: asyncio.Task[None], shadow: Shadow) -> None:
        self.running.discard(task)
        self._end(shadow)

    def _end(self, shadow: Shadow) -> None:
        self._planned.discard(shadow)
        shadow.give_back()
        self._count(shadow.outcome)

    def _count(self, outcome: str) -> None:
        self._metrics.shadow_answers.labels(outcome=outcome).inc()


def compare(shown: dict[int, list[int]], shadow: dict[int, list[int]]) -> Alike:
    """By choice: which tokens of the one stand, in order, in the other."""
    choices = sorted({*shown, *shadow}) or [0]
    pairs = [(shown.get(choice, []), shadow.get(choice, [])) for choice in choices]
    return Alike(
        same=all(one == other for one, other in pairs),
        similarity=round(sum(similarity(one, other) for one, other in pairs) / len(pairs), 6),
        shown_tokens=sum(len(one) for one, _ in pairs),
        shadow_tokens=sum(len(other) for _, other in pairs),
    )


def _keep(tokens: dict[int, list[int]], event: Event) -> None:
    if isinstance(event, TextDelta):
        tokens[event.choice].extend(event.token_ids)
