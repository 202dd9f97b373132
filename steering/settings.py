"""From what was asked to what will be done: presets filled in, the impossible refused or reported. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from steering.errors import InvalidSteering
from steering.request import MAX_MIN_ANSWER_TOKENS, Control, Explain, Form, Mode, RequestedSteering, SteeringRequest

Reason = Literal[
    "disabled",
    "no_artifact",
    "no_image",
    "preset_off",
    "strength_0",
    "gamma_0",
    "delta_0",
    "no_text_position",
    "hook_detached",
    "unsupported",
]


class Preset(BaseModel):
    """A named setting of the realignment, as an artifact carries it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    strength: float = Field(default=1.0, ge=0, le=1)
    """The dial; 0 makes the preset 'off'."""
    form: Form = "difference"
    mode: Mode = "causal"
    alpha: float = Field(default=1.0, ge=0, le=4)
    beta_up: float = Field(default=0.9, ge=0, le=1)
    beta_down: float = Field(default=0.9, ge=0, le=1)
    gamma: float = Field(default=1.0, ge=0, le=1)
    plausibility: float = Field(default=0.0, ge=0, le=1)
    min_answer_tokens: int | None = Field(
        default=None, ge=0, le=MAX_MIN_ANSWER_TOKENS, exclude_if=lambda value: value is None
    )
    """As in a request; None: the artifact's `min_text_tokens` alone decides.

    None is never written, so that an artifact without it has the fingerprint, and the file, that it has always had.
    """
    dev_scores: dict[str, float] = Field(default_factory=dict)
    """What it scored on the scenes it was chosen on; says nothing about others."""


MAX_ID_DIGITS = 9
MAX_SHIFT_OF_EDITS = 1.0
"""`max_shift` of a request that edits concepts and sets none: no state is moved by more than its own length."""


class Edit(NamedTuple):
    """What becomes of one concept of the text: z_t is multiplied with `factor`, then `add` is added."""

    concept_id: int
    factor: float
    add: float


@dataclass(frozen=True, kw_only=True)
class ResolvedSteering:
    """Everything an engine needs to know; with `reason` set it leaves the request alone."""

    reason: Reason | None
    """Why this request is not steered, or None if it is to be."""
    preset: str | None = None
    form: Form = "difference"
    mode: Mode = "causal"
    strength: float = 0.0
    alpha: float = 0.0
    beta_up: float = 0.0
    beta_down: float = 0.0
    gamma: float = 1.0
    plausibility: float = 0.0
    min_answer_tokens: int | None = None
    """See `first_steered_position`."""
    control: Control = "none"
    control_seed: int = 0
    max_shift: float | None = None
    """As in a request."""
    edits: tuple[Edit, ...] = ()
    explain: Explain | None = None
    arm: str | None = None

    @property
    def active(self) -> bool:
        return self.reason is None

    @property
    def watched(self) -> bool:
        """Its codes are wanted, whether it is steered or not."""
        return self.active or self.explain is not None

    @property
    def dial(self) -> float:
        """`strength` where it does something."""
        return self.strength if self.active else 0.0

    @property
    def scale(self) -> float:
        """Step size of every delta."""
        return self.strength * self.alpha

    @property
    def branches(self) -> int:
        """2 where the base branch has a say in the logits (design, section 1)."""
        return 1 if self.gamma == 1 and self.plausibility == 0 else 2


def resolve(
    requested: RequestedSteering,
    *,
    presets: Mapping[str, Preset] | None,
    default_preset: str,
    has_image: bool,
) -> ResolvedSteering:
    """Fill in the preset and decide. `presets` is None where no artifact is loaded.

    Raises InvalidSteering, naming the field, for an unknown preset, a feature that does not exist yet, and for
    steering that was explicitly asked for and is impossible.
    """
    asked = requested.settings
    resolved = _resolve_steering(requested, presets, default_preset, has_image=has_image)
    explain = "answer" if asked.explain is True else asked.explain or None
    if explain is not None and (presets is None or not has_image):
        missing = "the server has no artifact loaded" if presets is None else "the conversation has no image; add one"
        raise InvalidSteering(f"steering.explain: there is nothing to explain: {missing}", field="steering.explain")
    return replace(resolved, explain=explain)


