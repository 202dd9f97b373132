"""Does this artifact belong to this model? Recompute its canary through the LVLM (design, section 3)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from steering.artifact import Artifact
from steering.decoder_layers import Decoder, embed_prompt
from steering.errors import BadArtifact
from steering.token_spans import expand_image_tokens, find_spans

MIN_COSINE = {torch.float32: 0.999}
MIN_COSINE_HALF = 0.99


@torch.inference_mode()
def pool_prompt(
    model: Any, decoder: Decoder, token_ids: list[int], pixel_values: Tensor, hook_layer: int
) -> tuple[Tensor, Tensor]:
    """Pooled v and t, [D] float32 each, of one prompt whose image tokens are expanded."""
    image_token = model.config.image_token_id
    device = next(model.parameters()).device
    tokens_1T = torch.tensor([token_ids], device=device)
    image_1T = tokens_1T == image_token
    embeds_1TD = embed_prompt(model, tokens_1T, image_1T, pixel_values.to(device))
    positions_1T = torch.arange(len(token_ids), device=device)[None]
    mask_11TT = (positions_1T[..., None] >= positions_1T[:, None])[:, None]
    hidden_1TD = decoder.run(range(hook_layer + 1), embeds_1TD, positions_1T, mask_11TT, None).float()
    text_start = find_spans(token_ids, image_token).text_start
    return hidden_1TD[image_1T].mean(0), hidden_1TD[0, text_start:].mean(0)


def check_canary(artifact: Artifact, model: Any, decoder: Decoder, processor: Any) -> dict[str, float]:
    """Recompute the canary; returns its smallest cosine and largest unexplained share, for the start-up report.

    Raises BadArtifact when the model gives other states than the artifact records, or the autoencoder does not
    reconstruct them.
    """
    canary, layer = artifact.canary, artifact.config.hook_layer
    image_token, cosines, unexplained = model.config.image_token_id, [], []
    for index, (image, token_ids) in enumerate(zip(canary.images, canary.token_ids, strict=True)):
        per_image = processor._get_num_multimodal_tokens(image_sizes=[(image.height, image.width)]).num_image_tokens
        if max(token_ids) >= model.config.get_text_config().vocab_size or image_token not in token_ids:
            raise BadArtifact(f"canary prompt {index} is not one of this model's tokenizer", field="artifact")
        expanded = expand_image_tokens(token_ids, image_token, per_image)
        pixels = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
        image_D, text_D = (state.cpu() for state in pool_prompt(model, decoder, expanded, pixels, layer))
        cosines += [
            float(F.cosine_similarity(image_D, canary.image_ND[index], dim=0)),
            float(F.cosine_similarity(text_D, canary.text_ND[index], dim=0)),
        ]
        unexplained.append(_unexplained(artifact, image_D, text_D))
    report = {"min_cosine": min(cosines, default=1.0), "max_unexplained": max(unexplained, default=0.0)}
    if artifact.config.canary_synthetic:
        return report
    floor = MIN_COSINE.get(next(model.parameters()).dtype, MIN_COSINE_HALF)
    if not report["min_cosine"] >= floor:
        raise BadArtifact(
            f"the model's states differ from those the artifact was trained on (cosine {report['min_cosine']:.4f}, "
            f"at least {floor} needed): use the checkpoint it names, {artifact.config.base_model.name}",
            field="artifact",
        )
    if not report["max_unexplained"] < 1:
        raise BadArtifact(
            f"the artifact does not reconstruct the model's states (unexplained {report['max_unexplained']:.2f})",
            field="artifact",
        )
    return report


@torch.inference_mode()
def _unexplained(artifact: Artifact, image_D: Tensor, text_D: Tensor) -> float:
    """Share of squared length that auxiliary and sparse autoencoder together lose, the larger of the modalities."""
    shared = artifact.auxiliary(image_D[None], text_D[None])
    rebuilt = artifact.auxiliary.reconstruct(*artifact.sae(*shared))
    pairs = zip((image_D, text_D), rebuilt, strict=True)
    return max(float((state - again[0]).square().sum() / state.square().sum()) for state, again in pairs)
