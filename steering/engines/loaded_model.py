"""Loads a checkpoint and its artifact and makes sure that they belong together. Serves nothing."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor

from steering.artifact import Artifact, load_artifact
from steering.decoder_layers import Decoder, find_decoder
from steering.engines.canary import check_canary
from steering.errors import BadArtifact
from steering.hooks import check_fits
from steering.intervention import Intervention
from steering.realignment import Realignment

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """An LVLM ready to run, with its artifact if it has one."""

    model: Any
    """The transformers model, on its device, in eval mode."""
    processor: Any
    decoder: Decoder
    artifact: Artifact | None
    context_tokens: int
    """Most tokens of prompt and answer together."""
    end_tokens: frozenset[int]

    @property
    def image_token_id(self) -> int:
        return self.model.config.image_token_id


def load_model(
    path: str, artifact_path: str | Path | None, device: str, dtype: str, max_context_tokens: int | None
) -> LoadedModel:
    """Load both and check the artifact's canary through the model. Raises BadArtifact naming what is wrong."""
    if dtype not in DTYPES:
        raise BadArtifact(f"dtype {dtype!r} is unknown; known: {sorted(DTYPES)}", field="dtype")
    torch.set_float32_matmul_precision("highest")
    try:
        processor = AutoProcessor.from_pretrained(path)
        model: Any = AutoModelForImageTextToText.from_pretrained(path, dtype=DTYPES[dtype], attn_implementation="sdpa")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BadArtifact(f"no model could be loaded from {path}: {error}", field="model") from error
    model.to(device).eval()
    decoder = find_decoder(model)
    artifact = None
    if artifact_path is not None:
        artifact = load_artifact(artifact_path)
        check_fits(artifact, family=decoder.family, hidden_size=decoder.hidden_size, num_layers=len(decoder.layers))
        report = check_canary(artifact, model, decoder, processor)
        log.info("artifact %s fits the model: canary %s", artifact.config.fingerprint[:12], report)
    return LoadedModel(
        model=model,
        processor=processor,
        decoder=decoder,
        artifact=artifact,
        context_tokens=min(max_context_tokens or decoder.context_tokens, decoder.context_tokens),
        end_tokens=_end_tokens(model),
    )


def make_intervention(artifact: Artifact, device: torch.device) -> Intervention:
    """What an artifact does at its hook layer, on the model's device."""
    return Intervention(
        Realignment(artifact.auxiliary, artifact.sae).to(device),
        min_text_tokens=artifact.config.min_text_tokens,
        control_image_MD=artifact.control_image_MD.to(device),
    )


def _end_tokens(model: Any) -> frozenset[int]:
    end = model.generation_config.eos_token_id
    if end is None:
        end = model.config.get_text_config().eos_token_id
    return frozenset([end] if isinstance(end, int) else end or [])
