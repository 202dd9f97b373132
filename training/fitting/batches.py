"""Batches of a store in an order that looks random and is known in advance. Knows no objective and no optimiser.

The order of an epoch is one permutation of all training pairs, drawn from (seed, epoch): any step's rows can be told
without the steps before it, which is what makes a run resumable to the step and the same for any number of workers.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import Tensor

from training.errors import InvalidTraining
from training.fitting.workers import Worker
from training.store.reader import PairBatch, RepresentationStore

_READERS = 2
"""Threads that read batches."""
_AHEAD = 3
"""Batches read in advance."""
_STATISTICS_ROWS = 65_536
"""Rows that statistics of a store are taken from."""
_STATISTICS_BATCH = 2048
_MEASURED_ROWS = 4096
"""Held-out rows that are measured, at most."""


class ShuffledBatches:
    """A worker's share of every step's batch. The last incomplete batch of an epoch is dropped."""

    def __init__(
        self, store: RepresentationStore, *, held_out: int, batch_size: int, seed: int, rank: int = 0, workers: int = 1
    ) -> None:
        """`held_out`: rows at the store's end that are never given. Raises InvalidTraining, naming the field.

        Where there are fewer training pairs than `batch_size`, a single worker's batches are all of them; several
        refuse, as what they could share out, and with it the weights, would depend on how many they are.
        """
        if batch_size % workers:
            raise InvalidTraining(f"batch_size is {batch_size}; it must be a multiple of workers={workers}")
        self.training_rows = len(store) - held_out
        if self.training_rows < 2:
            raise InvalidTraining(
                f"{store.folder}: {len(store)} pairs less held_out={held_out} leave {max(0, self.training_rows)} "
                "to train on, at least 2 are needed; collect more or lower held_out"
            )
        if self.training_rows < batch_size and workers > 1:
            raise InvalidTraining(
                f"{store.folder}: there are {self.training_rows} pairs to train on, fewer than "
                f"batch_size={batch_size}, which workers={workers} cannot share; "
                "give a smaller --batch-size or --workers 1"
            )
        self.asked_batch_size = batch_size
        self.batch_size = min(batch_size, self.training_rows)
        self.steps_per_epoch = self.training_rows // self.batch_size
        self._store, self._seed, self._rank, self._workers = store, seed, rank, workers

    def rows(self, step: int) -> Tensor:
        """Rows of the store that this worker trains on in a step."""
        share = self.batch_size // self._workers
        return self._rows_of_all(step)[self._rank * share : (self._rank + 1) * share]

    def whole(self, step: int) -> PairBatch:
        """What all workers together train on in a step."""
        return self._store.read(self._rows_of_all(step), epoch=step // self.steps_per_epoch)

    def _rows_of_all(self, step: int) -> Tensor:
        epoch, index = divmod(step, self.steps_per_epoch)
        start = index * self.batch_size
        return _permutation(self._seed, epoch, self.training_rows)[start : start + self.batch_size]

    def between(self, step: int, stop: int) -> Iterator[PairBatch]:
        """Batches of the steps from `step` to before `stop`, read by threads ahead of their use."""
        own = threading.local()

        def read(step: int) -> PairBatch:
            if not hasattr(own, "store"):
                own.store = RepresentationStore(self._store.folder, self._store.manifest, self._store.name)
            return own.store.read(self.rows(step), epoch=step // self.steps_per_epoch)

        waiting: deque[Future[PairBatch]] = deque()
        with ThreadPoolExecutor(_READERS, thread_name_prefix="store") as pool:
            try:
                for ahead in range(step, stop):
                    waiting.append(pool.submit(read, ahead))
                    if len(waiting) > _AHEAD:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)


def sample_batches(store: RepresentationStore, *, held_out: int, seed: int) -> Iterator[PairBatch]:
    """Training pairs to take statistics from: all of them, or 65,536 drawn at random where there are more."""
    count = len(store) - held_out
    rows = torch.arange(count)
    if count > _STATISTICS_ROWS:
        rows = _permutation(seed, -1, count)[:_STATISTICS_ROWS].sort().values
    for part in rows.split(_STATISTICS_BATCH):
        yield store.read(part)


def read_held_out(store: RepresentationStore, held_out: int, worker: Worker) -> PairBatch | None:
    """The first pairs that are kept for measuring, on the device of the worker that leads; None on the others.

    Raises InvalidTraining if all of their states are the same: no share of their variance can be told.
    """
    if not worker.leads:
        return None
    start = len(store) - held_out
    batch = store.read(range(start, start + min(held_out, _MEASURED_ROWS)))
    for modality, states_ND in (("image", batch.image_ND), ("text", batch.text_ND)):
        if torch.equal(states_ND, states_ND[:1].expand_as(states_ND)):
            raise InvalidTraining(
                f"{store.folder}: the {modality} states of the last {held_out} pairs, which are kept for measuring, "
                "are all the same; collect more varied pairs, or raise held_out"
            )
    return PairBatch(*(tensor.to(worker.device) for tensor in batch))


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> Tensor:
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randperm(count, generator=generator)
