"""API keys: who may ask for what, and how much. Knows no routes and no HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

Scope = Literal["chat", "explain", "evaluate", "metrics"]
SCOPES: frozenset[Scope] = frozenset(get_args(Scope))


class Quota(BaseModel):
    """What a key may use; None is no limit. A whole minute's worth may come at once."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    requests_per_minute: int | None = Field(default=None, ge=1)
    """Requests of any kind, refused ones included."""
    images_per_minute: int | None = Field(default=None, ge=1)
    pixels_per_minute: int | None = Field(default=None, ge=1)
    """Pixels of all images, as their headers state them."""


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who sent a request: a key without its secret."""

    name: str
    """The key's name; empty where the service has no keys. Callers of different names share no cache."""
    scopes: frozenset[Scope]
    quota: Quota = Quota()


ANYBODY = Caller(name="", scopes=SCOPES)
"""Every caller of a service without keys."""
