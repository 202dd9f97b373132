"""Files that are either whole or not there: written beside their place, flushed, then renamed.

Knows bytes and tensors; knows nothing of what they mean.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from training.errors import InvalidTraining

_HASH_CHUNK_BYTES = 4 * 1024 * 1024


def write_bytes(file: Path, content: bytes) -> None:
    """Raises InvalidTraining where the disk refuses; a file that was there before is then still there."""
    with in_place_of(file) as made:
        made.write_bytes(content)


def write_json(file: Path, content: Any) -> None:
    """Indented, keys in the order given."""
    write_bytes(file, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_json_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One object a line, written as they come."""
    with in_place_of(file) as made, made.open("wb") as opened:
        for row in rows:
            opened.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file; equal tensors give equal bytes."""
    with in_place_of(file) as made:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, made)
        made.chmod(0o644)  # safetensors makes files that nobody else may read


def sha256_of(file: Path) -> str:
    """Hex digest of a file's bytes, read in portions."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def remove_unfinished(folder: Path) -> None:
    """What killed processes left half-written in a folder. Not while others write there."""
    for part in folder.glob(".*.part"):
        with suppress(FileNotFoundError):
            part.unlink()


@contextmanager
def in_place_of(file: Path) -> Iterator[Path]:
    """Gives a temporary path; on success it becomes `file`, on failure it goes."""
    made = file.with_name(f".{file.name}.{secrets.token_hex(8)}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield made
        _flush(made)
        made.replace(file)
        _flush(file.parent)
    except (OSError, SafetensorError) as error:
        raise InvalidTraining(
            f"{file} cannot be written: {_reason(error)}; what was made before is kept: "
            "make room, then run the same command again"
        ) from error
    finally:
        with suppress(OSError):
            made.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
