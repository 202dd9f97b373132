"""Puts finished portions into a store, in any order and by any number of processes. Knows no model.

Shapes: N pairs of a portion, P prefixes of each text, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from training.collection.representer import States
from training.durable_files import sha256_of, write_bytes, write_json_lines, write_tensors
from training.errors import InvalidTraining
from training.store.layout import (
    IMAGE_HASH,
    MANIFEST_FILE,
    PREFIXES,
    TEXT_HASH,
    Collected,
    Manifest,
    ShardRecord,
    hash_text,
    read_manifest,
    shard_file,
)

_HASHED = ("safetensors", "jsonl", "skipped.jsonl")


@dataclass(frozen=True, kw_only=True)
class PairRecord:
    """Where a row comes from."""

    pair: int
    """Index in the source."""
    text: str
    image: str
    """Reference of the picture, which the source can find again."""


@dataclass(frozen=True, kw_only=True)
class SkippedRecord:
    """A pair that could not be used."""

    pair: int
    image: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Portion:
    """Everything one shard holds."""

    states: Mapping[str, States]
    """N rows by name of the states; empty where no pair could be used."""
    pairs: Sequence[PairRecord]
    """N of them, row by row."""
    skipped: Sequence[SkippedRecord]


def begin_store(folder: Path, collected: Collected, portions: int) -> Manifest:
    """A new store, or the one that is there, as it was begun. Raises InvalidTraining if that was made otherwise."""
    planned = Manifest(collected=collected, portions=portions)
    if not (folder / MANIFEST_FILE).exists():
        _write_manifest(folder, planned)
        return planned
    found = read_manifest(folder)
    before, now = _without_places(found.collected), _without_places(collected)
    changed = [name for name in now if before[name] != now[name]]
    if changed:
        name = changed[0]
        raise InvalidTraining(
            f"{folder / MANIFEST_FILE}: the collection there has {name} {before[name]!r}, this one {now[name]!r}; "
            "go on with the settings it was begun with, or give another --output"
        )
    if found.portions != portions:
        raise InvalidTraining(
            f"{folder / MANIFEST_FILE}: the source had {found.portions} portions when this collection was begun, "
            f"it has {portions} now; collect what changed into another --output"
        )
    return found


def finished_shards(folder: Path, portions: int) -> dict[int, ShardRecord]:
    """Shards that are whole: their record is there, and their files have the sizes and bytes it says."""
    found = {}
    for shard in range(portions):
        file = shard_file(folder, shard, "json")
        if not file.exists():
            continue
        try:
            record = ShardRecord.model_validate_json(file.read_bytes())
        except ValidationError:
            continue
        if all(_is_whole(file.parent / name, digest) for name, digest in record.sha256.items()):
            found[shard] = record
    return found


def write_shard(folder: Path, shard: int, portion: Portion, collected: Collected) -> ShardRecord:
    """One portion, its record last: a shard without a record is made again."""
    dtype = getattr(torch, collected.stored_dtype)
    tensors = {
        TEXT_HASH: torch.tensor([hash_text(row.text) for row in portion.pairs], dtype=torch.int64),
        IMAGE_HASH: torch.tensor([hash_text(row.image) for row in portion.pairs], dtype=torch.int64),
    }
    rows, width = len(portion.pairs), collected.width
    for name in collected.names:
        image_ND, text_ND, prefix_NPD = portion.states.get(name, _no_states(collected))
        assert image_ND.shape == text_ND.shape == (rows, width), (image_ND.shape, text_ND.shape, rows)
        tensors |= {f"{name}.image": image_ND.to("cpu", dtype), f"{name}.text": text_ND.to("cpu", dtype)}
        if collected.prefixes:
            assert prefix_NPD.shape == (rows, collected.prefixes, width), prefix_NPD.shape
            tensors[f"{name}.{PREFIXES}"] = prefix_NPD.to("cpu", dtype).flatten(0, 1).contiguous()
    write_tensors(shard_file(folder, shard, "safetensors"), tensors)
    rows = ({"pair": row.pair, "text": row.text, "image": row.image} for row in portion.pairs)
    write_json_lines(shard_file(folder, shard, "jsonl"), rows)
    skipped = ({"pair": row.pair, "image": row.image, "reason": row.reason} for row in portion.skipped)
    write_json_lines(shard_file(folder, shard, "skipped.jsonl"), skipped)
    files = [shard_file(folder, shard, ending) for ending in _HASHED]
    record = ShardRecord(
        shard=shard,
        pairs=len(portion.pairs),
        skipped=len(portion.skipped),
        sha256={file.name: sha256_of(file) for file in files},
    )
    write_bytes(shard_file(folder, shard, "json"), (record.model_dump_json() + "\n").encode())
    return record


def complete_store(folder: Path, records: Mapping[int, ShardRecord]) -> Manifest:
    """The manifest of a store all of whose shards are there."""
    manifest = read_manifest(folder)
    missing = sorted(set(range(manifest.portions)) - set(records))
    assert not missing, missing
    ordered = tuple(records[shard] for shard in range(manifest.portions))
    pairs, skipped = sum(record.pairs for record in ordered), sum(record.skipped for record in ordered)
    if not pairs:
        raise InvalidTraining(
            f"{folder}: none of the {skipped} pairs could be used; the reasons are in shards/*.skipped.jsonl. Mend the "
            "source, remove this folder, and run the same command again"
        )
    manifest = manifest.model_copy(update={"complete": True, "pairs": pairs, "skipped": skipped, "shards": ordered})
    _write_manifest(folder, manifest)
    return manifest


def _without_places(collected: Collected) -> dict[str, Any]:
    """What must be equal: models and pairs may be moved, their digests stay."""
    found = collected.model_dump(mode="json", exclude={"model"})
    found["source"] = {name: value for name, value in found["source"].items() if name != "spec"}
    return found


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    write_bytes(folder / MANIFEST_FILE, (manifest.model_dump_json(indent=2) + "\n").encode())


def _no_states(collected: Collected) -> States:
    return States.of([torch.zeros(0, collected.width)] * (2 + collected.prefixes))


def _is_whole(file: Path, digest: str) -> bool:
    return file.exists() and sha256_of(file) == digest
