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

from service.experiments.arms import Experiment, over_default
from service.settings import LaunchSettings, Settings, SettingsError
from service.watched_file import WatchedFile
from steering.artifact_config import ArtifactConfig, read_config
from steering.errors import BadArtifact, InvalidSteering
from steering.request import SteeringRequest
from steering.settings import resolve

log = logging.getLogger(__name__)
LIVE = (
    "default_preset", "default_strength", "allow_controls", "max_tokens_limit", "max_choices",
    "max_images", "max_image_pixels", "max_concurrent_requests", "experiment",
)  # fmt: skip
"""Settings that are looked at anew for every request."""


class WrongChange(ValueError):
    """The message names the setting and the remedy."""


class LiveSettings:
    """The settings in force in one ingress process."""

    def __init__(self, settings: Settings) -> None:
        """`settings` are those of the start. Where they name a live file, it counts from the first look on.

        Raises SettingsError for an experiment of the start that cannot be run.
        """
        self._start = self._current = settings
        self._splits: dict[tuple[str, str], tuple] = {}
        """(name, salt) of every experiment that was in force, to its arms and weights."""
        try:
            self._check_split(settings.experiment)
            check_experiment(settings)
        except WrongChange as error:
            raise SettingsError(str(error)) from None
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
            settings = changed(self._start, changes)
            self._check_split(settings.experiment)
        except WrongChange as error:
            self._refuse(str(error))
            return
        self._current = settings
        self._changed, self._since, self._refused = dict(changes), time.time(), None
        log.info("live settings", extra={"facts": {"changed": self._changed}})

    def describe(self) -> dict[str, Any]:
        """For `/version`."""
        return {"changed": self._changed, "since": int(self._since), "refused": self._refused}

    def _check_split(self, experiment: Experiment | None) -> None:
        """Whoever was in one arm would be in another, and be counted in both. Raises WrongChange."""
        if experiment is None:
            return
        split = self._splits.setdefault((experiment.name, experiment.seed), experiment.split)
        if split != experiment.split:
            raise WrongChange(
                f"experiment: changed weights or arms are a new experiment: name or salt must change, too "
                f"({experiment.name!r} had {_told(split)})"
            )

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
        found = "" if isinstance(first["input"], Mapping) else f", but it is {first['input']!r}"
        raise WrongChange(f"{'.'.join(map(str, first['loc']))}: {first['msg']}{found}") from None
    if settings.max_concurrent_requests > start.max_concurrent_requests:
        raise WrongChange(
            f"max_concurrent_requests: at most {start.max_concurrent_requests}, as it was started with: Serve's queues "
            "are made for that"
        )
    if settings.default_preset != start.default_preset and settings.default_preset is not None:
        _check_preset(settings)
    check_experiment(settings)
    return settings


def check_experiment(settings: Settings) -> None:
    """An arm that the engine or the artifact cannot serve would make its requests fail. Raises WrongChange."""
    experiment = settings.experiment
    if experiment is None:
        return
    config = _artifact_of(settings, "experiment")
    parts = {f"arms: {arm.name}": arm.steering for arm in experiment.arms}
    if experiment.shadow is not None:
        parts["shadow"] = experiment.shadow.steering
    for part, steering in parts.items():
        try:
            _check_steering(steering, settings, config)
        except InvalidSteering as error:
            raise WrongChange(f"experiment: {part}: {error.message}") from None
        except WrongChange as error:
            raise WrongChange(f"experiment: {part}: {error}") from None


def _check_steering(steering: SteeringRequest, settings: Settings, config: ArtifactConfig) -> None:
    default = SteeringRequest(preset=settings.default_preset, strength=settings.default_strength)
    asked = over_default(steering, default, arm=None)
    done = resolve(asked, presets=config.presets, default_preset=config.default_preset, has_image=True)
    modes, branches = settings.engine.can_do
    if done.active and done.branches > branches:
        raise WrongChange("gamma and plausibility need two branches, and this engine was started with one")
    if done.active and done.mode not in modes:
        raise WrongChange(f"mode {done.mode!r} is not {settings.engine.name}'s; {', '.join(modes)} is")


def _artifact_of(settings: Settings, name: str) -> ArtifactConfig:
    if settings.loaded_artifact is None:
        raise WrongChange(f"{name}: steering is off, so there are no presets")
    try:
        return read_config(Path(settings.loaded_artifact))
    except BadArtifact as error:
        raise WrongChange(f"{name}: cannot be checked against the artifact: {error.message}") from None


def _check_preset(settings: Settings) -> None:
    """A preset that is not there would make every request a 400."""
    presets = _artifact_of(settings, "default_preset").presets
    if settings.default_preset not in presets:
        raise WrongChange(f"default_preset: there is no preset {settings.default_preset!r}; {', '.join(presets)} are")


def _told(split: tuple) -> str:
    return ", ".join(f"{name} {weight:g}" for name, weight in split)
