"""One portion of the pairs becomes one shard: read, prepare ahead, sort by length, represent, store in source order.

Keeps one portion's states and a window of prepared pairs in memory, whatever the source's size. What is made follows
from the portion and the settings alone, so that anybody can make it, twice if need be.

Shapes: N pairs of a window or a portion, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from training.collection.representer import Prepared, Representer, States
from training.errors import InvalidTraining
from training.pairs import Pair, PairSource, PortionPlace, Unusable
from training.pairs.decoding import MISSING_FILE, map_ahead
from training.store.layout import Collected, ShardRecord
from training.store.writer import PairRecord, Portion, SkippedRecord, write_shard

WINDOW_BATCHES = 8
"""Batches whose pairs are sorted together: less padding, at the price of that many prepared pairs in memory, twice."""

MANY = 8
"""Pictures that are not all missing by chance."""

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ShardWork:
    """All that is needed to make shards of a store, beside a source and a representer."""

    store: Path
    collected: Collected
    threads: int
    """CPU threads: the model's own, or those that prepare pairs ahead of a GPU."""


def make_shard(
    work: ShardWork, source: PairSource, representer: Representer, shard: int, place: PortionPlace
) -> ShardRecord:
    """Collects a portion and writes it.

    Raises InvalidTraining for states that are not finite, pictures none of which is there, or a full disk.
    """
    try:
        portion = collect_portion(work, source.read(place), representer)
    except torch.OutOfMemoryError as error:
        raise InvalidTraining(
            f"--batch-size {work.collected.batch_size} does not fit into the GPU's memory; the finished shards are "
            "kept, but batches of another size round differently: choose another --output with a smaller one"
        ) from error
    _check_whole(portion, place, str(work.collected.source.get("spec")))
    return write_shard(work.store, shard, portion, work.collected)


def _check_whole(portion: Portion, place: PortionPlace, spec: str) -> None:
    """Raises InvalidTraining where the source no longer holds what it held when the collection was planned."""
    found = len(portion.pairs) + len(portion.skipped)
    if found != place["count"]:
        raise InvalidTraining(
            f"{spec}: {place['count']} pairs were there from pair {place['first']} on, now there are {found}; the "
            "source has changed: collect it into another --output"
        )
    if not portion.pairs and found >= MANY and all(one.reason == MISSING_FILE for one in portion.skipped):
        raise InvalidTraining(
            f"{spec}: none of {found} pictures is there, from pair {place['first']} on, the first of them "
            f"{portion.skipped[0].image}; are the pictures mounted, below the folder named here?"
        )


def collect_portion(work: ShardWork, found: Iterable[tuple[int, Pair | Unusable]], representer: Representer) -> Portion:
    """The states of all pairs that can be used, and a list of the others."""
    collected = work.collected
    pairs: list[PairRecord] = []
    skipped: list[SkippedRecord] = []
    parts: dict[str, list[States]] = {name: [] for name in collected.names}
    size = WINDOW_BATCHES * collected.batch_size
    usable = _prepare(work, found, representer, skipped)
    while window := list(islice(usable, size)):
        states = _represent(representer, [prepared for _, prepared in window], collected)
        records = [record for record, _ in window]
        bad = _not_finite(states)
        if bad and not collected.skip_not_finite:
            row = min(bad)
            raise InvalidTraining(_refusal(bad[row], records[row], collected))
        kept = [row for row in range(len(records)) if row not in bad]
        for name, window_states in states.items():
            parts[name].append(_take(window_states, kept) if bad else window_states)
        pairs += [records[row] for row in kept]
        for row, what in bad.items():
            reason = f"{what} is not finite"
            skipped.append(SkippedRecord(pair=records[row].pair, image=records[row].image, reason=reason))
    whole = {name: _join(windows) for name, windows in parts.items() if windows}
    skipped.sort(key=lambda one: one.pair)
    return Portion(states=whole, pairs=pairs, skipped=skipped)


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

    for record, prepared in _mapped(work, prepare, found):
        if isinstance(record, SkippedRecord):
            skipped.append(record)
        else:
            assert prepared is not None, record
            yield record, prepared


def _mapped(work: ShardWork, prepare: Callable[[T], S], found: Iterable[T]) -> Iterator[S]:
    """Ahead of a GPU, in threads; beside a model on the CPU they would only take turns with it: there, one by one."""
    if work.collected.device == "cpu":
        return map(prepare, found)
    return map_ahead(prepare, found, threads=work.threads, ahead=WINDOW_BATCHES * work.collected.batch_size)


def _represent(representer: Representer, window: list[Prepared], collected: Collected) -> dict[str, States]:
    """States of a window in its order, computed in the order of length; in the dtype they are stored in."""
    order = sorted(range(len(window)), key=lambda row: window[row].length)
    dtype = getattr(torch, collected.stored_dtype)
    parts: dict[str, list[States]] = {name: [] for name in collected.names}
    for start in range(0, len(order), collected.batch_size):
        rows = order[start : start + collected.batch_size]
        for name, states in representer.represent([window[row] for row in rows]).items():
            parts[name].append(States(*(tensor.to(dtype) for tensor in states)))
    places = torch.tensor(order).argsort()
    return {name: _take(_join(batches), places) for name, batches in parts.items()}


def _join(parts: Sequence[States]) -> States:
    return States(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _take(states: States, rows: list[int] | Tensor) -> States:
    return States(*(tensor[rows] for tensor in states))


def _not_finite(states: Mapping[str, States]) -> dict[int, str]:
    """The first state that is not finite, by row, of those rows that have one."""
    found: dict[int, str] = {}
    for name, three in states.items():
        for part, tensor in zip(("image", "text", "prefix"), three, strict=True):
            for row in (~torch.isfinite(tensor).flatten(1).all(1)).nonzero()[:, 0].tolist():
                found.setdefault(row, f"{name}.{part}")
    return found


def _refusal(what: str, record: PairRecord, collected: Collected) -> str:
    remedy = [f"--dtype (the model ran in {collected.model_dtype})"]
    if collected.stored_dtype == "float16":
        remedy.append("--stored-dtype (float16 ends at 65504)")
    return (
        f"{what} of pair {record.pair} ({record.image}) is not finite; collect into another --output with another "
        + " or another ".join(remedy)
        + ", or with --skip-not-finite to leave such pairs out"
    )
