"""WebDataset tar shards, as CC3M is distributed: files that share a key are one pair.

    000000012.jpg   the picture (jpg, jpeg, png, webp, gif, bmp, tif, tiff)
    000000012.txt   the caption;  or else `caption` in 000000012.json

Tars are read where a portion lies, never whole. A pair's reference is TAR//KEY.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import sys
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image

from training.errors import InvalidTraining
from training.pairs.decoding import Found, decode_images, decode_pairs
from training.pairs.pair import Pair, PortionPlace, Unusable

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_BETWEEN = "//"
_BLOCK_BYTES = 512


class _Group(NamedTuple):
    """Neighbouring files of one key."""

    key: str
    offset: int
    """Of the first one's header in the tar."""
    members: dict[str, tarfile.TarInfo]
    """By ending, in lower case."""


class WebDatasetPairs:
    """All tars that match a pattern, in the order of their names."""

    def __init__(self, place: str) -> None:
        self._pattern = place
        plain = re.split(r"[*?\[]", place, maxsplit=1)[0]
        self._root = Path(plain) if plain.endswith("/") else Path(plain).parent
        self._members_sha256: str | None = None

    def describe(self) -> dict[str, Any]:
        """The digest covers names, sizes and times as the headers have them, wherever the tars lie."""
        if self._members_sha256 is None:
            self.portions(sys.maxsize)
        return {
            "kind": "webdataset",
            "spec": f"webdataset:{self._pattern}",
            "tars": len(self._tars()),
            "members_sha256": self._members_sha256,
        }

    def portions(self, size: int) -> list[PortionPlace]:
        """Reads every header, no file: a tar that is cut off is found before any work is done."""
        found: list[PortionPlace] = []
        first, digest = 0, hashlib.sha256()
        for name in self._tars():
            with self._open(name) as opened:
                for count, group in enumerate(_groups(opened, name)):
                    digest.update(_identity(name, group))
                    if count % size == 0:
                        found.append({"tar": name, "offset": group.offset, "first": first, "count": 0})
                    found[-1]["count"] += 1
                    first += 1
        self._members_sha256 = digest.hexdigest()
        if not found:
            raise InvalidTraining(f"--pairs webdataset:{self._pattern}: the tars hold no pairs")
        return found

    def read(self, portion: PortionPlace) -> Iterator[tuple[int, Pair | Unusable]]:
        return decode_pairs(self._found(portion))

    def images(self, references: Iterable[str]) -> Iterator[tuple[str, Image.Image]]:
        keys: dict[str, set[str]] = {}
        for reference in references:
            name, _, key = reference.partition(_BETWEEN)
            keys.setdefault(name, set()).add(key)
        return decode_images(self._wanted(keys))

    def _tars(self) -> list[str]:
        """Paths below the root."""
        files = sorted(name for name in glob.glob(self._pattern, recursive=True) if os.path.isfile(name))
        if not files:
            raise InvalidTraining(f"--pairs webdataset:{self._pattern}: no file matches")
        return [os.path.relpath(name, self._root) for name in files]

    def _found(self, portion: PortionPlace) -> Iterator[Found]:
        name, first = portion["tar"], portion["first"]
        with self._open(name, portion["offset"]) as opened:
            for index, group in enumerate(islice(_groups(opened, name), portion["count"]), start=first):
                yield _read_group(opened, name, group, index)

    def _wanted(self, keys: dict[str, set[str]]) -> Iterator[Found]:
        for name in self._tars():
            if name not in keys:
                continue
            with self._open(name) as opened:
                for group in _groups(opened, name):
                    if group.key in keys[name]:
                        yield _read_group(opened, name, group, 0)

    @contextmanager
    def _open(self, name: str, offset: int = 0) -> Iterator[tarfile.TarFile]:
        file = self._root / name
        try:
            with file.open("rb") as opened:
                opened.seek(offset)
                with tarfile.open(fileobj=opened, mode="r:") as tar:
                    yield tar
        except (OSError, tarfile.TarError) as error:
            raise InvalidTraining(f"{file} cannot be read as a tar ({error}); fetch it again or remove it") from error


def _groups(tar: tarfile.TarFile, name: str) -> Iterator[_Group]:
    """Neighbouring files of the same key; folders and links count for nothing."""
    group: _Group | None = None
    while (member := _next(tar, name)) is not None:
        if not member.isfile():
            continue
        folder, slash, base = member.name.rpartition("/")
        stem, _, ending = base.partition(".")
        key = f"{folder}{slash}{stem}"
        if group is None or group.key != key:
            if group is not None:
                yield group
            group = _Group(key, member.offset, {})
        group.members[ending.lower()] = member
    if group is not None:
        yield group


def _identity(name: str, group: _Group) -> bytes:
    members = [(one.name, one.offset, one.size, one.mtime) for one in group.members.values()]
    return (json.dumps([name, members]) + "\n").encode()


def _next(tar: tarfile.TarFile, name: str) -> tarfile.TarInfo | None:
    """The next member, without keeping those before it. A tar ends with a block of zeros, or it was cut off."""
    member = tar.next()
    tar.members = []  # type: ignore[attr-defined]
    if member is None:
        opened: BinaryIO = tar.fileobj  # type: ignore[assignment]
        opened.seek(tar.offset)
        if opened.read(_BLOCK_BYTES) != bytes(_BLOCK_BYTES):
            raise tarfile.ReadError(f"{name} is cut off or damaged at byte {tar.offset}")
    return member


def _read_group(tar: tarfile.TarFile, name: str, group: _Group, index: int) -> Found:
    image = next((group.members[ending] for ending in IMAGE_ENDINGS if ending in group.members), None)
    content = None if image is None else _content(tar, image)
    return Found(index=index, reference=f"{name}{_BETWEEN}{group.key}", text=_caption(tar, group), content=content)


def _caption(tar: tarfile.TarFile, group: _Group) -> Any:
    """Of the .txt, or else of the .json; bytes where that is no text."""
    if "txt" in group.members:
        raw = _content(tar, group.members["txt"])
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return raw
    if "json" not in group.members:
        return None
    raw = _content(tar, group.members["json"])
    try:
        row = json.loads(raw)
    except (ValueError, RecursionError):
        return raw
    return row.get("caption") if isinstance(row, dict) else None


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    opened = tar.extractfile(member)
    assert opened is not None, member.name
    return opened.read()
