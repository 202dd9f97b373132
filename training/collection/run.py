"""A whole collection: plan it, make what is missing, complete the store. Knows no model and no format.

May be killed at any moment and run again: finished shards are checked and kept, the rest is made as if never begun.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from pydantic import Field

from training.collection.portion import ShardWork
from training.collection.progress import Progress, Report
from training.collection.representer import RepresenterSettings
from training.collection.workers import ActorPool, Task, make_shards_here, make_shards_on_ray
from training.command_line import Settings
from training.durable_files import remove_unfinished
from training.errors import InvalidTraining
from training.pairs import open_pairs
from training.store.layout import LOCK_FILE, SHARD_FOLDER, Collected, Manifest, StoredDtype
from training.store.writer import begin_store, complete_store, finished_shards


class CollectionOptions(Settings):
    """In what portions pairs are collected, by whom, and how they are stored."""

    batch_size: int = Field(default=16, gt=0)
    """Pairs per forward pass. A GPU wants many; a core is busy with some 600 tokens, and slower with more."""
    portion_size: int = Field(default=2048, gt=0)
    """Pairs per shard: what is lost when a worker dies, and what a worker keeps in memory."""
    stored_dtype: StoredDtype = "float32"
    """Number format of the states on disk: half the space, at the price of three decimals, in float16."""
    workers: tuple[int, ...] = (1,)
    """Ray actors: MIN [MAX], as many as there is work for; 0: none, this process does it."""
    threads: int | None = Field(default=None, gt=0)
    """CPU threads of a worker; by default this machine's cores, shared among the workers, or 1 of a cluster's."""
    ray_address: str | None = None
    """Cluster to join, which must see the same paths; by default a private Ray on this machine."""
    device: str = "cpu"
    """`cpu`, or `cuda`: one GPU for each worker."""
    skip_not_finite: bool = False
    """List pairs whose states are not finite as skipped; otherwise one ends the collection."""

    def actor_pool(self) -> ActorPool | None:
        """None: no actors."""
        if not 1 <= len(self.workers) <= 2 or self.workers[0] < 0 or self.workers[-1] < self.workers[0]:
            raise InvalidTraining(f"--workers: MIN or MIN MAX, not {' '.join(map(str, self.workers))}")
        if self.workers[-1] == 0:
            _require_device(self.device)
            return None
        if self.workers[0] == 0:
            raise InvalidTraining("--workers: 0 stands alone (no actors); as a minimum it must be at least 1")
        if self.device not in ("cpu", "cuda"):
            raise InvalidTraining(f"--device {self.device}: a worker takes cpu or cuda; which GPU it gets, Ray decides")
        if self.device == "cuda" and self.ray_address is None and self.workers[-1] > torch.cuda.device_count():
            raise InvalidTraining(
                f"--device cuda: {self.workers[-1]} workers need a GPU each, this machine has "
                f"{torch.cuda.device_count()}; give fewer --workers, or --device cpu"
            )
        return ActorPool(
            smallest=self.workers[0],
            largest=self.workers[-1],
            threads=self.threads or (1 if self.ray_address else max(1, _cores() // self.workers[-1])),
            gpus=int(self.device == "cuda"),
            address=self.ray_address,
        )


def collect_store(
    output: Path, pairs: str, representer: RepresenterSettings, options: CollectionOptions, report: Report = print
) -> Manifest:
    """Collects all pairs of a spec into a store, going on where an earlier run with the same settings was stopped."""
    pool = options.actor_pool()
    source = open_pairs(pairs)
    places = source.portions(options.portion_size)
    collected = Collected(
        **representer.describe().model_dump(),
        stored_dtype=options.stored_dtype,
        batch_size=options.batch_size,
        portion_size=options.portion_size,
        skip_not_finite=options.skip_not_finite,
        device=options.device.partition(":")[0],
        versions={name: version(name) for name in ("torch", "transformers")},
        source=source.describe(),
    )
    output = output.absolute()
    with _alone_in(output, report):
        manifest = begin_store(output, collected, len(places))
        records = finished_shards(output, len(places))
        if manifest.complete and len(records) == len(places):
            report(f"{output} is complete: {manifest.pairs:,} pairs, {manifest.skipped:,} skipped")
            return manifest
        if not manifest.complete:  # what made a whole portion useless may be mended
            records = {shard: record for shard, record in records.items() if record.pairs}
        done, skipped = (sum(getattr(one, field) for one in records.values()) for field in ("pairs", "skipped"))
        total = sum(place["count"] for place in places)
        report(f"collecting {total:,} pairs into {output}" + (f"; {done + skipped:,} are there" if records else ""))
        progress = Progress(report, total, done + skipped, skipped)
        threads = pool.threads if pool else options.threads or _cores()
        work = ShardWork(store=output, collected=manifest.collected, threads=threads)
        task = Task(work=work, pairs=collected.source["spec"], representer=representer)
        remaining = [(shard, place) for shard, place in enumerate(places) if shard not in records]
        if remaining:
            made = make_shards_on_ray(task, remaining, pool) if pool else make_shards_here(task, remaining)
            for record in made:
                records[record.shard] = record
                progress.add(record.pairs, record.skipped)
        remove_unfinished(output / SHARD_FOLDER)
        return complete_store(output, records)


@contextmanager
def _alone_in(folder: Path, report: Report) -> Iterator[None]:
    """No other run writes into the folder; what a killed one left half-written is gone."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InvalidTraining(f"--output {folder} cannot be used: {error.strerror}") from error
    try:
        _lock(descriptor, folder, report)
        remove_unfinished(folder)
        remove_unfinished(folder / SHARD_FOLDER)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path, report: Report) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise InvalidTraining(f"--output {folder}: another collection writes there; wait for it or end it") from error
    except OSError as error:
        report(f"warning: {folder} cannot be locked ({error.strerror}); start no second collection there")


def _require_device(device: str) -> None:
    """Raises InvalidTraining for a device that this process cannot use."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InvalidTraining(f"--device {device}: no such device; give cpu or cuda") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InvalidTraining(
            f"--device {device}: this machine has {torch.cuda.device_count()} GPUs; give --device cpu"
        )


def _cores() -> int:
    return len(os.sched_getaffinity(0))
