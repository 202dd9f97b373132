"""Loads a checkpoint with its weights and makes sure that its artifact belongs to it. Serves nothing."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText

from steering.engines.checkpoint import Checkpoint, read_checkpoint
from steering.engines.huggingface.canary import check_canary
from steering.errors import BadArtifact
from steering.lvlm.decoder_layers import Decoder, find_decoder

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """An LVLM ready to run."""

    checkpoint: Checkpoint
    model: Any
    """The transformers model, on its device, in eval mode."""
    decoder: Decoder


def load_model(
    path: str, artifact_path: str | Path | None, device: str, dtype: str, max_context_tokens: int | None
) -> LoadedModel:
    """Load both and check the artifact's canary through the model. Raises BadArtifact naming what is wrong."""
    if dtype not in DTYPES:
        raise BadArtifact(f"dtype {dtype!r} is unknown; known: {sorted(DTYPES)}", field="dtype")
    torch.set_float32_matmul_precision("highest")
    checkpoint = read_checkpoint(path, artifact_path, max_context_tokens)
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(path, dtype=DTYPES[dtype], attn_implementation="sdpa")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BadArtifact(f"no model could be loaded from {path}: {error}", field="model") from error
    model.to(device).eval()
    decoder = find_decoder(model)
    if checkpoint.artifact is not None:
        report = check_canary(checkpoint.artifact, model, decoder, checkpoint.processor)
        log.info("artifact %s fits the model: canary %s", checkpoint.artifact.config.fingerprint[:12], report)
    return LoadedModel(checkpoint=checkpoint, model=model, decoder=decoder)
