"""Reads any rows of a store, in any order, with memory for those rows alone.

Rows are read with `pread`, not mapped: what is asked for is a batch in random order out of a store of many times the
machine's memory. Knows no model.

Shapes: N rows asked for, D width.
"""

from __future__ import annotations

import json
import os
import struct
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from training.durable_files import sha256_of
from training.errors import InvalidTraining
from training.store.layout import (
    IMAGE_HASH,
    MANIFEST_FILE,
    PREFIXES,
    TEXT_HASH,
    Manifest,
    layer_name,
    read_manifest,
    shard_file,
)

_OPEN_FILES = 128
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}


class PairBatch(NamedTuple):
    """Some rows of a store; row i of everything is one pair."""

    image_ND: Tensor
    """v, float32."""
    text_ND: Tensor
    """t of the whole text, float32."""
    begun_ND: Tensor
    """t at some moment of the text's being generated, the last one among them: of a prefix or of the whole. Where no
    prefixes were collected, of the whole."""
    text_ids_N: Tensor
    """int64; equal numbers for equal texts."""
    image_ids_N: Tensor
    """int64; equal numbers for equal pictures."""


@dataclass(frozen=True, kw_only=True)
class StoredPair:
    """What a row stands for."""

    row: int
    """Row of the store."""
    text: str
    image: str
    """Reference of the picture in its source."""


