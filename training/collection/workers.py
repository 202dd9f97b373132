"""Who makes the shards: this process, or actors of Ray Data, on this machine or a cluster.

An actor that dies is replaced and its portion made again, up to RETRIES times. Knows no model.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from steering.cluster.local_ray import private_ray
from steering.errors import SteeringError
from training.collection.portion import ShardWork, make_shard
from training.collection.representer import Representer, RepresenterSettings
from training.errors import InvalidTraining
from training.pairs import PairSource, PortionPlace, open_pairs
from training.store.layout import ShardRecord, shard_file

OBJECT_STORE_BYTES = 128 * 1024 * 1024
"""Ray carries numbers of portions and short records; states go from an actor to the disk."""
RETRIES = 3
"""Of one portion whose actor died: what kills every actor that takes it would go on for ever."""
_SEEN_WITHIN_S = 60.0
"""A shared file system may show what another machine wrote only after a while."""
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True, kw_only=True)
class Task:
    """Everything a worker needs; travels to it."""

    work: ShardWork
    pairs: str
    representer: RepresenterSettings


@dataclass(frozen=True, kw_only=True)
class ActorPool:
    """How many actors, and what each gets."""

    smallest: int
    largest: int
    threads: int
    """CPUs of an actor."""
    gpus: int
    """GPUs of an actor: 0 or 1."""
    address: str | None
    """Of a cluster; None: a private Ray of this machine's."""


Remaining = Sequence[tuple[int, PortionPlace]]
"""Shards that are not there yet, each with its place in the source."""


def make_shards_here(task: Task, remaining: Remaining) -> Iterator[ShardRecord]:
    """In this process, one after the other."""
    worker, before = _Worker(task), torch.get_num_threads()
    torch.set_num_threads(task.work.threads)
    try:
        for shard, place in remaining:
            yield worker.make(shard, place)
    finally:
        torch.set_num_threads(before)


def make_shards_on_ray(task: Task, remaining: Remaining, pool: ActorPool) -> Iterator[ShardRecord]:
    """By Ray Data's actors, in any order. Raises InvalidTraining as soon as one of them does, or dies too often."""
    left = dict(remaining)
    with _ray(pool):
        import ray.data
        from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError

        _quieten(ray.data.DataContext.get_current())
        items = [{"shard": shard, "place": json.dumps(place)} for shard, place in remaining]
        records = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            ShardActor,
            fn_constructor_args=(task,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(min_size=pool.smallest, max_size=pool.largest),
            num_cpus=pool.threads,
            num_gpus=pool.gpus,
            max_restarts=-1,
            max_task_retries=RETRIES,
        )
        try:
            for row in records.iter_rows():
                if row["error"]:
                    raise InvalidTraining(row["error"])
                record = ShardRecord.model_validate_json(row["record"])
                require_seen(task.work.store, record)
                del left[record.shard]
                yield record
        except (RayActorError, WorkerCrashedError, OutOfMemoryError, NodeDiedError) as error:
            raise InvalidTraining(_died(left)) from error


def require_seen(store: Path, record: ShardRecord) -> None:
    """Raises InvalidTraining where a shard that a worker wrote is not to be seen here."""
    file, deadline = shard_file(store, record.shard, "json"), time.monotonic() + _SEEN_WITHIN_S
    while not file.exists():
        if time.monotonic() > deadline:
            raise InvalidTraining(
                f"{file}: a worker wrote it, but it is not to be seen here; give an --output that all machines of the "
                "cluster share"
            )
        time.sleep(0.5)


def _died(left: dict[int, PortionPlace]) -> str:
    shard, place = next(iter(left.items()))
    first = place["first"]
    return (
        f"a worker died {RETRIES + 1} times at the same portion, as it does without enough memory, or of a picture "
        f"that breaks a decoder; the first of {len(left)} shards not made is {shard}: pairs {first} to "
        f"{first + place['count'] - 1} of the source. The others are kept: run the same command again with --workers 0 "
        "to see what happens there, or with fewer --workers"
    )


class ShardActor:
    """Holds a representer and makes the shards it is told to; bad input comes back as a message."""

    def __init__(self, task: Task) -> None:
        torch.set_num_threads(task.work.threads)
        self._worker = _Worker(task)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        (shard,), (place,) = batch["shard"], batch["place"]
        try:
            record = self._worker.make(int(shard), json.loads(place))
        except (InvalidTraining, SteeringError, OSError) as error:
            return {"record": [""], "error": [str(error) or repr(error)]}
        return {"record": [record.model_dump_json()], "error": [""]}


class _Worker:
    """Source and representer, made when first needed."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._source: PairSource | None = None
        self._representer: Representer | None = None

    def make(self, shard: int, place: PortionPlace) -> ShardRecord:
        if self._source is None or self._representer is None:
            self._source, self._representer = open_pairs(self._task.pairs), self._task.representer.load()
        return make_shard(self._task.work, self._source, self._representer, shard, place)


@contextmanager
def _ray(pool: ActorPool) -> Iterator[None]:
    """A private Ray, or the cluster at an address."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if pool.address is None:
        with private_ray(cpus=pool.largest * pool.threads, object_store_bytes=OBJECT_STORE_BYTES):
            yield
        return
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init(
        address=pool.address,
        logging_level=logging.ERROR,
        log_to_driver=False,
        runtime_env={"env_vars": _OFFLINE},
    )
    try:
        _require_room(pool)
        yield
    finally:
        ray.shutdown()


def _require_room(pool: ActorPool) -> None:
    """Raises InvalidTraining where no machine of the cluster can hold an actor, which would be waited for for ever."""
    import ray
    from ray._private.state import state

    if state.get_cluster_config() is not None:  # machines may be added
        return
    there = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(one.get("CPU", 0) >= pool.threads and one.get("GPU", 0) >= pool.gpus for one in there):
        raise InvalidTraining(
            f"--ray-address {pool.address}: no machine there has the {pool.threads} CPUs and {pool.gpus} GPUs that a "
            "worker takes; give fewer --threads, or --device cpu"
        )


def _quieten(context: Any) -> None:
    """Progress is ours to tell; and a portion may take as long as it takes."""
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1
    for name in ("ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what it would say at length is raised as well
