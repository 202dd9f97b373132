"""What an engine knows of a checkpoint without its weights: processor, special tokens, lengths; and its artifact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from transformers import AutoConfig, AutoProcessor, GenerationConfig

from steering.artifact import Artifact, check_fits, load_artifact
from steering.engines.base import CanaryKind, Capabilities
from steering.errors import BadArtifact
from steering.lvlm.families import context_limit, find_family
from steering.request import Form


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One LVLM on disk, and the artifact trained for it if there is one."""

    path: str
    family: str
    """`model_type` of the checkpoint."""
    architecture: str | None
    """Its model class, as its configuration names it."""
    hidden_size: int
    """D of the language model."""
    num_layers: int
    head_size: int
    """Width of one attention head of the language model."""
    processor: Any
    """The checkpoint's processor: its tokenizer, image processor and chat template."""
    vocabulary_size: int
    """Width of the logits; a tokenizer may know fewer tokens."""
    image_token_id: int
    end_tokens: frozenset[int]
    context_tokens: int
    """Most tokens of prompt and answer together."""
    artifact: Artifact | None
    artifact_path: str | None

    @property
    def canary(self) -> CanaryKind | None:
        """Of the artifact; an engine that has started has verified one that is not synthetic."""
        if self.artifact is None:
            return None
        return "synthetic" if self.artifact.config.canary_synthetic else "verified"

    def capabilities(
        self, engine: str, *, modes: tuple[str, ...], branches: tuple[int, ...], response_format: bool
    ) -> Capabilities:
        """What an engine can do with this checkpoint; what only the engine knows is named."""
        config = self.artifact.config if self.artifact else None
        return Capabilities(
            engine=engine,
            model_family=self.family,
            context_tokens=self.context_tokens,
            forms=get_args(Form),
            modes=modes,
            branches=branches,
            response_format=response_format,
            artifact=config.fingerprint if config else None,
            presets=tuple(config.presets) if config else (),
            alignment=config.alignment if config else None,
            faithfulness=config.faithfulness if config else None,
        )


def read_checkpoint(path: str, artifact_path: str | Path | None, max_context_tokens: int | None) -> Checkpoint:
    """Read everything but the weights. Raises BadArtifact naming what is wrong."""
    try:
        config: Any = AutoConfig.from_pretrained(path)
        find_family(config.model_type)
        processor = AutoProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise BadArtifact(f"no model could be loaded from {path}: {error}", field="model") from error
    text = config.get_text_config()
    artifact = None
    if artifact_path is not None:
        artifact = load_artifact(artifact_path)
        check_fits(artifact, family=config.model_type, hidden_size=text.hidden_size, num_layers=text.num_hidden_layers)
    return Checkpoint(
        path=path,
        family=config.model_type,
        architecture=(config.architectures or [None])[0],
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        processor=processor,
        vocabulary_size=text.vocab_size,
        image_token_id=config.image_token_id,
        end_tokens=_end_tokens(path, text),
        context_tokens=min(max_context_tokens or context_limit(text), context_limit(text)),
        artifact=artifact,
        artifact_path=None if artifact_path is None else str(artifact_path),
    )


def _end_tokens(path: str, text_config: Any) -> frozenset[int]:
    try:
        end = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:
        end = None
    if end is None:
        end = text_config.eos_token_id
    return frozenset([end] if isinstance(end, int) else end or [])
