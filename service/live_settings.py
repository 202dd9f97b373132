"""What an operator may change while the service runs: no engine is loaded again, no request fails.

On a cluster it is the `user_config` of the deployment `Ingress`, elsewhere a JSON file that is looked at again when it
changes. Each change is whole: what it does not name is as it was at the start. One that is wrong changes nothing, and
says so in the log and in `/version`.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from service.settings import LaunchSettings, Settings
from service.watched_file import WatchedFile
from steering.artifact_config import read_config
from steering.errors import BadArtifact

log = logging.getLogger(__name__)
LIVE = (
    "default_preset", "default_strength", "allow_controls", "max_tokens_limit", "max_choices",
    "max_images", "max_image_pixels", "max_concurrent_requests",
)  # fmt: skip
"""Settings that are looked at anew for every request."""


class WrongChange(ValueError):
    """The message names the setting and the remedy."""


class LiveSettings:
    """The settings in force in one ingress process."""

    def __init__(self, settings: Settings) -> None:
        """`settings` are those of the start. Where they name a live file, it counts from the first look on."""
        self._start = self._current = settings
        self._file = WatchedFile(Path(settings.live_file)) if settings.live_file else None
        self._changed: dict[str, Any] = {}
        self._since = time.time()
        self._refused: str | None = None

    @property
    def current(self) -> Settings:
        """For one request from its first byte to its last."""
        if self._file is not None and self._file.changed():
            self._read(self._file.path)
        return self._current

    def change(self, changes: Mapping[str, Any]) -> None:
        """From here on these and no other differ from the start; nothing where one of them is wrong."""
        try:
            self._current = changed(self._start, changes)
        except WrongChange as error:
            self._refuse(str(error))
            return
        self._changed, self._since, self._refused = dict(changes), time.time(), None
        log.info("live settings", extra={"facts": {"changed": self._changed}})

    def describe(self) -> dict[str, Any]:
        """For `/version`."""
        return {"changed": self._changed, "since": int(self._since), "refused": self._refused}

    def _read(self, file: Path) -> None:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            found = {}  # taken away: all is as at the start
        except (OSError, ValueError) as error:
            self._refuse(f"{file}: cannot be read as JSON ({type(error).__name__})")
            return
        if isinstance(found, dict):
            self.change(found)
        else:
            self._refuse(f"{file}: must be one JSON object of settings")

    def _refuse(self, why: str) -> None:
        self._refused = why
        log.error("live settings: %s; those before stay in force", why)


def changed(start: Settings, changes: Mapping[str, Any]) -> Settings:
    """Raises WrongChange naming the first setting at fault."""
    for name in changes:
        if name not in LIVE:
            known = "needs a new start" if name in LaunchSettings.model_fields else "is no setting"
            raise WrongChange(f"{name}: {known}; what may change live: {', '.join(LIVE)}")
    try:
        settings = type(start).model_validate(start.model_dump() | dict(changes))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise WrongChange(f"{'.'.join(map(str, first['loc']))}: {first['msg']}, but it is {first['input']!r}") from None
    if settings.max_concurrent_requests > start.max_concurrent_requests:
        raise WrongChange(
            f"max_concurrent_requests: at most {start.max_concurrent_requests}, as it was started with: Serve's queues "
            "are made for that"
        )
    if settings.default_preset != start.default_preset and settings.default_preset is not None:
        _check_preset(settings)
    return settings


def _check_preset(settings: Settings) -> None:
    """A preset that is not there would make every request a 400."""
    if settings.loaded_artifact is None:
        raise WrongChange("default_preset: steering is off, so there are no presets")
    try:
        presets = read_config(Path(settings.loaded_artifact)).presets
    except BadArtifact as error:
        raise WrongChange(f"default_preset: cannot be checked against the artifact: {error.message}") from None
    if settings.default_preset not in presets:
        raise WrongChange(f"default_preset: there is no preset {settings.default_preset!r}; {', '.join(presets)} are")
