"""Who shares a replica: the same picture of the same key, most of them still when one goes, nobody behind a queue."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID

from service.images.decoder import RgbImage
from service.model.affinity import SLACK, PictureAffinityRouter, affinity_of, preferred, too_busy
from service.model.job import ModelJob, Turn
from steering.engines.base import Sampling
from steering.request import SteeringRequest, merge_sources

MODEL = DeploymentID("Model", "service")
REPLICAS = [f"replica-{number}" for number in range(4)]


def job(*pictures: int, tenant: str = "alice") -> ModelJob:
    images = tuple(RgbImage(4, 4, bytes([color]) * 48) for color in pictures)
    return ModelJob(
        request_id="r", turns=(Turn("user", ("what ?",)),), images=images, max_tokens=1,
        sampling=Sampling(max_tokens=1), steering=merge_sources(server=(SteeringRequest(),)), tenant=tenant,
    )  # fmt: skip


def test_what_is_shared_is_tenant_and_first_picture() -> None:
    assert affinity_of(job()) is None
    assert affinity_of(job(1)) == affinity_of(job(1, 2)) != affinity_of(job(2))
    assert affinity_of(job(1)) != affinity_of(job(1, tenant="bob"))
    wide = job(1).images[0]._replace(width=8, height=2)
    assert affinity_of(replace(job(1), images=(wide,))) != affinity_of(job(1)), "the same bytes in another shape"


def test_pictures_are_spread_and_only_those_of_a_lost_replica_move() -> None:
    homes = {str(number): preferred(str(number), REPLICAS) for number in range(400)}
    assert min(Counter(homes.values()).values()) > 60, "of 100 each"
    left = REPLICAS[1:]
    moved = [one for one, home in homes.items() if preferred(one, left) != home]
    assert {homes[one] for one in moved} == {REPLICAS[0]}
    assert all(preferred(one, reversed(REPLICAS)) == home for one, home in homes.items())


def test_busy_is_relative_to_the_others() -> None:
    assert not too_busy("a", {"a": SLACK, "b": 0})
    assert too_busy("a", {"a": SLACK + 1, "b": 0})
    assert not too_busy("a", {"a": 100 + SLACK, "b": 100})
    assert not too_busy("a", {"a": None, "b": 0})
    assert not too_busy("a", {"a": 100, "b": None}), "nothing says that it would be better there"


async def test_serve_s_router_asks_the_preferred_one_first() -> None:
    router: Any = PictureAffinityRouter(
        deployment_id=MODEL, handle_source=DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True
    )
    router.initialize_state(slack=2)
    replicas: list[Any] = [SimpleNamespace(replica_id=ReplicaID(name, MODEL)) for name in REPLICAS]
    router._replicas = {one.replica_id: one for one in replicas}
    router._replica_id_set = set(router._replicas)
    router._colocated_replica_ids.clear()

    async def first(asked: ModelJob | None) -> list[str]:
        pending: Any = SimpleNamespace(
            args=[] if asked is None else [asked],
            metadata=SimpleNamespace(multiplexed_model_id="", session_id=""),
            routing_context=SimpleNamespace(tried_same_node=True, tried_same_az=True, should_backoff=True),
        )
        return [one.replica_id.unique_id for one in (await router.choose_replicas(replicas, pending))[0]]

    asked = replace(job(1), affinity=affinity_of(job(1)))
    assert asked.affinity is not None
    home = preferred(asked.affinity, REPLICAS)
    assert await first(asked) == [home]
    assert len(await first(job(1))) == len(await first(None)) == 2, "two to choose from, as without us"
    for one in replicas:
        router.replica_queue_len_cache.update(one.replica_id, 3 if one.replica_id.unique_id == home else 0)
    assert len(await first(asked)) == 2
