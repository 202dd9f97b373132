"""What one request tells the model inside vLLM, and the cache salt that follows from it. Imports no torch, no vLLM.

It travels in `SamplingParams.extra_args["vl_sae"]` as a JSON string, since that passes vLLM's own HTTP server too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from steering.errors import InvalidSteering
from steering.request import MAX_EDITS, MAX_MIN_ANSWER_TOKENS, Control, Explain, Form
from steering.settings import Edit, ResolvedSteering

EXTRA_ARG = "vl_sae"


class WireSteering(BaseModel):
    """Steering of one sequence, presets resolved."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    id: str = Field(min_length=1, max_length=512)
    """Names the sequence when its receipt is asked for; unique among running ones."""
    task: Literal["steer", "observe", "probe"] = "steer"
    """'observe' changes nothing and can be explained; 'probe' changes nothing and keeps the pooled states v and t of
    the prompt, for the canary."""
    explain: Explain | None = None
    """Keep what it takes to explain the answer at its end, or each token."""
    dial: float = Field(default=0.0, ge=0, le=1)
    """Strength, for explanations; `scale` contains it."""
    form: Form = "difference"
    scale: float = Field(default=0.0, ge=0, le=4)
    """strength * alpha."""
    beta_up: float = Field(default=0.0, ge=0, le=1)
    beta_down: float = Field(default=0.0, ge=0, le=1)
    gamma: float = Field(default=1.0, ge=0, le=1)
    plausibility: float = Field(default=0.0, ge=0, le=1)
    min_answer_tokens: int | None = Field(default=None, ge=0, le=MAX_MIN_ANSWER_TOKENS)
    """See `first_steered_position`; the prompt's length is that of the tokens that vLLM admits with it."""
    control: Control = "none"
    control_seed: int = Field(default=0, ge=0, le=2**31 - 1)
    max_shift: float | None = Field(default=None, gt=0, le=4)
    edits: Annotated[tuple[Edit, ...], Field(max_length=MAX_EDITS, strict=False)] = ()
    """Not scaled by the dial."""

    @property
    def branches(self) -> int:
        """2 where the base branch has a say in the logits (design, section 1)."""
        return 1 if self.gamma == 1 and self.plausibility == 0 else 2

    def extra_args(self) -> dict[str, str]:
        """For `SamplingParams(extra_args=...)`."""
        return {EXTRA_ARG: self.model_dump_json()}


def wire_steering(sequence_id: str, settings: ResolvedSteering) -> WireSteering:
    """The resolved settings of a request that is to be watched: steered, or explained only."""
    common: dict[str, Any] = {"id": sequence_id, "explain": settings.explain}
    if not settings.active:
        return WireSteering(task="observe", **common)
    return WireSteering(
        **common,
        form=settings.form,
        dial=settings.dial,
        scale=settings.scale,
        beta_up=settings.beta_up,
        beta_down=settings.beta_down,
        gamma=settings.gamma,
        plausibility=settings.plausibility,
        min_answer_tokens=settings.min_answer_tokens,
        control=settings.control,
        control_seed=settings.control_seed,
        max_shift=settings.max_shift,
        edits=settings.edits,
    )


def parse_extra_args(extra_args: Mapping[str, Any] | None) -> WireSteering | None:
    """What `extra_args` ask for; None where they do not mention us. Raises InvalidSteering, naming the field."""
    given = (extra_args or {}).get(EXTRA_ARG)
    if given is None:
        return None
    try:
        if isinstance(given, str):
            return WireSteering.model_validate_json(given)
        return WireSteering.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join([EXTRA_ARG, *(str(part) for part in first["loc"])])
        raise InvalidSteering(f"{field}: {first['msg']}", field=field) from None


def cache_salt(
    wire: WireSteering | None,
    *,
    fingerprint: str | None,
    last_image_index: int | None,
    prompt_length: int | None,
    tenant: str,
) -> str | None:
    """Salt of the prefix cache; None lets a request share with every other plain one.

    Cached states after the hook layer depend on everything here. `last_image_index`, the position of the prompt's last
    image token, is part of it because it decides what counts as text: the same beginning with another image in a later
    turn is steered differently. gamma and plausibility act on logits only; that there are two branches, on states.

    `prompt_length`, in expanded tokens, is part of it where `min_answer_tokens` is set, since it then decides what is
    steered: an answer's cached states are steered ones, and in a later turn the same tokens are prompt, which is not.
    The price: such requests share a cached prompt only with those of the same length, so each turn of a conversation
    prefills its whole prompt, images included, again. Nor do plain requests share with observed ones, since only these
    mark their tokens for the means.
    """
    parts: dict[str, Any] = {"tenant": tenant} if tenant else {}
    if wire is not None:
        relevant = wire.model_dump(exclude={"id", "gamma", "plausibility", "explain", "dial"})
        if wire.min_answer_tokens is not None:
            relevant["prompt_length"] = prompt_length
        parts |= {"artifact": fingerprint, "last_image": last_image_index, "branches": wire.branches, **relevant}
    if not parts:
        return None
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
