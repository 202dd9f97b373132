"""What the ingress hands to the model replica: a checked conversation, its pixels, sampling, steering. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from service.artifacts import MAIN
from service.images.decoder import RgbImage
from steering.engines.base import Sampling
from steering.request import RequestedSteering


class Turn(NamedTuple):
    """One message."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[str | None, ...]
    """In the message's order: a text, or None where an image stands."""


@dataclass(frozen=True, kw_only=True)
class ModelJob:
    """One request on its way to an engine."""

    request_id: str
    """Unique among running requests; made by the ingress, never by a client."""
    turns: tuple[Turn, ...]
    images: tuple[RgbImage, ...]
    """In the order of the None parts of all turns."""
    max_tokens_field: str = "max_tokens"
    """The name that the client used for it: OpenAI has two."""
    max_tokens: int | None
    """None: as many as fit, up to the server's default."""
    sampling: Sampling
    """Its max_tokens is a placeholder until the replica has counted the prompt."""
    steering: RequestedSteering
    tenant: str
    """Jobs of different tenants share no cached prompt."""
    artifact: str = MAIN
    """Name of the one that answers: the operator's choice, never a caller's."""
