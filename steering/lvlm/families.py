"""The model families that can be steered, an explicit table: what differs between them stands here and nowhere else.

Knows processors and model classes; knows no steering and no engine.

Shapes: B batch rows, T tokens, N image tokens of a batch, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor, nn

from steering.errors import BadArtifact, InvalidSteering

ImageInputs = Mapping[str, Tensor]
"""What a model's `get_image_features` takes, by name. Inputs of several prompts are joined along the first axis."""


class DecoderParts(NamedTuple):
    """Where a model class keeps its language model."""

    layers: nn.ModuleList
    norm: nn.Module
    rotary: nn.Module
    head: nn.Module


class PromptPositions(NamedTuple):
    """What the rotary embedding is told of a batch of prompts, and of what follows them."""

    rotary_BT: Tensor
    """[B, T]; [3, B, T] (time, height, width) in a family with multimodal rotary embeddings."""
    shift_B: Tensor
    """Behind the last image, a token's position is its index in the sequence plus this, on every axis."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family, for any checkpoint of it that transformers loads."""

    image_input_names: tuple[str, ...]
    """Keys of `ImageInputs`, as the processor calls them too."""
    images_may_touch: bool
    """Two images may follow each other with no token between them."""
    decoder_parts: Callable[[Any], DecoderParts]
    image_inputs: Callable[[Any, list[Image]], dict[str, Tensor]]
    """From the checkpoint's image processor and RGB images to `ImageInputs`."""
    prompt_positions: Callable[[Any, Tensor, Tensor, ImageInputs], PromptPositions]
    """From model, token ids [B, T], image mask [B, T] and the batch's images; padding on the right changes nothing."""
    rotary_axes: int = 1
    """3 in a family with multimodal rotary embeddings; text has the same position on each."""


def _language_model_parts(model: Any) -> DecoderParts:
    text = model.model.language_model
    return DecoderParts(layers=text.layers, norm=text.norm, rotary=text.rotary_emb, head=model.lm_head)


def _inputs_together(image_processor: Any, images: list[Image]) -> dict[str, Tensor]:
    """LLaVA: `pixel_values` [images, 3, H, W]. Qwen: `pixel_values` [patches, dim], `image_grid_thw` [images, 3]."""
    return dict(image_processor(images=images, return_tensors="pt"))


def _inputs_tile_by_tile(image_processor: Any, images: list[Image]) -> dict[str, Tensor]:
    """`pixel_values` [tiles of all images, 3, H, W], no padding to the image with most; `image_sizes` [images, 2]."""
    made = [image_processor(images=[image], return_tensors="pt") for image in images]
    return {
        "pixel_values": torch.cat([one["pixel_values"][0] for one in made]),
        "image_sizes": torch.cat([one["image_sizes"] for one in made]),
    }


def _counted_positions(_model: Any, ids_BT: Tensor, _image_BT: Tensor, _inputs: ImageInputs) -> PromptPositions:
    rows, tokens = ids_BT.shape
    indices_T = torch.arange(tokens, device=ids_BT.device)
    return PromptPositions(rotary_BT=indices_T.expand(rows, -1), shift_B=ids_BT.new_zeros(rows))


def _positions_in_image_grids(model: Any, ids_BT: Tensor, image_BT: Tensor, inputs: ImageInputs) -> PromptPositions:
    """M-RoPE: an image's tokens count along its rows and columns, and text goes on behind the longer side."""
    positions_3BT, shift_B1 = model.model.get_rope_index(
        ids_BT, mm_token_type_ids=image_BT.int(), image_grid_thw=inputs.get("image_grid_thw")
    )
    return PromptPositions(rotary_BT=positions_3BT, shift_B=shift_B1[:, 0])


FAMILIES: dict[str, Family] = {
    "llava": Family(
        image_input_names=("pixel_values",),
        images_may_touch=True,
        decoder_parts=_language_model_parts,
        image_inputs=_inputs_together,
        prompt_positions=_counted_positions,
    ),
    "llava_next": Family(
        image_input_names=("pixel_values", "image_sizes"),
        images_may_touch=True,
        decoder_parts=_language_model_parts,
        image_inputs=_inputs_tile_by_tile,
        prompt_positions=_counted_positions,
    ),
    "qwen2_5_vl": Family(
        image_input_names=("pixel_values", "image_grid_thw"),
        images_may_touch=False,
        decoder_parts=_language_model_parts,
        image_inputs=_inputs_together,
        prompt_positions=_positions_in_image_grids,
        rotary_axes=3,
    ),
}
"""By the checkpoint's `model_type`."""


def find_family(model_type: str) -> Family:
    """Raises BadArtifact for a family that is not in the table."""
    if model_type not in FAMILIES:
        raise BadArtifact(f"model family {model_type!r} is not supported; known: {sorted(FAMILIES)}", field="model")
    return FAMILIES[model_type]


def context_limit(text_config: Any) -> int:
    """Positions that a language model sees from its last one; with sliding windows no more than one window."""
    window = getattr(text_config, "sliding_window", None)
    limit = text_config.max_position_embeddings
    return limit if window is None else min(window, limit)


def tokens_per_image(processor: Any, images: Sequence[Image]) -> list[int]:
    """How many image tokens each image gets. Raises InvalidSteering for one that the processor does not take."""
    if not images:
        return []
    try:
        sizes = [(image.height, image.width) for image in images]
        return list(processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens)
    except ValueError as error:  # Qwen's processor takes no image 200 times as long as wide
        raise InvalidSteering(f"the model takes no such image: {error}", field="messages") from error


def join_image_inputs(parts: Sequence[ImageInputs]) -> dict[str, Tensor]:
    """Image inputs of several prompts as those of one batch; empty where no prompt has an image."""
    parts = [part for part in parts if part]
    return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}
