"""Pictures of a benchmark as files in a folder: found first, read when asked about. Knows no benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from PIL import Image

from training.errors import InvalidTraining
from training.pairs.decoding import FORMATS


def pictures_in(folder: Path, names: Iterable[str]) -> dict[str, Callable[[], Image.Image]]:
    """By name, a function that reads the picture; a missing one is refused before any is read."""
    if not folder.is_dir():
        raise InvalidTraining(f"--images: {folder} is not a folder")
    names = list(names)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InvalidTraining(
            f"--images: {folder / missing[0]} is missing{others} of {len(names)}; give the folder that holds the files"
        )
    return {name: partial(read_picture, folder / name) for name in names}


def read_picture(file: Path) -> Image.Image:
    """The picture in RGB; nothing of the file stays open."""
    try:
        with Image.open(file, formats=FORMATS) as opened:
            return opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InvalidTraining(f"{file}: not a readable picture ({error}); fetch the file again") from error
