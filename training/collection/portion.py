"""One portion of the pairs becomes one shard: read, prepare ahead, sort by length, represent, store in source order.

Keeps one portion's states and a window of prepared pairs in memory, whatever the source's size. What is made follows
from the portion and the settings alone, so that anybody can make it, twice if need be.

Shapes: N pairs of a window or a portion, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from training.collection.representer import Prepared, Representer
from training.errors import InvalidTraining
from training.pairs import Pair, PairSource, PortionPlace, Unusable
from training.pairs.decoding import map_ahead
from training.store.layout import Collected, ShardRecord
from training.store.writer import PairRecord, Portion, SkippedRecord, write_shard

WINDOW_BATCHES = 8
"""Batches whose pairs are sorted together: less padding, at the price of that many prepared pairs in memory, twice."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ShardWork:
    """All that is needed to make shards of a store, beside a source and a representer."""

    store: Path
    collected: Collected
    threads: int
    """Threads that prepare pairs ahead of the model."""


def make_shard(
    work: ShardWork, source: PairSource, representer: Representer, shard: int, place: PortionPlace
) -> ShardRecord:
    """Collects a portion and writes it. Raises InvalidTraining for states that are not finite, or a full disk."""
    try:
        portion = collect_portion(work, source.read(place), representer)
    except torch.OutOfMemoryError as error:
        raise InvalidTraining(
            f"--batch-size {work.collected.batch_size} does not fit into the GPU's memory; the finished shards are "
            "kept, but batches of another size round differently: choose another --output with a smaller one"
        ) from error
    return write_shard(work.store, shard, portion, work.collected)


def collect_portion(work: ShardWork, found: Iterable[tuple[int, Pair | Unusable]], representer: Representer) -> Portion:
    """The states of all pairs that can be used, and a list of the others."""
    collected = work.collected
    pairs: list[PairRecord] = []
    skipped: list[SkippedRecord] = []
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in collected.names}
    size = WINDOW_BATCHES * collected.batch_size
    usable = _prepare(work, found, representer, skipped)
    while window := list(islice(usable, size)):
        states = _represent(representer, [prepared for _, prepared in window], collected)
        records = [record for record, _ in window]
        for name, (image_ND, text_ND) in states.items():
            for modality, states_ND in (("image", image_ND), ("text", text_ND)):
                _check_finite(states_ND, records, f"{name}.{modality}", collected)
            parts[name].append((image_ND, text_ND))
        pairs += records
    whole = {name: tuple(torch.cat(side) for side in zip(*both, strict=True)) for name, both in parts.items() if both}
    return Portion(states={name: (image, text) for name, (image, text) in whole.items()}, pairs=pairs, skipped=skipped)


def _prepare(
    work: ShardWork,
    found: Iterable[tuple[int, Pair | Unusable]],
    representer: Representer,
    skipped: list[SkippedRecord],
) -> Iterator[tuple[PairRecord, Prepared]]:
    """Pairs as the model wants them; the others are added to `skipped`."""

    def prepare(one: tuple[int, Pair | Unusable]) -> tuple[PairRecord | SkippedRecord, Prepared | None]:
        index, pair = one
        if isinstance(pair, Unusable):
            return SkippedRecord(pair=index, image=pair.reference, reason=pair.reason), None
        prepared = representer.prepare(pair)
        if isinstance(prepared, str):
            return SkippedRecord(pair=index, image=pair.reference, reason=prepared), None
        return PairRecord(pair=index, text=pair.text, image=pair.reference), prepared

    ahead = WINDOW_BATCHES * work.collected.batch_size
    for record, prepared in map_ahead(prepare, found, threads=work.threads, ahead=ahead):
        if isinstance(record, SkippedRecord):
            skipped.append(record)
        else:
            assert prepared is not None, record
            yield record, prepared


def _represent(
    representer: Representer, window: list[Prepared], collected: Collected
) -> Mapping[str, tuple[Tensor, Tensor]]:
    """States of a window in its order, computed in the order of length; in the dtype they are stored in."""
    order = sorted(range(len(window)), key=lambda row: window[row].length)
    dtype = getattr(torch, collected.stored_dtype)
    empty_ND = torch.empty(len(window), collected.width, dtype=dtype)
    states = {name: (empty_ND.clone(), empty_ND.clone()) for name in collected.names}
    for start in range(0, len(order), collected.batch_size):
        rows = order[start : start + collected.batch_size]
        for name, (image_BD, text_BD) in representer.represent([window[row] for row in rows]).items():
            states[name][0][rows] = image_BD.to(dtype)
            states[name][1][rows] = text_BD.to(dtype)
    return states


def _check_finite(states_ND: Tensor, records: list[PairRecord], what: str, collected: Collected) -> None:
    bad_N = ~torch.isfinite(states_ND).all(1)
    if not bad_N.any():
        return
    record = records[int(bad_N.nonzero()[0])]
    remedy = [f"--dtype (the model ran in {collected.model_dtype})"]
    if collected.stored_dtype == "float16":
        remedy.append("--stored-dtype (float16 ends at 65504)")
    raise InvalidTraining(
        f"{what} of pair {record.pair} ({record.image}) is not finite; collect into another --output with another "
        + " or another ".join(remedy)
    )
