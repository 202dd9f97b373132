"""An experiment as an operator writes it: arms, their weights, what each does to steering. Knows no HTTP, no requests
and no other setting; what an arm needs of the engine and the artifact `live_settings.py` checks.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from steering.request import RequestedSteering, SteeringRequest, merge_sources

NO_ARM, OWN, NO_UNIT, NOT_COVERED = "none", "own", "no_unit", "not_covered"
"""In an arm's place, where a request is counted for none: no experiment runs, the caller asked for steering of its own,
it named no unit, or the unit is not covered."""
RESERVED = frozenset((NO_ARM, OWN, NO_UNIT, NOT_COVERED, "unknown", "shadow"))
NOT_FOR_ARMS = ("control", "control_seed", "concepts", "explain")
"""Fields of steering that are for evaluation, or do not exist yet."""
SUM_TOLERANCE = 1e-6
MOST_ARMS = 10
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,31}$")]
Share = Annotated[float, Field(gt=0, le=1)]


def _for_everybody(steering: SteeringRequest) -> SteeringRequest:
    for name in NOT_FOR_ARMS:
        if getattr(steering, name) is not None:
            raise ValueError(f"{name}: is not for arms; leave it out")
    return steering


ArmSteering = Annotated[SteeringRequest, AfterValidator(_for_everybody)]


class Part(BaseModel):
    """Frozen, and strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Arm(Part):
    """What one share of the units gets."""

    name: Name
    weight: Share
    """Share of the covered units, 0 to 1; those of all arms sum to 1."""
    steering: ArmSteering = SteeringRequest()
    """Fields that this arm sets; the others are the server's defaults."""
    artifact: Name | None = None
    """Candidate whose artifact answers, `main` for the service's own (default: the server's default)."""

    @field_validator("name")
    @classmethod
    def _name_is_free(cls, name: str) -> str:
        if name in RESERVED:
            raise ValueError(f"{name!r} means something else in metrics; take another name")
        return name


class Shadow(Part):
    """A second answer that nobody sees, to some of the requests that were answered."""

    steering: ArmSteering = SteeringRequest()
    """How it differs from what was shown: these fields over the server's defaults."""
    artifact: Name | None = None
    """As an arm's."""
    share: Share
    """Share of the answered requests, 0 to 1. Under load fewer have one."""


class Experiment(Part):
    """Units fall into arms by a salted hash, so that each stays in its own (`assignment.py`)."""

    name: Name
    salt: str = Field(default="", max_length=64)
    """Seed of the hash (default: the name). Weights change only together with it, or with the name."""
    coverage: float = Field(default=1, ge=0, le=1)
    """Share of the units that take part, 0 to 1. Growing it moves no unit from one arm to another."""
    arms: tuple[Arm, ...] = Field(min_length=1, max_length=MOST_ARMS)
    """The first is the default one, which requests without a unit get, too."""
    shadow: Shadow | None = None
    """With it one arm is enough."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, values: Any) -> Any:
        return read_json(values)

    @model_validator(mode="after")
    def _arms_agree(self) -> Experiment:
        if len(self.arms) == 1 and self.shadow is None:
            raise ValueError("arms: two are needed, or one and a shadow")
        twice = [name for name, count in Counter(arm.name for arm in self.arms).items() if count > 1]
        if twice:
            raise ValueError(f"arms: the name {twice[0]!r} stands twice; each arm needs its own")
        total = math.fsum(arm.weight for arm in self.arms)
        if abs(total - 1) > SUM_TOLERANCE:
            raise ValueError(f"arms: the weights sum to {total:g}; they must sum to 1")
        return self

    @property
    def parts(self) -> dict[str, Arm | Shadow]:
        """By the name that a complaint has for each."""
        arms: dict[str, Arm | Shadow] = {f"arms: {arm.name}": arm for arm in self.arms}
        return arms | ({"shadow": self.shadow} if self.shadow else {})

    @property
    def seed(self) -> str:
        return self.salt or self.name

    @property
    def split(self) -> tuple[tuple[str, float], ...]:
        """What may not change while name and salt stay: it would move units."""
        return tuple((arm.name, arm.weight) for arm in self.arms)


def read_json(values: Any) -> Any:
    """What a flag or a variable has as text. Raises ValueError."""
    if not isinstance(values, str):
        return values
    try:
        return json.loads(values)
    except ValueError:
        raise ValueError("must be a JSON object") from None


def over_default(steering: SteeringRequest, default: SteeringRequest, *, arm: str | None) -> RequestedSteering:
    """An arm's steering over the server's default; a default strength belongs to the default preset."""
    below = SteeringRequest() if steering.preset is not None else default
    return merge_sources(server=(steering, below), arm=arm)
