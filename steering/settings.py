"""From what was asked to what will be done: presets filled in, the impossible refused or reported. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from steering.errors import InvalidSteering
from steering.request import MAX_MIN_ANSWER_TOKENS, Control, Form, Mode, RequestedSteering

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
    arm: str | None = None

    @property
    def active(self) -> bool:
        return self.reason is None

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
    for name in ("concepts", "explain"):
        if getattr(asked, name):
            raise InvalidSteering(f"steering.{name} is not supported yet; leave it out", field=f"steering.{name}")
    if asked.enabled is False:
        return ResolvedSteering(reason="disabled", arm=requested.arm)
    if presets is None:
        return _impossible(requested, "no_artifact", "steering was asked for, but the server has no artifact loaded")
    name = asked.preset or default_preset
    if name not in presets:
        raise InvalidSteering(f"steering.preset {name!r} is unknown; known: {sorted(presets)}", field="steering.preset")
    preset = presets[name]
    settings = preset.model_dump(exclude={"dev_scores"})
    settings |= asked.model_dump(exclude_none=True, exclude={"enabled", "preset", "concepts", "explain"})
    resolved = ResolvedSteering(reason=None, preset=name, arm=requested.arm, **settings)
    off = _switched_off(requested, preset, resolved)
    if off is not None:
        reason, field = off
        _check_nobody_insists(requested, field, presets)
        return replace(resolved, reason=reason, strength=resolved.strength if reason == "delta_0" else 0.0)
    if resolved.gamma == 0 and resolved.plausibility == 0:
        return replace(resolved, reason="gamma_0")
    if not has_image:
        return _impossible(
            requested, "no_image", "steering was asked for, but the conversation has no image to realign to; add one"
        )
    return resolved


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
