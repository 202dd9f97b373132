"""API keys: who asks, for what they may, how much. `python -m service.callers.keys` makes one. Knows no routes.

Only hashes are kept: {"keys": [{"name", "sha256", "scopes": [...], "quota": {...}, "expires": ISO time}]} in a file, or
in the environment as VLSAE_KEYS. Nothing of a key is ever logged but its name.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from service.errors import ApiError
from service.settings import KEYS_VARIABLE, LaunchSettings, Settings, SettingsError
from service.watched_file import WatchedFile

log = logging.getLogger(__name__)
Scope = Literal["chat", "explain", "evaluate", "metrics"]
SCOPES: frozenset[Scope] = frozenset(get_args(Scope))
MAX_FILE_BYTES = 1024 * 1024
BEARER = re.compile(r"bearer +([!-~]{1,1024})", re.IGNORECASE)


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


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who sent a request."""

    name: str
    """The key's name; empty where the service has no keys. Callers of different names share no cache."""
    scopes: frozenset[Scope]
    quota: Quota = Quota()


ANYBODY = Caller(name="", scopes=SCOPES)
"""Every caller of a service without keys, and whoever asks for a public path."""


class KeyRing:
    """The keys in force. Those of a file are read again when it changes; a broken new file leaves the old keys."""

    def __init__(self, keys: KeyFile, file: WatchedFile | None = None) -> None:
        self._keys, self._file = keys.keys, file
        self._complaint = ""
        """What was wrong with the file when it was last looked at."""

    @classmethod
    def of_file(cls, file: Path) -> KeyRing:
        """Raises KeyFileError."""
        watched = WatchedFile(file)
        watched.changed()  # before it is read: a change in between is seen later
        return cls(read_keys(file), watched)

    def find(self, presented: bytes) -> Caller | None:
        """The caller behind a key. The time it takes says nothing of how much of a key was right."""
        self._reread()
        digest, found = hashlib.sha256(presented).hexdigest(), None
        for key in self._keys:
            if hmac.compare_digest(digest, key.sha256):
                found = key
        if found is None or (found.expires is not None and found.expires <= datetime.now(UTC)):
            return None
        return Caller(name=found.name, scopes=found.scopes, quota=found.quota)

    def _reread(self) -> None:
        if self._file is None or not self._file.changed():
            return
        try:
            self._keys = read_keys(self._file.path).keys
        except KeyFileError as error:  # tried again at every look: what is wrong may be mended without a trace
            self._file.forget()
            if str(error) != self._complaint:
                log.error("keys: %s; the keys read before stay in force", error)
            self._complaint = str(error)
            return
        self._complaint = ""
        log.info("keys: read again, there are %d", len(self._keys))


def authenticate(key_ring: KeyRing, authorization: Sequence[str]) -> Caller:
    """The caller whose headers `authorization` these are.

    Raises ApiError where there is no key, or not exactly one, or it is not in force: the same for every path.
    """
    match = BEARER.fullmatch(authorization[0].strip()) if len(authorization) == 1 else None
    caller = key_ring.find(match[1].encode()) if match else None
    if caller is None:
        raise ApiError("invalid_api_key", "a valid API key is needed, as in Authorization: Bearer KEY")
    return caller


def load_keys(settings: Settings, environment: Mapping[str, str]) -> KeyRing | None:
    """The service's keys; None: it has none and may be without. Raises SettingsError."""
    check_keys_are_named(settings, environment)
    try:
        if settings.keys_file:
            return KeyRing.of_file(Path(settings.keys_file))
        if environment.get(KEYS_VARIABLE):
            return KeyRing(parse_keys(environment[KEYS_VARIABLE].encode(), source=KEYS_VARIABLE))
    except KeyFileError as error:
        raise SettingsError(f"--keys-file: {error}") from None
    return None


def check_keys_are_named(settings: Settings, environment: Mapping[str, str]) -> None:
    """Raises SettingsError where there are no keys and need to be, or where it is not clear which count."""
    by_environment = bool(environment.get(KEYS_VARIABLE))
    if settings.keys_file and by_environment:
        raise SettingsError(f"--keys-file: keys are also in {KEYS_VARIABLE}; use one of them")
    if not (settings.keys_file or by_environment or settings.allow_anonymous):
        raise SettingsError(
            "--keys-file: without keys everybody who can reach the service may use it; make one with "
            "python -m service.callers.keys, or say --allow-anonymous on"
        )


def without_keys_on_loopback(settings: LaunchSettings, environment: Mapping[str, str]) -> LaunchSettings:
    """Settings that allow a service without keys where nobody but this machine can reach it."""
    if settings.keys_file or environment.get(KEYS_VARIABLE) or not settings.on_loopback:
        return settings
    return settings.model_copy(update={"allow_anonymous": True, "only_local_names": True})


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
    new = file.with_name(f".{file.name}.{os.getpid()}")
    new.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as sink:
            if before is not None and before.st_uid != os.geteuid():
                os.fchown(sink.fileno(), before.st_uid, before.st_gid)
            sink.write(content)
            sink.flush()
            os.fsync(sink.fileno())
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)


def main(arguments: list[str]) -> int:
    """Add a key to a file and print it, once."""
    given = {name: value for name, value in vars(_parser().parse_args(arguments)).items() if value is not None}
    file = Path(given.pop("file"))
    quota = {name: given.pop(name) for name in Quota.model_fields if name in given}
    try:
        secret, key = new_key({**given, "scopes": given["scopes"].split(","), "quota": quota})
        append_key(file, key)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = [step for step in first["loc"] if isinstance(step, str)][-1].replace("_", "-")
        print(f"error: --{option}: {first['msg']}", file=sys.stderr)
        return 2
    except KeyFileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(secret)
    print(f"added to {file}, which holds only its hash: this line is the last time it is seen", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m service.callers.keys", description=main.__doc__, allow_abbrev=False
    )
    parser.add_argument("--file", required=True, help="key file; made if it is not there")
    parser.add_argument("--name", required=True, help="who it is for: letters, digits and . _ -")
    parser.add_argument("--scopes", default="chat", help=f"separated by commas, of {', '.join(get_args(Scope))} [chat]")
    parser.add_argument("--expires", help="time with offset, as 2027-01-31T00:00:00Z [never]")
    for name, field in Quota.model_fields.items():
        about = field.description or name.replace("_", " ")
        parser.add_argument("--" + name.replace("_", "-"), type=int, help=f"{about} [no limit]")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