def _resolve_steering(
    requested: RequestedSteering, presets: Mapping[str, Preset] | None, default_preset: str, *, has_image: bool
) -> ResolvedSteering:
    asked = requested.settings
    if asked.enabled is False:
        return ResolvedSteering(reason="disabled", arm=requested.arm)
    if presets is None:
        return _impossible(requested, "no_artifact", "steering was asked for, but the server has no artifact loaded")
    name = asked.preset or default_preset
    if name not in presets:
        raise InvalidSteering(f"steering.preset {name!r} is unknown; known: {sorted(presets)}", field="steering.preset")
    preset, edits = presets[name], edits_of(asked)
    settings = preset.model_dump(exclude={"dev_scores"})
    settings |= asked.model_dump(exclude_none=True, exclude={"enabled", "preset", "concepts", "explain"})
    if edits:
        settings.setdefault("max_shift", MAX_SHIFT_OF_EDITS)
    resolved = ResolvedSteering(reason=None, preset=name, arm=requested.arm, edits=edits, **settings)
    off = _switched_off(requested, preset, resolved)
    if off is not None and edits:  # which no dial scales
        resolved, off = replace(resolved, strength=0.0), None
    if off is not None:
        reason, field = off
        _check_nobody_insists(requested, field, presets)
        return replace(resolved, reason=reason, strength=resolved.strength if reason == "delta_0" else 0.0)
    if resolved.gamma == 0 and resolved.plausibility == 0:
        return replace(resolved, reason="gamma_0", edits=())
    if not has_image:
        return _impossible(
            requested, "no_image", "steering was asked for, but the conversation has no image to realign to; add one"
        )
    return resolved


def edits_of(asked: SteeringRequest) -> tuple[Edit, ...]:
    """By id, those that change something. Raises InvalidSteering for a key that is no id."""
    edits = []
    for key, edit in sorted((asked.concepts or {}).items()):
        if not key.isascii() or not key.isdecimal() or len(key) > MAX_ID_DIGITS:
            raise InvalidSteering(
                f"steering.concepts: {key[:100]!r} is not the id of a concept", field="steering.concepts"
            )
        if (edit.factor, edit.add) != (1.0, 0.0):
            edits.append(Edit(int(key), edit.factor, edit.add))
    if len({edit.concept_id for edit in edits}) < len(edits):
        raise InvalidSteering("steering.concepts: one concept stands there twice", field="steering.concepts")
    return tuple(edits)


def check_edits(settings: ResolvedSteering, *, concepts: int) -> None:
    """Raises InvalidSteering for a concept that the artifact does not have."""
    for edit in settings.edits:
        if edit.concept_id >= concepts:
            raise InvalidSteering(
                f"steering.concepts: there is no concept {edit.concept_id}; ids end at {concepts - 1}",
                field="steering.concepts",
            )


def check_control(settings: ResolvedSteering, *, control_images: int) -> None:
    """Raises InvalidSteering for a control that draws from foreign images where the artifact carries none."""
    if settings.active and settings.control == "other_image" and control_images == 0:
        raise InvalidSteering(
            "the artifact has no images for control 'other_image'; use 'random' or 'reversed'", field="steering.control"
        )


def _switched_off(
    requested: RequestedSteering, preset: Preset, resolved: ResolvedSteering
) -> tuple[Reason, str] | None:
    """Why nothing is to be done although all is there, and the field that says so; None where something is.

    A preset that is off has no numbers worth having: it is only overruled by a strength and an alpha, and where the
    caller named it, by the caller's.
    """
    asked = requested.settings
    if asked.strength == 0:
        return "strength_0", "strength"
    named = requested.caller_fields if "preset" in requested.caller_fields else asked.model_dump(exclude_none=True)
    if preset.strength == 0 and not {"strength", "alpha"} <= set(named):
        return "preset_off", "preset"
    if resolved.alpha == 0:
        return "delta_0", "alpha"
    return None


def _check_nobody_insists(requested: RequestedSteering, field: str, presets: Mapping[str, Preset]) -> None:
    """Raises InvalidSteering where the caller wants an answer steered that `field` leaves plain.

    A caller's own strength or alpha of 0, or preset that is off, is its last word; but `enabled` and an alpha beside
    such a preset want something done.
    """
    own = field in requested.caller_fields
    contradicts_itself = field == "preset" and {"enabled", "alpha"} <= requested.caller_fields
    if not requested.explicit or (own and not contradicts_itself):
        return
    whose = "its own" if own else "the server's default"
    raise InvalidSteering(
        f"steering was asked for, but {whose} {field} is off; set another steering.{field} "
        f"(presets: {sorted(presets)})",
        field=f"steering.{field}",
    )


def _impossible(requested: RequestedSteering, reason: Reason, message: str) -> ResolvedSteering:
    if requested.explicit:
        raise InvalidSteering(f"{message}, or leave steering out", field="steering")
    return ResolvedSteering(reason=reason, arm=requested.arm)
