"""What an artifact says of its concepts, for whoever shows them: `concepts.jsonl` and the thumbnails beside it.

    {"id", "label", "mean_activation", "texts", "images": [{"reference"}], "thumbnails": "thumbnails/17-DIGEST.json"}
    thumbnails/17-DIGEST.json                   of concept 17: for each of its images, in order, a data URL or null

One file per concept: whoever shows one opens one, and 32,768 files are copied sooner than a file for each of 327,680
pictures. The fingerprint covers lines and so digests, not the thumbnails themselves: an engine never opens them and
starts without their folder, yet a picture that was exchanged is found out by whoever shows it. Older artifacts have a
thumbnail in the line, at its image, as a concept has it in memory.

Knows files, no weights and no engine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, TypeAdapter

from steering.errors import BadArtifact

CONCEPTS_FILE, THUMBNAIL_FOLDER = "concepts.jsonl", "thumbnails"
Concept = dict[str, Any]
"""id, label, mean_activation, texts, images: [{reference, thumbnail: data URL or None}]."""
Thumbnail = Annotated[str, Field(pattern="^data:image/")] | None
_DIGEST_DIGITS = 32
"""Of a thumbnail file's sha256, in its name."""


class _Image(BaseModel):
    """What is looked at in an image."""

    thumbnail: Thumbnail = None
    """Inline in older artifacts."""


class _Line(BaseModel):
    """What is looked at in a line; the rest is between those who made it and those who show it."""

    id: int = Field(strict=True)
    images: list[_Image] = Field(default_factory=list)
    thumbnails: str | None = Field(
        default=None, pattern=rf"^{THUMBNAIL_FOLDER}/[0-9]+-[0-9a-f]{{{_DIGEST_DIGITS}}}\.json$"
    )
    """Relative to the artifact; no path leads out of its folder."""


_THUMBNAILS = TypeAdapter(list[Thumbnail])


class StoredConcepts:
    """The concepts of an artifact's folder, with thumbnails: read each time they are gone through, never kept."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._file = folder, folder / CONCEPTS_FILE
        self._identity = self._identify()

    def __iter__(self) -> Iterator[Concept]:
        """Raises BadArtifact where the file is no longer that which was there at first: its ids mean others."""
        if self._identify() != self._identity:
            raise BadArtifact(f"{self._file} was replaced; load the artifact again", field="artifact")
        return read_concepts(self._folder, thumbnails=True)

    def _identify(self) -> tuple[int, int, int]:
        try:
            found = self._file.stat()
        except OSError as error:
            raise BadArtifact(f"{self._file} cannot be read: {error.strerror}", field="artifact") from error
        return found.st_ino, found.st_size, found.st_mtime_ns


def read_concepts(folder: Path, *, thumbnails: bool) -> Iterator[Concept]:
    """One concept at a time, in order. Raises BadArtifact, naming the line.

    Without `thumbnails` no file of theirs is opened and the images lack them; with, in an artifact that was copied
    without their folder, each is None.
    """
    file = folder / CONCEPTS_FILE
    try:
        with file.open(encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield parse_concept(line, f"{file}, line {number}", folder if thumbnails else None)
    except (UnicodeDecodeError, OSError) as error:
        raise BadArtifact(f"{file} cannot be read: {error}", field="artifact") from error


def parse_concept(line: str, where: str, folder: Path | None) -> Concept:
    """One line of `concepts.jsonl`; `where` names it in errors. Raises BadArtifact.

    The one place that knows both where thumbnails are and where they were; without a folder they are left out.
    """
    try:
        concept = json.loads(line)
        checked = _Line.model_validate(concept)
    except (ValueError, RecursionError) as error:
        raise BadArtifact(f"{where}: {error}; copy it again from where it was made", field="artifact") from error
    concept.pop("thumbnails", None)
    if folder is None:
        return _with_images(concept, [_without_thumbnail(image) for image in concept.get("images", [])])
    inline = [image.thumbnail for image in checked.images]
    found = _read_thumbnails(folder, checked.thumbnails, len(inline)) if checked.thumbnails else inline
    pairs = zip(concept.get("images", []), found, strict=True)
    return _with_images(concept, [image | {"thumbnail": thumbnail} for image, thumbnail in pairs])


def _with_images(concept: Concept, images: list[dict[str, Any]]) -> Concept:
    return concept | {"images": images} if images else concept


def _read_thumbnails(folder: Path, path: str, count: int) -> list[str | None]:
    if not (folder / THUMBNAIL_FOLDER).is_dir():
        return [None] * count
    file = folder / path
    try:
        content = file.read_bytes()
        if not file.stem.endswith(f"-{_digest(content)}"):
            raise ValueError(f"it is not the file that {CONCEPTS_FILE} was written with")
        found = _THUMBNAILS.validate_json(content)
        if len(found) != count:
            raise ValueError(f"it has {len(found)} thumbnails for {count} images")
    except (ValueError, OSError) as error:
        raise BadArtifact(
            f"{file}: {error}; copy {THUMBNAIL_FOLDER}/ again from where the artifact was made", field="artifact"
        ) from error
    return found


def write_concepts(folder: Path, concepts: Iterable[Concept]) -> None:
    """`concepts.jsonl` and the thumbnails into a new folder, one concept at a time."""
    with (folder / CONCEPTS_FILE).open("w", encoding="utf-8", newline="\n") as lines:
        for number, concept in enumerate(concepts):
            lines.write(json.dumps(_put_thumbnails_aside(folder, number, concept), ensure_ascii=False) + "\n")


def _put_thumbnails_aside(folder: Path, number: int, concept: Concept) -> Concept:
    """The concept as its line has it. One without thumbnails is as it always was, and so is its fingerprint."""
    images = concept.get("images", [])
    found = [image.get("thumbnail") for image in images]
    if not any(found):
        return concept
    content = json.dumps(found, separators=(",", ":")).encode()
    path = f"{THUMBNAIL_FOLDER}/{number}-{_digest(content)}.json"
    (folder / THUMBNAIL_FOLDER).mkdir(exist_ok=True)
    (folder / path).write_bytes(content)
    return concept | {"images": [_without_thumbnail(image) for image in images], "thumbnails": path}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_DIGEST_DIGITS]


def _without_thumbnail(image: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in image.items() if name != "thumbnail"}
