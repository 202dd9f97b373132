"""Where a request's steering comes from: body, header, model alias, an experiment's arm, the server's default; and who
may ask for what. Knows no images and no engine.
"""

from __future__ import annotations

import re
from dataclasses import replace

from service.callers.keys import Caller, Scope
from service.chat.schemas import ChatCompletionRequest
from service.errors import ApiError
from service.experiments.arms import over_default
from service.experiments.assignment import Assignment, assign
from service.settings import Settings
from steering.request import RequestedSteering, SteeringRequest, merge_sources

STRENGTH_HEADER = "x-steering-strength"
ALIASES = {"": SteeringRequest(), ":off": SteeringRequest(enabled=False), ":steered": SteeringRequest(enabled=True)}
"""Suffix of the model id to what it asks for."""
DECIMAL = re.compile(r"\d{1,3}(\.\d{1,9})?|\.\d{1,9}")


def find_alias(model: str, served: str) -> str:
    """The suffix of a known model id; anything else is a 404."""
    for alias in ALIASES:
        if model == served + alias:
            return alias
    known = ", ".join(repr(served + alias) for alias in ALIASES)
    raise ApiError("model_not_found", f"model: there is no model {model[:200]!r}; there are {known}", param="model")


def assignment_of(
    request: ChatCompletionRequest,
    strength_header: str | None,
    alias: str,
    unit_header: str | None,
    settings: Settings,
    caller: Caller,
) -> Assignment | None:
    """None where no experiment runs. The unit is the key and, of that key, the header's or else the body's user."""
    if settings.experiment is None:
        return None
    asked = request.steering is not None and bool(request.steering.model_dump(exclude_none=True, exclude={"explain"}))
    own = asked or strength_header is not None or alias != ""
    user = unit_header or request.user
    unit = f"{caller.name}:{user}" if user else None
    return assign(settings.experiment, unit=unit, own_steering=own)


def artifact_of(settings: Settings, assignment: Assignment | None) -> str:
    """The name of the artifact that answers: the arm's, or else the server's default."""
    arm = assignment and assignment.arm
    return (arm and arm.artifact) or settings.default_artifact


def merge_steering(
    body: SteeringRequest | None,
    strength_header: str | None,
    alias: str,
    settings: Settings,
    assignment: Assignment | None = None,
) -> RequestedSteering:
    """Body, header and alias, or else the arm, over the server's default: a caller's own steering is in no arm."""
    body = body or SteeringRequest()
    if body.control not in (None, "none") and not settings.allow_controls:
        raise ApiError(
            "unsupported_value",
            "steering.control: controls are for evaluation; this server was not started with --allow-controls on",
            param="steering.control",
        )
    default = settings.default_steering
    if assignment is not None and assignment.arm is not None:
        asked = over_default(assignment.arm.steering, default, arm=assignment.shown)
        return replace(asked, settings=asked.settings.model_copy(update={"explain": body.explain}))
    if body.preset is not None:
        default = SteeringRequest()  # a default strength belongs to the default preset
    arm = assignment and assignment.shown
    return merge_sources(body, _from_header(strength_header), ALIASES[alias], server=(default,), arm=arm)


def _from_header(value: str | None) -> SteeringRequest:
    if value is None:
        return SteeringRequest()
    if not DECIMAL.fullmatch(value.strip()) or not 0 <= float(value) <= 1:
        raise ApiError(
            "invalid_header", f"{STRENGTH_HEADER}: must be a number from 0 to 1, such as 0.5", param=STRENGTH_HEADER
        )
    return SteeringRequest(strength=float(value))


def check_scopes(request: ChatCompletionRequest, caller: Caller) -> None:
    """What not every key may ask for."""
    asked = request.steering or SteeringRequest()
    wanted: list[tuple[str, object, Scope]] = [
        ("explain", asked.explain, "explain"),
        ("concepts", asked.concepts, "explain"),
        ("control", asked.control not in (None, "none"), "evaluate"),
    ]
    for field, value, scope in wanted:
        if value and scope not in caller.scopes:
            raise ApiError(
                "permission_denied",
                f"steering.{field}: needs a key with the scope '{scope}'",
                param=f"steering.{field}",
            )
