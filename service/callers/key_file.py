"""API keys as they are kept: their file, read and written. Knows no requests.

Only hashes are kept: {"keys": [{"name", "sha256", "scopes": [...], "quota": {...}, "expires": ISO time}]}.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import tempfile
from pathlib import Path
from typing import Literal, get_args

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

Scope = Literal["chat", "explain", "evaluate", "metrics"]
SCOPES: frozenset[Scope] = frozenset(get_args(Scope))
MAX_FILE_BYTES = 1024 * 1024


class KeyFileError(ValueError):
    """Keys could not be read; the message says where and never quotes what was there."""


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Quota(Strict):
    """What a key may use; None is no limit. A whole minute's worth may come at once."""

    requests_per_minute: int | None = Field(default=None, ge=1)
    """Requests of any kind, refused ones included."""
    images_per_minute: int | None = Field(default=None, ge=1)
    pixels_per_minute: int | None = Field(default=None, ge=1)
    """Pixels of all images, as their headers state them."""


class Key(Strict):
    """One key without its secret."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    """Keys of one name share quota and cache: an old and a new one live side by side while a key is exchanged."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: frozenset[Scope] = Field(min_length=1)
    quota: Quota = Quota()
    expires: AwareDatetime | None = None
    """With its offset from UTC."""


class KeyFile(Strict):
    """What the file and the environment hold."""

    keys: tuple[Key, ...]

    @model_validator(mode="after")
    def _unambiguous(self) -> KeyFile:
        if len({key.sha256 for key in self.keys}) < len(self.keys):
            raise ValueError("two keys have the same hash")
        return self


def read_keys(file: Path) -> KeyFile:
    """Raises KeyFileError."""
    try:
        with file.open("rb") as content:
            text = content.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KeyFileError(f"{file}: cannot be read ({error.strerror})") from None
    if len(text) > MAX_FILE_BYTES:
        raise KeyFileError(f"{file}: larger than {MAX_FILE_BYTES} bytes")
    return parse_keys(text, source=str(file))


def parse_keys(text: bytes, *, source: str) -> KeyFile:
    """Raises KeyFileError, which names the place of the first fault and not its content."""
    try:
        return KeyFile.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(step) for step in first["loc"] if first["type"] != "extra_forbidden")
        raise KeyFileError(f"{source}: {place or 'as a whole'}: {first['msg']}") from None


def new_key(fields: dict) -> tuple[str, Key]:
    """A random key and what is kept of it. Raises ValidationError."""
    secret = "vlsae-" + secrets.token_urlsafe(32)
    fields = {**fields, "sha256": hashlib.sha256(secret.encode()).hexdigest()}
    return secret, Key.model_validate_json(json.dumps(fields))


def append_key(file: Path, key: Key) -> None:
    """Atomically: a reader sees the file before or after, and of two writers neither is lost. Raises KeyFileError."""
    file = file.resolve()
    try:
        folder = os.open(file.parent, os.O_RDONLY)
    except OSError as error:
        raise KeyFileError(f"{file.parent}: {error.strerror}") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        known = read_keys(file).keys if file.exists() else ()
        text = KeyFile(keys=(*known, key)).model_dump_json(indent=2, exclude_defaults=True)
        _replace(file, text.encode() + b"\n")
        os.fsync(folder)
    except OSError as error:
        raise KeyFileError(f"{file}: {error.strerror}") from None
    finally:
        os.close(folder)


def _replace(file: Path, content: bytes) -> None:
    """Readable by its owner alone from the first moment; the owner of a file that was there stays."""
    before = file.stat() if file.exists() else None
    descriptor, new = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "wb") as sink:
            if before is not None and before.st_uid != os.geteuid():
                os.fchown(sink.fileno(), before.st_uid, before.st_gid)
            sink.write(content)
            sink.flush()
            os.fsync(sink.fileno())
        Path(new).replace(file)
    finally:
        Path(new).unlink(missing_ok=True)
