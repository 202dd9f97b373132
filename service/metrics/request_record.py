"""What is known of one HTTP request: filled in on its way, read when it has ended. Plain data; no prompt, no picture,
no key and no header value ever enters it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from opentelemetry.trace import INVALID_SPAN, Span
from starlette.types import Scope

from service.errors import ERROR_KINDS
from service.experiments.arms import NO_ARM
from service.experiments.assignment import Assignment
from steering.engines.base import Receipt


@dataclass(kw_only=True)
class RequestRecord:
    """One request; None is 'not known' or 'has none'."""

    request_id: str
    method: str
    arrived: float = field(default_factory=time.monotonic)
    """time.monotonic() at its first byte."""
    route: str = "unknown"
    """The route's template, never the path that the client wrote."""
    status: int | None = None
    """HTTP status that went out; None: the client left before there was one."""
    error_code: str | None = None
    """A key of ERROR_KINDS, where the client was told of an error, be it inside a stream."""
    key: str | None = None
    """The name of the caller's key."""
    completion_id: str | None = None
    stream: bool | None = None
    images: int = 0
    image_pixels: int = 0
    assignment: Assignment | None = None
    """What the experiment in force meant for it."""
    time_to_first_token_s: float | None = None
    inter_token_s: float | None = None
    """Mean time between two tokens of a choice."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    choices: int | None = None
    """Of a whole answer."""
    empty_choices: int | None = None
    """Those without any text."""
    finish: str | None = None
    """stop, length, cancelled or error, where the request reached the model."""
    receipt: Receipt | None = None
    duration_s: float = 0.0
    span: Span = INVALID_SPAN
    """The trace's span of this request; invalid where nothing is traced."""

    @property
    def arm(self) -> str:
        """What metrics count it under."""
        return NO_ARM if self.assignment is None else self.assignment.label

    @property
    def failed(self) -> bool:
        """Whether the service is at fault. A stream that breaks has the status 200, a client that left has none."""
        status = ERROR_KINDS[self.error_code].status if self.error_code else self.status
        return status is not None and status >= 500

    def facts(self) -> dict[str, object]:
        """What the log says, flat, without what is not known."""
        steering = self.receipt and {
            "applied": self.receipt.applied,
            "reason": self.receipt.reason,
            "preset": self.receipt.preset,
            "strength": self.receipt.strength,
            "arm": self.receipt.arm,
            "relative_shift": _mean(self.receipt.relative_shift),
            "mismatch": _mean([one.before for one in self.receipt.mismatch or () if one is not None]),
        }
        facts = {
            "request_id": self.request_id,
            "completion_id": self.completion_id,
            "method": self.method,
            "route": self.route,
            "status": self.status,
            "error_code": self.error_code,
            "key": self.key,
            "duration_s": round(self.duration_s, 6),
            "time_to_first_token_s": self.time_to_first_token_s and round(self.time_to_first_token_s, 6),
            "inter_token_s": self.inter_token_s and round(self.inter_token_s, 6),
            "stream": self.stream,
            "finish": self.finish,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "choices": self.choices,
            "empty_choices": self.empty_choices,
            "images": self.images or None,
            "image_pixels": self.image_pixels or None,
            "steering": steering,
            "experiment": self.assignment and assignment_facts(self.assignment),
        }
        return {name: value for name, value in facts.items() if value is not None}


def assignment_facts(assignment: Assignment) -> dict[str, object]:
    """What a report needs to know."""
    facts = {
        "name": assignment.experiment,
        "salt": assignment.seed,
        "default": assignment.default,
        "arm": assignment.label,
        "share": assignment.arm.weight if assignment.arm is not None and assignment.reason == "unit" else None,
        "unit": assignment.unit,
    }
    return {name: value for name, value in facts.items() if value is not None}


def _mean(numbers: list[float]) -> float | None:
    return round(sum(numbers) / len(numbers), 6) if numbers else None


def record_of(scope: Scope) -> RequestRecord:
    """The record of the request that this ASGI scope belongs to."""
    return scope["state"]["record"]
