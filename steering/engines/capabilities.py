"""What an engine can do with the checkpoint and artifact it has loaded, said the same way by every engine."""

from __future__ import annotations

from steering.engines.base import Capabilities
from steering.engines.checkpoint import Checkpoint


def describe(
    checkpoint: Checkpoint, *, engine: str, modes: tuple[str, ...], branches: tuple[int, ...], response_format: bool
) -> Capabilities:
    """The engine's own part is named; the rest is read off checkpoint and artifact."""
    config = checkpoint.artifact.config if checkpoint.artifact else None
    return Capabilities(
        engine=engine,
        model_family=checkpoint.family,
        context_tokens=checkpoint.context_tokens,
        forms=("published", "difference", "union"),
        modes=modes,
        branches=branches,
        response_format=response_format,
        artifact=config.fingerprint if config else None,
        presets=tuple(config.presets) if config else (),
        alignment=config.alignment if config else None,
    )
