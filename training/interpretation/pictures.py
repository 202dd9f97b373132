"""One pass over the pictures that concepts are shown by: a thumbnail of each as a file, and whoever else looks at it.

Thumbnails lie at FOLDER/ab/abcdef....jpg, named by the hash of the picture's reference, which says nothing of where it
is from. Pictures themselves are held a batch at a time.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable, Collection, Sequence
from itertools import islice
from pathlib import Path

from PIL import Image

from training.errors import InvalidTraining
from training.pairs import PairSource

BATCH = 64
JPEG_QUALITY = 75
Look = Callable[[Sequence[str], Sequence[Image.Image]], None]
"""Takes references and their pictures."""


def make_thumbnails(
    source: PairSource,
    references: Collection[str],
    folder: Path,
    side_px: int,
    look: Look,
    report: Callable[[str], None],
) -> None:
    """Thumbnails of all that the source still has; `look` sees every picture once.

    Raises InvalidTraining if it has none of them.
    """
    images, found = source.images(references), 0
    while batch := list(islice(images, BATCH)):
        for reference, image in batch:
            _write(thumbnail_file(folder, reference), thumbnail(image, side_px))
        look([reference for reference, _ in batch], [image for _, image in batch])
        found += len(batch)
    if references and not found:
        raise InvalidTraining(
            f"--pairs {source.describe().get('spec', '')}: none of the {len(references)} pictures that concepts refer "
            "to is there; give the pairs that the representations were collected from"
        )
    report(f"{found} of {len(references)} pictures found")


def _write(file: Path, content: bytes) -> None:
    """Not flushed one by one: there are hundreds of thousands, and a run that is killed makes them again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    except OSError as error:
        raise InvalidTraining(f"{file} cannot be written: {error.strerror}; make room and run this again") from error


def thumbnail_file(folder: Path, reference: str) -> Path:
    """Where the thumbnail of a picture is, or would be."""
    digest = hashlib.sha256(reference.encode("utf-8", "surrogatepass")).hexdigest()[:24]
    return folder / digest[:2] / f"{digest}.jpg"


def thumbnail(image: Image.Image, side_px: int) -> bytes:
    """A JPEG with this longest side."""
    small = image.convert("RGB")
    small.thumbnail((side_px, side_px))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def as_data_url(file: Path) -> str | None:
    """The thumbnail inline; None where there is none."""
    if not file.exists():
        return None
    return "data:image/jpeg;base64," + base64.b64encode(file.read_bytes()).decode()
