"""The ingress's view of the models, the service's own and candidates': typed calls, and Ray's faults as errors a client
understands.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from typing import Any, Protocol

from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator

from service.artifacts import MAIN, Candidate
from service.errors import ApiError
from service.model.candidates import CANDIDATE, Candidates, Known
from service.model.job import ModelJob
from service.model.presence import Presence, ServePresence
from service.model.replica import AnswerStart, ModelStatus
from steering.engines.base import GenerationEnd, TextDelta

log = logging.getLogger(__name__)
STATUS_TIMEOUT_S = 2.0
Answer = AnswerStart | TextDelta | GenerationEnd


class ModelClient(Protocol):
    """What the HTTP side needs of a model; `artifact` names the one that answers."""

    def generate(self, job: ModelJob) -> AsyncGenerator[Answer, None]:
        """AnswerStart, then the engine's events; raises ApiError. Closing it cancels the generation."""
        ...

    async def status(self, artifact: str = MAIN) -> ModelStatus:
        """Of one replica, whichever is picked. Raises ApiError where it does not answer, or all are full."""
        ...

    async def candidates(self) -> Mapping[str, Candidate]:
        """What is loaded beside the service's own artifact, or is to be, by name."""
        ...

    async def presence(self) -> Presence:
        """Whether there is a replica with the service's own artifact to ask; it is not asked, and not woken."""
        ...

    @property
    def is_working(self) -> bool:
        """A generation of this ingress process is under way, or waits for its replica."""
        ...

    def seconds_since_event(self, artifact: str = MAIN) -> float:
        """Since any model replica last sent anything to this ingress process; infinite before the first.

        What it sends to others is not seen: with a model that is full of theirs, this one seems to stall.
        """
        ...


class _Deployed:
    """One model's deployment."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self.generate = handle.options(method_name="generate", stream=True)
        self.status = handle.options(method_name="status")
        self.artifact_config = handle.options(method_name="artifact_config")
        self.last_event = float("-inf")


class RayModelClient:
    """`ModelClient` over Serve handles."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._models = {MAIN: _Deployed(handle)}
        self._candidates = Candidates(self.status, self._learn)
        self._presence = ServePresence(handle.app_name, handle.deployment_name)
        self._generations = 0

    async def generate(self, job: ModelJob) -> AsyncGenerator[Answer, None]:
        """See ModelClient."""
        model = self._model(job.artifact)
        events = model.generate.remote(job)
        del job  # its pixels
        assert isinstance(events, DeploymentResponseGenerator)
        self._generations += 1
        try:
            async for event in events:
                model.last_event = time.monotonic()
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

    async def status(self, artifact: str = MAIN) -> ModelStatus:
        """See ModelClient."""
        return await _answer_of(self._model(artifact).status.remote())

    async def presence(self) -> Presence:
        """See ModelClient."""
        return await self._presence.look()

    @property
    def is_working(self) -> bool:
        """See ModelClient."""
        return self._generations > 0

    async def candidates(self) -> Mapping[str, Candidate]:
        """See ModelClient."""
        found = await self._candidates.look()
        self._models = {name: model for name, model in self._models.items() if name == MAIN or name in found}
        return found

    def seconds_since_event(self, artifact: str = MAIN) -> float:
        """See ModelClient."""
        return time.monotonic() - self._model(artifact).last_event

    async def _learn(self, name: str) -> Known:
        """From here on it can be asked for answers."""
        if name not in self._models:
            try:
                handle = await asyncio.to_thread(serve.get_deployment_handle, CANDIDATE, name)
            except (KeyError, RayError, RayServeException):
                raise ApiError("engine_unavailable", "its deployment cannot be found") from None
            self._models[name] = _Deployed(handle)
        return await self.status(name), await _answer_of(self._models[name].artifact_config.remote())

    def _model(self, artifact: str) -> _Deployed:
        if artifact not in self._models:
            raise ApiError("engine_unavailable", "the artifact that should answer is not loaded; try again later")
        return self._models[artifact]


async def _answer_of(asked: DeploymentResponse | DeploymentResponseGenerator) -> Any:
    assert isinstance(asked, DeploymentResponse)
    try:
        return await asyncio.wait_for(asked, STATUS_TIMEOUT_S)
    except (TimeoutError, RayError, RayServeException):
        raise ApiError("engine_unavailable", "the model does not answer yet; try again later") from None
    finally:
        _cancel(asked)


def _cancel(call: DeploymentResponse | DeploymentResponseGenerator) -> None:
    """Harmless for a call that has ended; one that no replica took raises its refusal once more."""
    with suppress(RayServeException, RayError):
        call.cancel()
