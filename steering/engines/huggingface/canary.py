"""Does this artifact belong to this model? Recompute its canary through the LVLM (design, section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steering.artifact import Artifact
from steering.engines.canary import judge_canary
from steering.errors import BadArtifact
from steering.lvlm.decoder_layers import Decoder, embed_prompt, place_prompt
from steering.lvlm.families import ImageInputs, find_family, tokens_per_image
from steering.lvlm.token_spans import expand_image_tokens, find_spans


@torch.inference_mode()
def pool_prompt(
    model: Any, decoder: Decoder, token_ids: list[int], image_inputs: ImageInputs, hook_layer: int
) -> tuple[Tensor, Tensor]:
    """Pooled v and t, [D] float32 each, of one prompt whose image tokens are expanded."""
    image_token = model.config.image_token_id
    device = next(model.parameters()).device
    tokens_1T = torch.tensor([token_ids], device=device)
    image_1T = tokens_1T == image_token
    inputs = {name: value.to(device) for name, value in image_inputs.items()}
    embeds_1TD = embed_prompt(model, tokens_1T, image_1T, inputs)
    rotary_1T = place_prompt(model, tokens_1T, image_1T, inputs).rotary_BT
    indices_T = torch.arange(len(token_ids), device=device)
    mask_11TT = (indices_T[:, None] >= indices_T)[None, None]
    hidden_1TD = decoder.run(range(hook_layer + 1), embeds_1TD, rotary_1T, mask_11TT, None).float()
    text_start = find_spans(token_ids, image_token).text_start
    return hidden_1TD[image_1T].mean(0), hidden_1TD[0, text_start:].mean(0)


def check_canary(artifact: Artifact, model: Any, decoder: Decoder, processor: Any) -> dict[str, float]:
    """Recompute the canary; returns its smallest cosine and largest unexplained share, for the start-up report.

    Raises BadArtifact when the model gives other states than the artifact records, or the autoencoder does not
    reconstruct them.
    """
    canary, layer = artifact.canary, artifact.config.hook_layer
    image_token, states = model.config.image_token_id, []
    for index, (image, token_ids) in enumerate(zip(canary.images, canary.token_ids, strict=True)):
        if max(token_ids) >= model.config.get_text_config().vocab_size or image_token not in token_ids:
            raise BadArtifact(f"canary prompt {index} is not one of this model's tokenizer", field="artifact")
        expanded = expand_image_tokens(token_ids, image_token, tokens_per_image(processor, [image]))
        inputs = find_family(decoder.family).image_inputs(processor.image_processor, [image])
        states.append(pool_prompt(model, decoder, expanded, inputs, layer))
    return judge_canary(artifact, states, half_precision=next(model.parameters()).dtype != torch.float32)
