"""Hugging Face `datasets`, as `save_to_disk` leaves them, or a folder of Parquet files. Nothing is copied or cached.

    huggingface:FOLDER[?split=train&image=image&text=caption]

A picture is `{"bytes", "path"}`, encoded bytes or a path below the folder. Its reference is `row:INDEX`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from PIL import Image

from training.errors import InvalidTraining
from training.pairs.decoding import Found, ImageContent, decode_images, decode_pairs
from training.pairs.pair import Pair, PairSource, PortionPlace, Unusable

_FOOTER_END = 8
_READ_ROWS = 64
"""Rows held at a time."""
_TEXT_COLUMNS = ("caption", "text")
_REFERENCE = "row:"


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A spec in its parts."""

    spec: str
    folder: Path
    split: str | None
    image: str
    text: str | None

    def columns(self, names: Sequence[str]) -> tuple[str, str]:
        """Of picture and caption, among those that are there."""
        text = self.text or next((name for name in _TEXT_COLUMNS if name in names), _TEXT_COLUMNS[0])
        for option, name in (("image", self.image), ("text", text)):
            if name not in names:
                raise InvalidTraining(
                    f"--pairs {self.spec}: no column {name!r} among {', '.join(names)}; name it with ?{option}=COLUMN"
                )
        return self.image, text


def open_huggingface(place: str) -> PairSource:
    """A saved dataset, or else a folder of Parquet files."""
    folder, _, query = place.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if unknown := sorted(set(options) - {"split", "image", "text"}):
        raise InvalidTraining(f"--pairs huggingface:{place}: unknown option {unknown[0]!r}; known: split, image, text")
    parsed = _Place(
        spec=f"huggingface:{place}",
        folder=Path(folder),
        split=options.get("split"),
        image=options.get("image", "image"),
        text=options.get("text"),
    )
    saved = any((parsed.folder / name).exists() for name in ("state.json", "dataset_dict.json"))
    return _SavedPairs(parsed) if saved else _ParquetPairs(parsed)


class _SavedPairs:
    """What `save_to_disk` wrote; rows are read from its memory-mapped files."""

    def __init__(self, place: _Place) -> None:
        self._place = place
        self._dataset: Any = None

    def describe(self) -> dict[str, Any]:
        dataset = self._open()
        return {
            "kind": "huggingface",
            "spec": self._place.spec,
            "rows": len(dataset),
            "columns": list(self._place.columns(dataset.column_names)),
            "fingerprint": self._fingerprint,
        }

    def portions(self, size: int) -> list[PortionPlace]:
        rows = len(self._open())
        if not rows:
            raise InvalidTraining(f"--pairs {self._place.spec}: the dataset has no rows")
        return [{"first": start, "count": min(size, rows - start)} for start in range(0, rows, size)]

    def read(self, portion: PortionPlace) -> Iterator[tuple[int, Pair | Unusable]]:
        return decode_pairs(self._found(range(portion["first"], portion["first"] + portion["count"])))

    def images(self, references: Iterable[str]) -> Iterator[tuple[str, Image.Image]]:
        rows = sorted(_rows(references))
        return decode_images(one for row in rows if row < len(self._open()) for one in self._found(range(row, row + 1)))

    def _found(self, rows: range) -> Iterator[Found]:
        dataset = self._open()
        image, text = self._place.columns(dataset.column_names)
        for start in range(rows.start, rows.stop, _READ_ROWS):
            part = dataset[start : min(start + _READ_ROWS, rows.stop)]
            for row, (value, caption) in enumerate(zip(part[image], part[text], strict=True), start=start):
                yield _found_row(self._place.folder, row, value, caption)

    def _open(self) -> Any:
        if self._dataset is None:
            from datasets import DatasetDict, load_from_disk
            from datasets import Image as ImageFeature

            try:
                found: Any = load_from_disk(str(self._place.folder))
            except (OSError, ValueError) as error:
                raise InvalidTraining(f"--pairs {self._place.spec} cannot be read: {error}") from error
            if isinstance(found, DatasetDict):
                found = self._split(found)
            self._fingerprint = found._fingerprint
            image, text = self._place.columns(found.column_names)
            found = found.with_format(None).select_columns([image, text])
            if isinstance(found.features[image], ImageFeature):
                found = found.cast_column(image, ImageFeature(decode=False))
            self._dataset = found
        return self._dataset

    def _split(self, splits: Any) -> Any:
        split = self._place.split or (next(iter(splits)) if len(splits) == 1 else None)
        if split not in splits:
            raise InvalidTraining(
                f"--pairs {self._place.spec}: name one of the splits {', '.join(splits)} with ?split="
            )
        return splits[split]


