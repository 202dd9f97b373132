"""The artifacts that can answer: the service's own, and candidates that are loaded beside it. Plain data; knows no
engine, no Ray and no settings.
"""

from __future__ import annotations

from typing import NamedTuple

from steering.artifact_config import ArtifactConfig

MAIN = "main"
"""The service's own, where a candidate could be named."""


class Able(NamedTuple):
    """An artifact in an engine that can answer with it."""

    config: ArtifactConfig
    engine: str
    modes: tuple[str, ...]
    """Of steering, as its engine has them."""
    branches: int
    """Most of a request."""
    system_fingerprint: str = ""
    """Of its answers, where it is known."""


Candidate = Able | str
"""A candidate that can answer, or why it cannot."""
