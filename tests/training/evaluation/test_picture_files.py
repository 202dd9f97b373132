"""Pictures are read when they are asked for, each time, and a bad one is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.published_benchmarks import CocoFolders, picture_name
from training.errors import InvalidTraining
from training.evaluation.picture_files import pictures_in, read_picture


def test_nothing_is_read_before_it_is_asked_for(coco: CocoFolders):
    name = picture_name(42)
    read = pictures_in(coco.images, [name])[name]
    Image.new("L", (5, 7)).save(coco.images / name)
    first = read()
    assert (first.mode, first.size) == ("RGB", (5, 7))
    assert read() is not first


@pytest.mark.parametrize("content", [b"", b"no picture", None], ids=["empty", "text", "cut short"])
def test_a_bad_picture_is_named(coco: CocoFolders, content: bytes | None):
    file: Path = coco.images / picture_name(42)
    file.write_bytes(file.read_bytes()[:300] if content is None else content)
    with pytest.raises(InvalidTraining, match=rf"{file.name}: not a readable picture"):
        read_picture(file)
