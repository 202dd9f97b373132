"""What one caller may ask of steering, and how several sources of it merge. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

Form = Literal["published", "difference", "union"]
Mode = Literal["causal", "exact"]
Control = Literal["none", "reversed", "random", "other_image"]
Explain = Literal["answer", "tokens"]
MAX_MIN_ANSWER_TOKENS = 1024
"""Most tokens of an answer that may be left alone before steering begins."""
MAX_EDITS = 32
"""Concepts that one request may edit."""


class ConceptEdit(BaseModel):
    """What becomes of one concept of the text: z_t is multiplied with `factor`, then `add` is added."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    factor: float = Field(default=1.0, ge=0, le=4)
    """0 removes the concept where the text has it."""
    add: float = Field(default=0.0, ge=-4, le=4)
    """In units of activation, which lies in 0 to 2; also where the text has none of it."""


def _known_explanation(asked: Any) -> Any:
    """One error for all, since a union would have one for each of its members."""
    if asked is None or isinstance(asked, bool) or asked in get_args(Explain):
        return asked
    raise PydanticCustomError("explain", "must be true, false, 'answer' or 'tokens'")


class SteeringRequest(BaseModel):
    """The `steering` object of a request. A field left out is decided by a lower source."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    enabled: bool | None = None
    """False switches steering off for this request; True makes a request that cannot be steered an error."""
    preset: str | None = Field(default=None, max_length=64)
    """Name of a preset in the artifact ('captions', 'questions', 'off', 'paper_pope', 'paper_chair')."""
    strength: float | None = Field(default=None, ge=0, le=1)
    """The dial: scales every delta. 0 is exactly the plain model."""
    form: Form | None = None
    """Which equation turns two codes into a delta."""
    alpha: float | None = Field(default=None, ge=0, le=4)
    """Step size at strength 1."""
    beta_up: float | None = Field(default=None, ge=0, le=1)
    """Share of what the image has more of than the text that is added to the text's code."""
    beta_down: float | None = Field(default=None, ge=0, le=1)
    """Share of what the text has more of than the image that is taken from the text's code."""
    gamma: float | None = Field(default=None, ge=0, le=1)
    """Weight of the steered branch in the logits; 1 = the base branch decides nothing."""
    plausibility: float | None = Field(default=None, ge=0, le=1)
    """Tokens below this share of the base branch's most likely token are dropped; 0 = none is."""
    min_answer_tokens: int | None = Field(default=None, ge=0, le=MAX_MIN_ANSWER_TOKENS)
    """Steering begins once this many tokens of the current answer are in the text's mean: so many of its first tokens
    are the plain model's. 0: with the prompt's last token, from which the answer's first follows. None: as the preset
    says, else the artifact's `min_text_tokens` decide alone, which count from the last image and must be in the mean in
    any case; in a later turn they have been for long.

    The current answer is what is generated behind the prompt: where the prompt ends inside the assistant's turn, the
    beginning of that turn is none of it.
    """
    mode: Mode | None = None
    """'causal' steers each position once; 'exact' recomputes the tail over all text at every step."""
    max_shift: float | None = Field(default=None, gt=0, le=4)
    """Most that |delta| / |hidden state| may be at a position: a longer delta is shortened. None: 1 where concepts are
    edited, else no bound."""
    concepts: dict[str, ConceptEdit] | None = Field(default=None, max_length=MAX_EDITS)
    """Edits by the concept's id, not scaled by the dial. (A server takes labels, too.)"""
    explain: Annotated[bool | Explain | None, BeforeValidator(_known_explanation)] = None
    """Tell which concepts image and text hold: of the whole answer (true, 'answer') or of each token ('tokens').
    Changes no token."""
    control: Control | None = None
    """Replaces the delta by an experimental control; for evaluation only."""
    control_seed: int | None = Field(default=None, ge=0, le=2**31 - 1)
    """Seeds 'random' (its direction) and 'other_image' (which image)."""

    def asks_for_steering(self) -> bool:
        """True where this source explicitly wants the answer steered (design, section 6)."""
        if self.enabled is False:
            return False
        return bool(self.enabled or (self.strength or 0) > 0 or self.concepts)


@dataclass(frozen=True, kw_only=True)
class RequestedSteering:
    """All sources merged: what an engine is asked to do, and whether somebody insisted."""

    settings: SteeringRequest
    """The merged fields; those still None take the preset's value."""
    explicit: bool = False
    """True when the caller asked for steering: then 'impossible' is an error, not a note in the receipt."""
    caller_fields: frozenset[str] = frozenset()
    """Fields that the caller set, as opposed to an arm or the server's default."""
    arm: str | None = None
    """Name of the A/B arm that this request fell into, for the receipt."""


def merge_sources(
    *caller: SteeringRequest, server: tuple[SteeringRequest, ...] = (), arm: str | None = None
) -> RequestedSteering:
    """Merge field by field, the earlier source wins: `caller` is body, header, alias; `server` is arm, default.

    A source that asks for strength above 0 thereby switches steering on against any lower source.
    """
    merged: dict[str, object] = {}
    for source in (*caller, *server):
        fields = source.model_dump(exclude_none=True)
        if source.asks_for_steering():
            fields.setdefault("enabled", True)
        merged = {**fields, **merged}
    settings = SteeringRequest.model_validate(merged)
    explicit = settings.enabled is not False and any(source.asks_for_steering() for source in caller)
    named = frozenset(name for source in caller for name in source.model_dump(exclude_none=True))
    return RequestedSteering(settings=settings, explicit=explicit, caller_fields=named, arm=arm)
