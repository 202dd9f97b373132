"""How an LVLM's decoder is run layer by layer, from input embeddings to logits. Where its parts are: `families.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steering.errors import BadArtifact
from steering.lvlm.families import ImageInputs, PromptPositions, context_limit, find_family


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

    def run(
        self, layers: range, hidden_BTD: Tensor, rotary_BT: Tensor, mask_B1TJ: Tensor | None, cache: object
    ) -> Tensor:
        """Pass [B, T, D] through some of the layers; `mask` is True where key J may be seen by query T.

        Without a mask a token sees those before it (SDPA attention).

        `rotary` holds the positions as `PromptPositions` has them, [B, T] or [3, B, T].
        """
        position_embeddings = self.rotary(hidden_BTD, position_ids=rotary_BT)
        for index in layers:
            hidden_BTD = self.layers[index](
                hidden_BTD,
                attention_mask=mask_B1TJ,
                past_key_values=cache,
                use_cache=True,
                position_embeddings=position_embeddings,
            )
        return hidden_BTD

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Final norm and head: [N, D] to [N, V] in float32."""
        return self.head(self.norm(hidden_ND)).float()


def find_decoder(model: Any) -> Decoder:
    """The decoder of a loaded LVLM. Raises BadArtifact for a family that is not in the table."""
    family = model.config.model_type
    parts = find_family(family).decoder_parts(model)
    text = model.config.get_text_config()
    return Decoder(
        family=family,
        **parts._asdict(),
        hidden_size=text.hidden_size,
        context_tokens=context_limit(text),
    )


def embed_prompt(model: Any, token_ids_BT: Tensor, image_mask_BT: Tensor, image_inputs: ImageInputs) -> Tensor:
    """Input embeddings [B, T, D] with the image features at the image positions, row by row in order.

    `image_inputs` are those of all rows' images, empty where there are none. Raises BadArtifact where the model makes
    more or fewer features than its processor wrote tokens: every later image would stand in another one's place.
    """
    features_ND = encode_images(model, image_inputs) if image_inputs else None
    return embed_with_features(model, token_ids_BT, image_mask_BT, features_ND)


def encode_images(model: Any, image_inputs: ImageInputs) -> Tensor:
    """Features [N, D] of all images, one after the other, as the language model takes them."""
    dtype = model.get_input_embeddings().weight.dtype
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in image_inputs.items()}
    features = model.get_image_features(**inputs, return_dict=True).pooler_output
    return torch.cat(list(features), dim=0).to(dtype)


def embed_with_features(model: Any, token_ids_BT: Tensor, image_mask_BT: Tensor, features_ND: Tensor | None) -> Tensor:
    """As `embed_prompt`, of images that were encoded before; None where there are none."""
    embeds_BTD = model.get_input_embeddings()(token_ids_BT)
    if features_ND is None:
        return embeds_BTD
    tokens = int(image_mask_BT.sum())
    if len(features_ND) != tokens:
        raise BadArtifact(
            f"the model makes {len(features_ND)} features of images that its processor gives {tokens} tokens; "
            "the checkpoint's processor and model do not belong together",
            field="model",
        )
    return embeds_BTD.masked_scatter(image_mask_BT[..., None], features_ND)


def place_prompt(model: Any, token_ids_BT: Tensor, image_mask_BT: Tensor, image_inputs: ImageInputs) -> PromptPositions:
    """Rotary positions of a batch of prompts, padded on the right."""
    family = find_family(model.config.model_type)
    return family.prompt_positions(model, token_ids_BT, image_mask_BT, image_inputs)
