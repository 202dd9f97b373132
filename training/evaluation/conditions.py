"""The conditions of an evaluation: what is asked of steering under each name (design, section 8). Asks nobody.

plain          no steering, greedy
decoding_only  the decoding of `steered` with alpha 0: what blending and the plausibility mask do alone
steered        preset `captions` for captions, `questions` for questions
default        what the server does for a caller who asks for nothing
published, difference, union
               each form with its own best settings from dev scenes
random, reversed, other_image
               controls of `steered`: the same size in a random direction, the opposite sign, another scene's image

Where a preset is off there is nothing to control: the controls then stand beside the form that `captions` names, with
that form's best settings for the task, and `Condition.note` says so.
"""

from __future__ import annotations

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
        """What is sent for one scene: a control draws anew for each scene and seed."""
        request = self.requests[task]
        if request.control in (None, "none"):
            return request
        return request.model_copy(update={"control_seed": (seed * 1_000_003 + scene_seed) % 2**31})


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
        alpha = 0.0 if name == "decoding_only" else None
        return Condition(name=name, requests={task: _by_preset(task, mode, alpha=alpha) for task in TASKS})
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
    seeds = tuple(range(RANDOM_SEEDS)) if control == "random" else (0,)
    return Condition(name=control, requests=requests, seeds=seeds, note="; ".join(notes) or None)


def _by_preset(
    task: Task, mode: Mode | None, *, alpha: float | None = None, control: Control | None = None
) -> SteeringRequest:
    return SteeringRequest(enabled=True, preset=task, mode=mode, alpha=alpha, control=control)


def as_request(preset: Preset, *, mode: Mode | None = None, control: Control | None = None) -> SteeringRequest:
    """A preset spelled out field by field, so that it need not be in the artifact that answers.

    But a `min_answer_tokens` of None cannot be spelled: there the default preset of the artifact that answers decides.
    """
    settings = preset.model_dump(exclude={"dev_scores"}) | {"enabled": True, "control": control}
    if mode is not None:
        settings["mode"] = mode
    return SteeringRequest.model_validate(settings)