class _ParquetPairs:
    """Parquet files below a folder, in the order of their names; with a split, those named after it."""

    def __init__(self, place: _Place) -> None:
        self._place = place

    def describe(self) -> dict[str, Any]:
        """The digest covers the files' footers: what is in each column of each group of rows, and where."""
        files = self._files()
        listing = [[str(file.relative_to(self._place.folder)), file.stat().st_size, _footer(file)] for file in files]
        return {
            "kind": "parquet",
            "spec": self._place.spec,
            "columns": list(self._place.columns(self._open(files[0]).schema_arrow.names)),
            "files": len(listing),
            "footers_sha256": hashlib.sha256(json.dumps(listing).encode()).hexdigest(),
        }

    def portions(self, size: int) -> list[PortionPlace]:
        found: list[PortionPlace] = []
        first = 0
        for file in self._files():
            opened = self._open(file)
            self._place.columns(opened.schema_arrow.names)
            rows = opened.metadata.num_rows
            for start in range(0, rows, size):
                count, name = min(size, rows - start), str(file.relative_to(self._place.folder))
                found.append({"file": name, "row": start, "first": first + start, "count": count})
            first += rows
        if not found:
            raise InvalidTraining(f"--pairs {self._place.spec}: the files have no rows")
        return found

    def read(self, portion: PortionPlace) -> Iterator[tuple[int, Pair | Unusable]]:
        rows = range(portion["row"], portion["row"] + portion["count"])
        return decode_pairs(self._found(self._place.folder / portion["file"], rows, portion["first"] - portion["row"]))

    def images(self, references: Iterable[str]) -> Iterator[tuple[str, Image.Image]]:
        return decode_images(self._wanted(_rows(references)))

    def _wanted(self, wanted: set[int]) -> Iterator[Found]:
        first = 0
        for file in self._files():
            rows = range(self._open(file).metadata.num_rows)
            if any(first <= row < first + len(rows) for row in wanted):
                yield from (one for one in self._found(file, rows, first) if one.index in wanted)
            first += len(rows)

    def _found(self, file: Path, rows: range, before: int) -> Iterator[Found]:
        """Rows of a file, out of the row groups they lie in; `before` are the rows of earlier files."""
        opened = self._open(file)
        image, text = self._place.columns(opened.schema_arrow.names)
        groups, start, end = [], None, 0
        for group in range(opened.num_row_groups):
            begin, end = end, end + opened.metadata.row_group(group).num_rows
            if begin < rows.stop and end > rows.start:
                groups.append(group)
                start = begin if start is None else start
        row = start or 0
        for batch in opened.iter_batches(batch_size=_READ_ROWS, row_groups=groups, columns=[image, text]):
            for value, caption in zip(batch.column(image).to_pylist(), batch.column(text).to_pylist(), strict=True):
                if row >= rows.stop:
                    return
                if row >= rows.start:
                    yield _found_row(self._place.folder, before + row, value, caption)
                row += 1

    def _files(self) -> list[Path]:
        files = sorted(self._place.folder.rglob("*.parquet"))
        if self._place.split is not None:
            files = [
                file
                for file in files
                if file.name.startswith(f"{self._place.split}-") or file.stem == self._place.split
            ]
        if not files:
            raise InvalidTraining(f"--pairs {self._place.spec}: neither a saved dataset nor Parquet files are there")
        return files

    def _open(self, file: Path) -> Any:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        try:
            return ParquetFile(file)
        except (OSError, ArrowException) as error:
            raise InvalidTraining(f"{file} cannot be read as Parquet ({error}); fetch it again") from error


def _found_row(folder: Path, row: int, value: Any, caption: Any) -> Found:
    return Found(index=row, reference=f"{_REFERENCE}{row}", text=caption, content=_content(folder, value))


def _footer(file: Path) -> str:
    """Digest of a Parquet file's last part: the footer, its length in four bytes, and a mark of four."""
    with file.open("rb") as opened:
        opened.seek(-_FOOTER_END, os.SEEK_END)
        length = int.from_bytes(opened.read(4), "little")
        opened.seek(-_FOOTER_END - length, os.SEEK_END)
        return hashlib.sha256(opened.read()).hexdigest()


def _content(folder: Path, value: Any) -> ImageContent:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        return folder / value
    return bytes(value) if isinstance(value, bytes | bytearray | memoryview) else None


def _rows(references: Iterable[str]) -> set[int]:
    numbers = (name.removeprefix(_REFERENCE) for name in references if name.startswith(_REFERENCE))
    return {int(number) for number in numbers if number.isdigit()}
