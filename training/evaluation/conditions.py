"""The conditions of an evaluation: what is asked of steering under each name (design, section 8). Asks nobody.

plain          no steering
decoding_only  the decoding of `steered` without its deltas: what the plausibility mask does alone (receipts then count
               the deltas of a branch that has no say)
steered        preset `captions` for captions, `questions` for questions
default        what the server does for a caller who asks for nothing
published, difference, union
               each form with its own best settings from dev scenes
random, reversed, other_image
               controls of `steered`: the same size in a random direction, the opposite sign, other scenes' images

Controls that draw are asked several times per scene, and all answers are pooled: `random` with five directions,
`other_image` with four images, since one image may happen to hold what this one holds.

Where a preset is off there is nothing to control: the controls then stand beside the form that `captions` names, with
that form's best settings for the task, and `Condition.note` says so.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from steering.artifact_config import ArtifactConfig
from steering.request import Control, Form, Mode, SteeringRequest
from steering.settings import Preset
from training.errors import InvalidTraining

Task = Literal["captions", "questions"]
TASKS: tuple[Task, ...] = get_args(Task)
FORMS: tuple[Form, ...] = get_args(Form)
CONTROLS: tuple[Control, ...] = ("random", "reversed", "other_image")
NAMES = ("plain", "decoding_only", "steered", "default", *FORMS, *CONTROLS)
RANDOM_SEEDS = 5
"""Directions of the control `random` for each scene."""
OTHER_IMAGES = 4
"""Images of the control `other_image` for each scene."""
_FIRST_SEEDS = 2_000_000_000
"""Where a scene's first control seed may lie: the seeds after it stay below the 2**31 that a request may name."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One row of the report."""

    name: str
    requests: Mapping[Task, SteeringRequest]
    seeds: tuple[int, ...] = (0,)
    """Seeds of the control; every scene is asked once per seed and all answers are pooled."""
    note: str | None = None
    """What a reader of the numbers must know."""

    def request(self, task: Task, *, seed: int, scene_seed: int) -> SteeringRequest:
        """What is sent for one scene.

        A scene's control seeds are consecutive numbers from a place of its own: an engine takes image number seed %
        images, so that n seeds draw n different ones of any n or more, and scenes are spread over all of them.
        """
        request = self.requests[task]
        if request.control in (None, "none"):
            return request
        first = zlib.crc32(str(scene_seed).encode()) % _FIRST_SEEDS
        return request.model_copy(update={"control_seed": first + seed})


def control_seeds(control: Control) -> tuple[int, ...]:
    """How often a control is asked about each scene."""
    return tuple(range({"random": RANDOM_SEEDS, "other_image": OTHER_IMAGES}.get(control, 1)))


@dataclass(frozen=True, kw_only=True)
class TunedPresets:
    """What `tune_presets` left in the artifact, as far as an evaluation needs it."""

    presets: Mapping[str, Preset]
    by_form: Mapping[str, Preset] = field(default_factory=dict)
    """By `form_preset_key`: each form's best setting on dev scenes, also where it was too bad to become a preset."""
    default: str = "captions"
    """Name of the server's default preset."""

    def of_form(self, form: Form, task: Task) -> Preset:
        """The form's own best setting, else the task's preset (else that of `captions`) with the form replaced."""
        if (key := form_preset_key(task, form)) in self.by_form:
            return self.by_form[key]
        preset = self.presets[task] if self.is_on(task) else self.presets.get("captions", Preset())
        return preset.model_copy(update={"form": form, "strength": preset.strength or 1.0})

    @property
    def form(self) -> Form:
        """The form that controls belong to: that of the preset `captions`."""
        return self.presets.get("captions", Preset()).form

    def is_on(self, name: str) -> bool:
        """Whether the preset exists and steers at all."""
        return name in self.presets and self.presets[name].strength > 0


def form_preset_key(task: Task, form: str) -> str:
    """Where `ArtifactConfig.form_presets` keeps a form's best setting for a task."""
    return f"{task}.{form}"


def tuned_presets(config: ArtifactConfig) -> TunedPresets:
    """What an artifact's config holds of it."""
    return TunedPresets(presets=config.presets, by_form=config.form_presets, default=config.default_preset)


def conditions(
    tuned: TunedPresets, *, names: Sequence[str] = NAMES, mode: Mode | None = None, over_http: bool = False
) -> list[Condition]:
    """The named conditions in the order of `NAMES`; `mode` replaces the presets' own where given."""
    if unknown := set(names) - set(NAMES):
        raise InvalidTraining(f"--conditions: unknown conditions {sorted(unknown)}; known: {', '.join(NAMES)}")
    return [_condition(name, tuned, mode, over_http) for name in NAMES if name in names]


def _condition(name: str, tuned: TunedPresets, mode: Mode | None, over_http: bool) -> Condition:
    if name == "plain":
        return Condition(name=name, requests=dict.fromkeys(TASKS, SteeringRequest(enabled=False)))
    if name == "default":
        request = SteeringRequest(mode=mode, preset=None if over_http else tuned.default)
        return Condition(name=name, requests=dict.fromkeys(TASKS, request))
    if name in ("steered", "decoding_only"):
        gamma = 0.0 if name == "decoding_only" else None
        return Condition(name=name, requests={task: _by_preset(task, mode, gamma=gamma) for task in TASKS})
    for form in FORMS:
        if name == form:
            return Condition(
                name=name, requests={task: as_request(tuned.of_form(form, task), mode=mode) for task in TASKS}
            )
    return _control(next(control for control in CONTROLS if control == name), tuned, mode)


def _control(control: Control, tuned: TunedPresets, mode: Mode | None) -> Condition:
    requests, notes = {}, []
    for task in TASKS:
        if tuned.is_on(task):
            requests[task] = _by_preset(task, mode, control=control)
        else:
            requests[task] = as_request(tuned.of_form(tuned.form, task), mode=mode, control=control)
            notes.append(f"preset {task} is off: controls form {tuned.form} with its own best settings for {task}")
    return Condition(name=control, requests=requests, seeds=control_seeds(control), note="; ".join(notes) or None)


def _by_preset(
    task: Task, mode: Mode | None, *, gamma: float | None = None, control: Control | None = None
) -> SteeringRequest:
    """With `gamma` 0 the steered branch has no say: an alpha of 0 would switch off the plausibility mask as well."""
    return SteeringRequest(enabled=True, preset=task, mode=mode, gamma=gamma, control=control)


def as_request(preset: Preset, *, mode: Mode | None = None, control: Control | None = None) -> SteeringRequest:
    """A preset spelled out field by field, so that it need not be in the artifact that answers.

    What cannot be spelled, a `min_answer_tokens` of None, is taken from `off`, which every artifact has.
    """
    settings = preset.model_dump(exclude={"dev_scores"}) | {"enabled": True, "preset": "off", "control": control}
    if mode is not None:
        settings["mode"] = mode
    return SteeringRequest.model_validate(settings)
