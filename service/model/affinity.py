"""Which replica gets a request about a picture: the one that had the picture before, unless it has too much to do.

A router for Ray Serve's own hook; an engine that keeps what it made of a picture, as vLLM does, need not make it again.
Tenant and picture are hashed together with each replica (rendezvous hashing), and the largest hash wins: a replica that
comes or goes moves only the pictures that it gets or had. Knows no engine and no HTTP.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from ray.serve._private.common import RequestMetadata
from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from service.model.job import ModelJob

SLACK = 8
"""So many requests more than the replica with the fewest the preferred one may have: a quarter of a usual batch."""


def affinity_of(job: ModelJob) -> str | None:
    """What requests that share cached pictures have in common; None where there is no picture. Takes a moment."""
    if not job.images:
        return None
    digest = hashlib.blake2b(job.tenant.encode() + b"\0", digest_size=16)
    for image in job.images[:1]:  # a later one is behind it in the cache
        digest.update(f"{image.width} {image.height} ".encode() + image.rows)
    return digest.hexdigest()


def preferred(affinity: str, replicas: Iterable[str]) -> str:
    """Of at least one replica."""
    return max(replicas, key=lambda one: hashlib.blake2b(f"{affinity} {one}".encode(), digest_size=8).digest())


def too_busy(replica: str, queues: Mapping[str, int | None], slack: int = SLACK) -> bool:
    """By the numbers of requests that are known; what nobody knows is no reason."""
    own, known = queues.get(replica), [one for one in queues.values() if one is not None]
    return own is not None and own > min(known) + slack


class PictureAffinityRouter(PowerOfTwoChoicesRequestRouter):
    """Serve's own choice for what has no picture, or where the preferred replica refuses or has too much to do."""

    def initialize_state(self, slack: int = SLACK, **_others: Any) -> None:
        self._slack = slack

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The preferred one alone, then as Serve does."""
        job = pending_request.args[0] if pending_request is not None and pending_request.args else None
        others = await super().choose_replicas(candidate_replicas, pending_request)
        if not isinstance(job, ModelJob) or job.affinity is None:
            return others
        by_name = {_name(one.replica_id): one for one in candidate_replicas}
        queues = {name: self.replica_queue_len_cache.get(one.replica_id) for name, one in by_name.items()}
        wanted = preferred(job.affinity, by_name)
        return others if too_busy(wanted, queues, self._slack) else [[by_name[wanted]], *others]

    def _fulfill_next_pending_request(
        self, replica: RunningReplica, request_metadata: RequestMetadata | None = None
    ) -> None:
        """The request that the replica was chosen for, and not the one that waits longest."""
        RequestRouter._fulfill_next_pending_request(self, replica, request_metadata)


def _name(replica: ReplicaID) -> str:
    return replica.unique_id
