"""Whether the model has a replica at all, as Ray Serve's controller tells it. The model is not asked: a call, even one
that only waits, would keep a replica from going, or start one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from enum import StrEnum

from ray import serve

log = logging.getLogger(__name__)
LOOK_TIMEOUT_S = 2.0
BY_ITSELF = ("HEALTHY", "UPSCALING", "DOWNSCALING")
"""Statuses of a deployment whose replicas come and go with the load."""


class Presence(StrEnum):
    """Of the model's replicas, whichever."""

    AWAKE = "awake"
    """One runs."""
    ASLEEP = "asleep"
    """None runs, and the next request brings one, or has just done so."""
    ABSENT = "absent"
    """None runs yet, or none can."""


def presence_of(status: str, replica_states: Mapping[str, int]) -> Presence:
    """From what `serve.status()` says of a deployment."""
    if replica_states.get("RUNNING", 0) > 0:
        return Presence.AWAKE
    return Presence.ASLEEP if status in BY_ITSELF else Presence.ABSENT


class ServePresence:
    """What was last known is said again while the controller does not answer: requests do not need it."""

    def __init__(self, application: str, deployment: str) -> None:
        self._application, self._deployment = application, deployment
        self._known = Presence.ABSENT
        self._looking: asyncio.Future[Presence] | None = None

    async def look(self) -> Presence:
        """At most one thread waits for the controller, whatever happens to it."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.ensure_future(asyncio.to_thread(self._ask))
        done, _ = await asyncio.wait({self._looking}, timeout=LOOK_TIMEOUT_S)
        for look in done:
            if (error := look.exception()) is None:
                self._known = look.result()
            else:
                log.warning("Serve's controller does not say how the model is: %s", type(error).__name__)
        return self._known

    def _ask(self) -> Presence:
        application = serve.status().applications.get(self._application)
        found = application.deployments.get(self._deployment) if application else None
        if found is None:
            return Presence.ABSENT
        states = {str(getattr(state, "value", state)): number for state, number in found.replica_states.items()}
        return presence_of(str(getattr(found.status, "value", found.status)), states)