class RepresentationStore:
    """One kind of states of a finished store. Not for several threads at once."""

    def __init__(self, folder: Path, manifest: Manifest, name: str) -> None:
        self.folder, self.manifest, self.name = folder, manifest, name
        self._starts = [0]
        for record in manifest.shards:
            self._starts.append(self._starts[-1] + record.pairs)
        self._files: OrderedDict[int, _ShardFile] = OrderedDict()

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def width(self) -> int:
        """D."""
        return self.manifest.collected.width

    @property
    def layer(self) -> int | None:
        """The decoder layer of these states; None for CLIP."""
        number = self.name.removeprefix("layer_")
        return int(number) if number != self.name else None

    def read(self, rows: Sequence[int] | Tensor, *, epoch: int = 0) -> PairBatch:
        """Rows in the order asked for. Raises InvalidTraining, naming file and row, for a state that is not finite.

        `epoch` moves `begun_ND` on: every other epoch it is the whole, in between one of the prefixes in turn.
        """
        wanted = rows.tolist() if isinstance(rows, Tensor) else list(rows)
        image_ND, text_ND, begun_ND = (torch.empty(len(wanted), self.width) for _ in range(3))
        text_ids_N, image_ids_N = (torch.empty(len(wanted), dtype=torch.int64) for _ in range(2))
        prefixes = self.manifest.collected.prefixes
        for shard, places in self._by_shard(wanted).items():
            file, inside = self._open(shard), [wanted[place] - self._starts[shard] for place in places]
            image_ND[places] = file.rows(f"{self.name}.image", inside).float()
            text_ND[places] = file.rows(f"{self.name}.text", inside).float()
            text_ids_N[places] = file.rows(TEXT_HASH, inside)
            image_ids_N[places] = file.rows(IMAGE_HASH, inside)
            begun_ND[places] = text_ND[places]
            turns = [wanted[place] + epoch for place in places]
            partial = [index for index, turn in enumerate(turns) if prefixes and turn % 2 == 0]
            if partial:
                chosen = [inside[i] * prefixes + turns[i] // 2 % prefixes for i in partial]
                found = file.rows(f"{self.name}.{PREFIXES}", chosen)
                begun_ND[[places[index] for index in partial]] = found.float()
        batch = PairBatch(image_ND, text_ND, begun_ND, text_ids_N, image_ids_N)
        self._check_finite(batch, wanted)
        return batch

    def batches(self, size: int, rows: range | None = None) -> Iterator[tuple[range, PairBatch]]:
        """All rows, or a range of them, in order, `size` at a time."""
        rows = range(len(self)) if rows is None else rows
        for start in range(rows.start, rows.stop, size):
            part = range(start, min(start + size, rows.stop))
            yield part, self.read(part)

    def pairs(self, rows: range | None = None) -> Iterator[StoredPair]:
        """What the rows stand for, in order; read line by line."""
        rows = range(len(self)) if rows is None else rows
        for shard, record in enumerate(self.manifest.shards):
            start = self._starts[shard]
            if start >= rows.stop or start + record.pairs <= rows.start:
                continue
            with shard_file(self.folder, shard, "jsonl").open(encoding="utf-8") as lines:
                for row, line in enumerate(lines, start=start):
                    if row in rows:
                        found = json.loads(line)
                        yield StoredPair(row=row, text=found["text"], image=found["image"])

    def _by_shard(self, rows: list[int]) -> dict[int, list[int]]:
        """Places in `rows`, by shard, in the order of the file."""
        found: dict[int, list[int]] = {}
        for place in sorted(range(len(rows)), key=rows.__getitem__):
            if not 0 <= rows[place] < len(self):
                raise IndexError(f"row {rows[place]} of a store of {len(self)}")
            found.setdefault(bisect_right(self._starts, rows[place]) - 1, []).append(place)
        return found

    def _open(self, shard: int) -> _ShardFile:
        if shard in self._files:
            self._files.move_to_end(shard)
        else:
            self._files[shard] = _ShardFile(shard_file(self.folder, shard, "safetensors"))
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        return self._files[shard]

    def _check_finite(self, batch: PairBatch, rows: list[int]) -> None:
        parts = (("image", batch.image_ND), ("text", batch.text_ND), (PREFIXES, batch.begun_ND))
        for modality, states_ND in parts:
            bad_N = ~torch.isfinite(states_ND).all(1)
            if bad_N.any():
                row = rows[int(bad_N.nonzero()[0])]
                shard = bisect_right(self._starts, row) - 1
                raise InvalidTraining(
                    f"{shard_file(self.folder, shard, 'safetensors')}: {self.name}.{modality} of row "
                    f"{row - self._starts[shard]} is not finite; collect into another --output with another --dtype "
                    f"(the model ran in {self.manifest.collected.model_dtype}), or with --skip-not-finite"
                )


class _ShardFile:
    """Rows of the tensors of one safetensors file."""

    def __init__(self, file: Path) -> None:
        try:
            self._descriptor = os.open(file, os.O_RDONLY)
        except OSError as error:
            raise InvalidTraining(f"{file} cannot be read: {error.strerror}; collect again") from error
        self._file = file
        (length,) = struct.unpack("<Q", os.pread(self._descriptor, 8, 0))
        self._header: dict[str, Any] = json.loads(os.pread(self._descriptor, length, 8))
        self._data_start = 8 + length

    def rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Some rows of a tensor, in its own dtype; neighbours are read in one go."""
        entry = self._header[name]
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"][1:]
        width = dtype.itemsize * (shape[0] if shape else 1)
        start = self._data_start + entry["data_offsets"][0]
        content = bytearray(width * len(rows))
        view = memoryview(content)
        done = 0
        for first, count in _runs(rows):
            target = view[done * width : (done + count) * width]
            if os.preadv(self._descriptor, [target], start + first * width) != len(target):
                raise InvalidTraining(f"{self._file} is shorter than its header says; collect again")
            done += count
        return torch.frombuffer(content, dtype=dtype).reshape(len(rows), *shape)

    def close(self) -> None:
        os.close(self._descriptor)


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of each run of neighbours."""
    start = 0
    for index in range(1, len(rows) + 1):
        if index == len(rows) or rows[index] != rows[index - 1] + 1:
            yield rows[start], index - start
            start = index


def open_store(folder: Path, layer: int | None = None, *, verify: bool = True) -> RepresentationStore:
    """The states at `layer`; None: the only ones it has. Raises InvalidTraining, naming what is wrong.

    `verify` reads every byte once against its checksum.
    """
    manifest = read_manifest(folder)
    if not manifest.complete:
        raise InvalidTraining(
            f"{folder / MANIFEST_FILE}: the collection is not finished; run collect_representations again to go on"
        )
    name = _find_name(folder, manifest, layer)
    if verify:
        for record in manifest.shards:
            for file_name, digest in record.sha256.items():
                _verify(shard_file(folder, record.shard, "json").parent / file_name, digest)
    return RepresentationStore(folder, manifest, name)


def require_model(store: RepresentationStore, sha256: str, model: str) -> None:
    """Raises InvalidTraining if the store was not collected from the model with these weights."""
    if store.manifest.collected.model_sha256 != sha256:
        raise InvalidTraining(
            f"{store.folder / MANIFEST_FILE}: collected from {store.manifest.collected.model!r}, "
            f"whose weights are not those of --model {model}; give the model it was collected from, or collect again"
        )


def _find_name(folder: Path, manifest: Manifest, layer: int | None) -> str:
    names = manifest.collected.names
    if layer is None and len(names) == 1:
        return names[0]
    if layer is None or layer_name(layer) not in names:
        asked = "--layer is needed" if layer is None else f"layer {layer} was not collected"
        raise InvalidTraining(f"{folder / MANIFEST_FILE}: {asked}; the store holds {', '.join(names)}")
    return layer_name(layer)


def _verify(file: Path, digest: str) -> None:
    try:
        found = sha256_of(file)
    except OSError as error:
        raise InvalidTraining(f"{file} cannot be read: {error.strerror}; collect again") from error
    if found != digest:
        raise InvalidTraining(
            f"{file} has changed since it was collected (its checksum differs); run "
            "collect_representations again with the same settings: it makes only this shard anew"
        )
