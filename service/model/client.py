"""The ingress's view of the model deployment: typed calls, and Ray's faults as errors a client understands."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Protocol

from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator

from service.errors import ApiError
from service.model.job import ModelJob
from service.model.presence import Presence, ServePresence
from service.model.replica import AnswerStart, ModelStatus
from steering.engines.base import GenerationEnd, TextDelta

log = logging.getLogger(__name__)
STATUS_TIMEOUT_S = 2.0
Answer = AnswerStart | TextDelta | GenerationEnd


class ModelClient(Protocol):
    """What the HTTP side needs of a model."""

    def generate(self, job: ModelJob) -> AsyncGenerator[Answer, None]:
        """AnswerStart, then the engine's events; raises ApiError. Closing it cancels the generation."""
        ...

    async def status(self) -> ModelStatus:
        """Of one replica, whichever is picked. Raises ApiError where it does not answer, or all are full."""
        ...

    async def presence(self) -> Presence:
        """Whether there is a replica to ask; it is not asked, and not woken."""
        ...

    @property
    def is_working(self) -> bool:
        """A generation of this ingress process is under way, or waits for its replica."""
        ...

    def seconds_since_event(self) -> float:
        """Since any model replica last sent anything to this ingress process; infinite before the first.

        What it sends to others is not seen: with a model that is full of theirs, this one seems to stall.
        """
        ...


class RayModelClient:
    """`ModelClient` over a Serve handle."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._generate = handle.options(method_name="generate", stream=True)
        self._status = handle.options(method_name="status")
        self._presence = ServePresence(handle.app_name, handle.deployment_name)
        self._last_event = float("-inf")
        self._generations = 0

    async def generate(self, job: ModelJob) -> AsyncGenerator[Answer, None]:
        """See ModelClient."""
        events = self._generate.remote(job)
        del job  # its pixels
        assert isinstance(events, DeploymentResponseGenerator)
        self._generations += 1
        try:
            async for event in events:
                self._last_event = time.monotonic()
                if isinstance(event, ApiError):
                    raise event
                yield event
        except BackPressureError:
            raise ApiError("overloaded", "all model replicas are busy and the queue is full; try again later") from None
        except (RayActorError, DeploymentUnavailableError, ReplicaUnavailableError):
            raise ApiError("engine_unavailable", "the model replica was lost; try again") from None
        except (RayError, RayServeException) as error:
            if isinstance(error, RayTaskError):  # what a replica raised, and that is a bug
                raise
            log.warning("Ray failed on a request: %s", type(error).__name__)
            raise ApiError("engine_unavailable", "the request was lost on its way; try again") from None
        finally:
            self._generations -= 1
            _cancel(events)

    async def status(self) -> ModelStatus:
        """See ModelClient."""
        answer = self._status.remote()
        try:
            return await asyncio.wait_for(answer, STATUS_TIMEOUT_S)
        except (TimeoutError, RayError, RayServeException):
            raise ApiError("engine_unavailable", "the model does not answer yet; try again later") from None
        finally:
            _cancel(answer)

    async def presence(self) -> Presence:
        """See ModelClient."""
        return await self._presence.look()

    @property
    def is_working(self) -> bool:
        """See ModelClient."""
        return self._generations > 0

    def seconds_since_event(self) -> float:
        """See ModelClient."""
        return time.monotonic() - self._last_event


def _cancel(call: DeploymentResponse | DeploymentResponseGenerator) -> None:
    """Harmless for a call that has ended; one that no replica took raises its refusal once more."""
    with suppress(RayServeException, RayError):
        call.cancel()
