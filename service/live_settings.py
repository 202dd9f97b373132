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

from service.artifacts import MAIN, Able, Candidate
from service.experiments.arms import Experiment, over_default
from service.settings import LaunchSettings, Settings, SettingsError
from service.watched_file import WatchedFile
from steering.artifact_config import read_config
from steering.errors import BadArtifact, InvalidSteering
from steering.request import SteeringRequest
from steering.settings import resolve

log = logging.getLogger(__name__)
LIVE = (
    "default_artifact", "default_preset", "default_strength", "allow_controls", "max_tokens_limit", "max_choices",
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
        self._candidates: dict[str, Candidate] = {}
        self._splits: dict[tuple[str, str], tuple] = {}
        """(name, salt) of every experiment that was in force, to its arms and weights."""
        try:
            self._check_split(settings.experiment)
            check_steering(settings, settings, {})
        except WrongChange as error:
            raise SettingsError(str(error)) from None
        self._file = WatchedFile(Path(settings.live_file)) if settings.live_file else None
        self._changed: dict[str, Any] = {}
        self._asked: dict[str, Any] | None = None
        """The last change, in force or not; None where it could not be read."""
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
        self._asked = dict(changes)
        try:
            settings = changed(self._start, changes, self._candidates)
            self._check_split(settings.experiment)
        except WrongChange as error:
            self._refuse(str(error))
            return
        self._current = settings
        self._changed, self._since, self._refused = dict(changes), time.time(), None
        log.info("live settings", extra={"facts": {"changed": self._changed}})

    def know(self, candidates: Mapping[str, Candidate]) -> None:
        """What is loaded beside the service's own artifact from now on.

        A change that waits for a candidate comes into force. Where one is gone that was to answer, the service's own
        does, and an experiment on it ends.
        """
        if candidates == self._candidates:
            return
        self._candidates = dict(candidates)
        if self._refused is not None and self._asked is not None:
            self.change(self._asked)
        named = {self._current.default_artifact}
        if self._current.experiment is not None:
            named |= {part.artifact or MAIN for part in self._current.experiment.parts.values()}
        if not all(isinstance(self._candidates.get(name), Able) for name in named - {MAIN}):
            self._take_back()

    def _take_back(self) -> None:
        """What cannot be any more is as at the start, and what cannot be with that."""
        while True:
            try:
                return check_steering(self._current, self._start, self._candidates)
            except WrongChange as error:
                self._refuse(str(error))
                wrong = str(error).partition(":")[0]
            if (before := getattr(self._start, wrong)) == getattr(self._current, wrong):
                return None
            self._current = self._current.model_copy(update={wrong: before})
            self._changed.pop(wrong, None)

    @property
    def candidates(self) -> dict[str, dict[str, Any]]:
        """For `/version`: by name, the fingerprints and presets of each that can answer, or why it cannot."""
        return {
            name: {"refused": one}
            if isinstance(one, str)
            else {
                "artifact": one.config.fingerprint,
                "system_fingerprint": one.system_fingerprint,
                "presets": list(one.config.presets),
            }
            for name, one in self._candidates.items()
        }

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
            self._asked = None
            self._refuse(f"{file}: cannot be read as JSON ({type(error).__name__})")
            return
        if isinstance(found, dict):
            self.change(found)
        else:
            self._asked = None
            self._refuse(f"{file}: must be one JSON object of settings")

    def _refuse(self, why: str) -> None:
        self._refused = why
        log.error("live settings: %s; those before stay in force", why)


def changed(start: Settings, changes: Mapping[str, Any], candidates: Mapping[str, Candidate]) -> Settings:
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
    check_steering(settings, start, candidates)
    return settings


def check_steering(settings: Settings, start: Settings, candidates: Mapping[str, Candidate]) -> None:
    """What an engine or its artifact cannot serve would make requests fail. Raises WrongChange, the setting first."""
    if settings.default_artifact != MAIN:
        _able(settings, settings.default_artifact, "default_artifact", candidates)
    preset, artifact = settings.default_preset, settings.default_artifact
    if preset is not None and (preset, artifact) != (start.default_preset, start.default_artifact):
        presets = _able(settings, artifact, "default_preset", candidates).config.presets
        if preset not in presets:  # it would make every request a 400
            raise WrongChange(f"default_preset: there is no preset {preset!r}; {', '.join(presets)} are")
    if settings.experiment is not None:
        _check_experiment(settings, settings.experiment, candidates)


def _check_experiment(settings: Settings, experiment: Experiment, candidates: Mapping[str, Candidate]) -> None:
    for name, part in experiment.parts.items():
        try:
            able = _able(settings, part.artifact or settings.default_artifact, f"experiment: {name}", candidates)
            _check_part(part.steering, settings, able)
        except InvalidSteering as error:
            raise WrongChange(f"experiment: {name}: {error.message}") from None


def _check_part(steering: SteeringRequest, settings: Settings, able: Able) -> None:
    asked = over_default(steering, settings.default_steering, arm=None)
    done = resolve(asked, presets=able.config.presets, default_preset=able.config.default_preset, has_image=True)
    if done.active and done.branches > able.branches:
        raise InvalidSteering("gamma and plausibility need two branches, and this engine was started with one")
    if done.active and done.mode not in able.modes:
        raise InvalidSteering(f"mode {done.mode!r} is not {able.engine}'s; {', '.join(able.modes)} is")


def _able(settings: Settings, artifact: str, part: str, candidates: Mapping[str, Candidate]) -> Able:
    """What can be done with an artifact by this name. Raises WrongChange, beginning with the part that names it."""
    if artifact != MAIN:
        found = candidates.get(artifact, "no application of this name holds one")
        if isinstance(found, str):
            loaded = [name for name, one in candidates.items() if isinstance(one, Able)]
            raise WrongChange(f"{part}: candidate {artifact!r}: {found}; loaded: {', '.join([MAIN, *loaded])}")
        return found
    if settings.loaded_artifact is None:
        raise WrongChange(f"{part}: steering is off, so there are no presets")
    try:
        config = read_config(Path(settings.loaded_artifact))
    except BadArtifact as error:
        raise WrongChange(f"{part}: cannot be checked against the artifact: {error.message}") from None
    engine = settings.engine
    if engine.name == "huggingface":
        return Able(config, engine.name, ("causal", "exact"), 2)
    return Able(config, engine.name, ("causal",), engine.branches or (2 if engine.settled().device == "cpu" else 1))


def _told(split: tuple) -> str:
    return ", ".join(f"{name} {weight:g}" for name, weight in split)
