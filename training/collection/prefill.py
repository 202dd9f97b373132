"""A batch of prompts with pictures, put into an LVLM's decoder in one go; and means over marked positions.

Prompts are padded on the right, where causal attention never looks, so that batches need no mask. Knows no store and no
autoencoder.

Shapes: B prompts, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor

from steering.lvlm.decoder_layers import embed_prompt, place_prompt
from steering.lvlm.families import find_family, join_image_inputs, tokens_per_image
from steering.lvlm.token_spans import expand_image_tokens, find_spans


class PromptInputs(NamedTuple):
    """One prompt as the model takes it."""

    token_ids: list[int]
    """Image tokens expanded."""
    image_inputs: dict[str, Tensor]
    """Of its picture, as the family's image processor gives them."""


def prompt_inputs(processor: Any, family: str, token_ids: Sequence[int], image: Image) -> PromptInputs:
    """From a prompt with one token for the picture (RGB). Raises InvalidSteering where it holds none, and ValueError
    for a picture that the family's image processor does not take."""
    expanded = expand_image_tokens(token_ids, processor.image_token_id, tokens_per_image(processor, [image]))
    known = find_family(family)
    found = known.image_inputs(processor.image_processor, [image])
    return PromptInputs(expanded, {name: found[name] for name in known.image_input_names})


class Prefill(NamedTuple):
    """What goes into the first decoder layer."""

    hidden_BTD: Tensor
    rotary_BT: Tensor
    ids_BT: Tensor
    image_BT: Tensor
    """True at image tokens."""
    text_BT: Tensor
    """True at text after the image; padding is none."""


def prepare_prefill(model: Any, image_token: int, prompts: Sequence[PromptInputs]) -> Prefill:
    """Embeddings and positions of a batch, on the model's device."""
    tokens = max(len(prompt.token_ids) for prompt in prompts)
    ids_BT = torch.tensor([_padded(prompt.token_ids, tokens) for prompt in prompts])
    valid_BT = torch.tensor([[index < len(prompt.token_ids) for index in range(tokens)] for prompt in prompts])
    image_BT, text_BT = pooled_positions(ids_BT, valid_BT, image_token)
    ids_BT, image_BT, text_BT = (tensor.to(model.device) for tensor in (ids_BT, image_BT, text_BT))
    joined = join_image_inputs([prompt.image_inputs for prompt in prompts])
    image_inputs = {name: value.to(model.device) for name, value in joined.items()}
    return Prefill(
        hidden_BTD=embed_prompt(model, ids_BT, image_BT, image_inputs),
        rotary_BT=place_prompt(model, ids_BT, image_BT, image_inputs).rotary_BT,
        ids_BT=ids_BT,
        image_BT=image_BT,
        text_BT=text_BT,
    )


def pooled_positions(ids_BT: Tensor, valid_BT: Tensor, image_token: int) -> tuple[Tensor, Tensor]:
    """Which positions make v and which make t: [B, T] each."""
    starts_B = torch.tensor([find_spans(row, image_token).text_start for row in ids_BT.tolist()])
    behind_BT = torch.arange(ids_BT.shape[1])[None] >= starts_B[:, None]
    return (ids_BT == image_token) & valid_BT, behind_BT & valid_BT


def masked_mean(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the marked positions of each row, [B, D] in float32; what stands elsewhere may be infinite."""
    mask_BT1 = mask_BT.unsqueeze(-1)
    return hidden_BTD.float().masked_fill(~mask_BT1, 0.0).sum(1) / mask_BT1.sum(1)


def running_means(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean [B, T, D] over the marked positions up to and including each one, float32; 0 before the first."""
    sums_BTD = hidden_BTD.float().masked_fill(~mask_BT.unsqueeze(-1), 0.0).cumsum(1)
    return sums_BTD / mask_BT.cumsum(1).clamp(min=1).unsqueeze(-1)


def _padded(token_ids: list[int], tokens: int) -> list[int]:
    """With any token behind: nothing that is pooled can see it."""
    return token_ids + token_ids[-1:] * (tokens - len(token_ids))
