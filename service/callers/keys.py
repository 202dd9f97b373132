"""API keys: who asks, for what they may, how much. `python -m service.callers.keys` makes one. Knows no routes.

They come from a file (`key_file.py`), or from the environment as VLSAE_KEYS. Nothing of a key is ever logged but its
name.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

from pydantic import ValidationError

from service.callers.key_file import (
    SCOPES,
    KeyFile,
    KeyFileError,
    Quota,
    Scope,
    append_key,
    new_key,
    parse_keys,
    read_keys,
)  # fmt: skip
from service.errors import ApiError
from service.settings import KEYS_VARIABLE, LaunchSettings, Settings, SettingsError
from service.watched_file import WatchedFile

log = logging.getLogger(__name__)
BEARER = re.compile(r"bearer +([!-~]{1,1024})", re.IGNORECASE)


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


def require(caller: Caller, scope: Scope) -> None:
    """Raises ApiError where the caller's key has not the scope."""
    if scope not in caller.scopes:
        raise ApiError("permission_denied", f"this path needs a key with the scope '{scope}'")


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
