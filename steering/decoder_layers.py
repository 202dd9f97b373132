"""Where a model family's decoder lives, and how it is run layer by layer. An explicit table; no guessing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steering.errors import BadArtifact


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The parts of an LVLM's language model."""

    family: str
    layers: nn.ModuleList
    norm: nn.Module
    rotary: nn.Module
    head: nn.Module
    hidden_size: int
    """D, of the residual stream."""
    context_tokens: int
    """Positions the model was made for."""

    def run(self, layers: range, hidden_BTD: Tensor, positions_BT: Tensor, mask_B1TJ: Tensor, cache: object) -> Tensor:
        """Pass [B, T, D] through some of the layers; `mask` is True where key J may be seen by query T."""
        position_embeddings = self.rotary(hidden_BTD, position_ids=positions_BT)
        for index in layers:
            hidden_BTD = self.layers[index](
                hidden_BTD,
                attention_mask=mask_B1TJ,
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=True,
                position_embeddings=position_embeddings,
            )
        return hidden_BTD

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Final norm and head: [N, D] to [N, V] in float32."""
        return self.head(self.norm(hidden_ND)).float()


def _llava_decoder(model: Any) -> Decoder:
    text = model.model.language_model
    return Decoder(
        family="llava",
        layers=text.layers,
        norm=text.norm,
        rotary=text.rotary_emb,
        head=model.lm_head,
        hidden_size=text.config.hidden_size,
        context_tokens=text.config.max_position_embeddings,
    )


_DECODERS: dict[str, Callable[[Any], Decoder]] = {"llava": _llava_decoder}
"""By the checkpoint's `model_type`."""


def find_decoder(model: Any) -> Decoder:
    """The decoder of a loaded LVLM. Raises BadArtifact for a family that is not in the table."""
    family = model.config.model_type
    if family not in _DECODERS:
        raise BadArtifact(f"model family {family!r} is not supported; known: {sorted(_DECODERS)}", field="model")
    return _DECODERS[family](model)


def embed_prompt(model: Any, token_ids_BT: Tensor, image_mask_BT: Tensor, pixel_values: Tensor | None) -> Tensor:
    """Input embeddings [B, T, D] with the image features at the image positions, row by row in order."""
    embeds_BTD = model.get_input_embeddings()(token_ids_BT)
    if pixel_values is None:
        return embeds_BTD
    features = model.get_image_features(pixel_values=pixel_values.to(embeds_BTD.dtype), return_dict=True).pooler_output
    features_ND = torch.cat(list(features), dim=0).to(embeds_BTD.dtype)
    return embeds_BTD.masked_scatter(image_mask_BT[..., None], features_ND)
