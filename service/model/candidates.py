"""Artifacts that are loaded beside the service's own: how the ingress finds them in Ray Serve, and what it learns.

Each is a Serve application of its own (`app.build_candidate`), so that one that comes, goes or fails touches nothing
else: Serve starts all deployments of an application anew when its args change. The application's name is the
candidate's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatusOverview

from service.artifacts import MAIN, Able, Candidate
from service.errors import ApiError, explained
from service.model.replica import ModelStatus
from steering.artifact_config import ArtifactConfig

log = logging.getLogger(__name__)
CANDIDATE = "Candidate"
"""The deployment by which an application is known to hold one."""
STATE_TIMEOUT_S = 10.0
Known = tuple[ModelStatus, ArtifactConfig | None]
Applications = Callable[[], Mapping[str, ApplicationStatusOverview]]


class Candidates:
    """All that Serve has, from one look to the next."""

    def __init__(
        self,
        own: Callable[[], Awaitable[ModelStatus]],
        ask: Callable[[str], Awaitable[Known]],
        applications: Applications = lambda: serve.status().applications,
    ) -> None:
        """`own`: the status of the service's own model; `ask`: of a candidate's, and its artifact, read where it was
        loaded. Both raise ApiError."""
        self._own, self._ask, self._applications = own, ask, applications
        self._asked: dict[str, tuple[float, Able]] = {}
        """Name to when its application was deployed, and what it said then: who sleeps is not woken by looks."""
        self._found: dict[str, Candidate] = {}

    async def look(self) -> Mapping[str, Candidate]:
        """By name. Where Serve does not say, what it said last."""
        try:
            async with asyncio.timeout(STATE_TIMEOUT_S):
                applications = await asyncio.to_thread(self._applications)
        except (TimeoutError, RayError, RayServeException) as error:
            log.warning("Serve does not say which candidates there are: %s", type(error).__name__)
            return self._found
        found = {name: await self._state(name, one) for name, one in applications.items() if _may_hold_one(name, one)}
        self._asked = {name: asked for name, asked in self._asked.items() if name in found}
        self._found = found
        return found

    async def _state(self, name: str, application: ApplicationStatusOverview) -> Candidate:
        deployed, known = self._asked.get(name, (None, None))
        if application.status != "RUNNING":  # what answered before may still: Serve replaces one by one
            return known or _why_not(application)
        if known is not None and deployed == application.last_deployed_time_s:
            return known
        try:
            able = checked(await self._ask(name), await self._own())
        except ApiError as error:
            return known or error.message
        if isinstance(able, Able):
            self._asked[name] = application.last_deployed_time_s, able
        return able


def checked(known: Known, own: ModelStatus) -> Candidate:
    """Whether it may answer in place of the service's own."""
    status, config = known
    if config is None:
        return "it has no artifact: steering is off there"
    if status.checkpoint != own.checkpoint:
        return "its application serves another model than this one: give both the same checkpoint"
    able = status.capabilities
    return Able(config, able.engine, able.modes, max(able.branches), status.system_fingerprint)


def _may_hold_one(name: str, application: ApplicationStatusOverview) -> bool:
    """One that failed early has no deployments yet."""
    if name == MAIN or application.status == "DELETING":
        return False
    return CANDIDATE in application.deployments or not application.deployments


def _why_not(application: ApplicationStatusOverview) -> str:
    messages = "\n".join([application.message, *(one.message for one in application.deployments.values())])
    return f"not loaded ({application.status.value}): {explained(messages) or '`serve status` says more'}"
