"""JSON lines beside a folder of pictures: `{"image": path relative to the file, "text": caption}`.

Its digest covers the lines; the pictures they name are not looked into before they are used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from training.errors import InvalidTraining
from training.pairs.decoding import Found, decode_images, decode_pairs
from training.pairs.pair import Pair, PortionPlace, Unusable


class JsonLinesPairs:
    """One file of pairs. Empty lines count for nothing."""

    def __init__(self, place: str) -> None:
        self._file = Path(place)

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for _, _, line in self._lines(0):
            digest.update(line)
        return {"kind": "jsonl", "spec": f"jsonl:{self._file}", "sha256": digest.hexdigest()}

    def portions(self, size: int) -> list[PortionPlace]:
        """Looks at every line, so that a bad one is found before any work is done."""
        found: list[PortionPlace] = []
        count = 0
        for number, offset, line in self._lines(0):
            if not line.strip():
                continue
            self._parse(line, number)
            if count % size == 0:
                found.append({"offset": offset, "line": number, "first": count, "count": 0})
            found[-1]["count"] += 1
            count += 1
        if not found:
            raise InvalidTraining(f"--pairs jsonl:{self._file}: the file has no pairs")
        return found

    def read(self, portion: PortionPlace) -> Iterator[tuple[int, Pair | Unusable]]:
        return decode_pairs(self._found(portion))

    def images(self, references: Iterable[str]) -> Iterator[tuple[str, Image.Image]]:
        wanted = dict.fromkeys(references)
        return decode_images(
            Found(index=index, reference=name, text=None, content=self._file.parent / name)
            for index, name in enumerate(wanted)
        )

    def _found(self, portion: PortionPlace) -> Iterator[Found]:
        index, end = portion["first"], portion["first"] + portion["count"]
        for number, _, line in self._lines(portion["offset"], portion["line"]):
            if index == end:
                return
            if line.strip():
                row = self._parse(line, number)
                image = row["image"]
                yield Found(index=index, reference=image, text=row["text"], content=self._file.parent / image)
                index += 1

    def _lines(self, offset: int, number: int = 1) -> Iterator[tuple[int, int, bytes]]:
        """(line number, byte offset, line) from an offset on."""
        try:
            with self._file.open("rb") as opened:
                opened.seek(offset)
                for found, line in enumerate(opened, start=number):
                    yield found, offset, line
                    offset += len(line)
        except OSError as error:
            raise InvalidTraining(f"--pairs: {self._file} cannot be read: {error.strerror}") from error

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidTraining(f"{self._file}, line {number}, is not JSON ({error}); mend or remove it") from error
        if not isinstance(row, dict) or not isinstance(row.get("image"), str) or "text" not in row:
            raise InvalidTraining(
                f'{self._file}, line {number}: a pair is {{"image": "path", "text": "caption"}}; mend or remove it'
            )
        return row
