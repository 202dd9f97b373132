"""A LLaVA of any shape with random weights, and a random artifact for it: what a benchmark of speed needs.

The checkpoint has llava-1.5-7b-hf's published layout (key names, shards with an index) and is written tensor by tensor,
so that neither a slow initialisation nor the memory for a second copy stands between a shape and its numbers. The
answers mean nothing, and never end by themselves: the head's rows of special tokens and single bytes are zero, so that
greedy decoding never picks them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from steering.artifact import Artifact, Canary, save_artifact
from steering.artifact_config import ArtifactConfig, BaseModelInfo
from steering.auxiliary_autoencoder import AuxiliaryAutoencoder
from steering.settings import Preset
from steering.sparse_autoencoder import VisionLanguageSAE

SPECIAL_TOKENS = ["<s>", "</s>", "<unk>", "<pad>", "<image>"]
NEVER_GENERATED = 256 + len(SPECIAL_TOKENS)
"""Token ids below are single bytes and special tokens."""
PATCH = 14
"""Pixels along a patch's side, as in LLaVA-1.5's vision tower."""
IMAGE_MARK = "<image>"
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class LlavaShape:
    """Everything about a LLaVA and its VL-SAE that decides how long it takes."""

    layers: int
    """Decoder layers; the last but one is the hook layer."""
    hidden: int
    """D, and S of the VL-SAE."""
    head_size: int
    """The decoder has hidden / head_size heads."""
    kv_heads: int
    intermediate: int
    """Width of the decoder's MLPs."""
    vocabulary: int
    concepts: int
    """K."""
    active_concepts: int
    """k."""
    image_size: int
    """Pixels along the image's side; (image_size / 14)^2 image tokens."""

    def __post_init__(self) -> None:
        for value, divisor, what in (
            (self.hidden, self.head_size, "hidden must be a multiple of head size"),
            (self.hidden // self.head_size, self.kv_heads, "the number of heads must be a multiple of kv heads"),
            (self.image_size, PATCH, f"image size must be a multiple of {PATCH}"),
        ):
            if value % divisor:
                raise ValueError(f"{what}: {value} is not one of {divisor}")
        if self.vocabulary <= NEVER_GENERATED:
            raise ValueError(f"the vocabulary must have more than {NEVER_GENERATED} tokens, not {self.vocabulary}")

    @property
    def heads(self) -> int:
        return self.hidden // self.head_size

    @property
    def image_tokens(self) -> int:
        return (self.image_size // PATCH) ** 2

    @property
    def pooling_layers(self) -> int:
        """Caches that pooling adds: each holds kv_heads * head_size columns of D."""
        return math.ceil(self.hidden / (self.kv_heads * self.head_size))

    def cache_bytes(self, dtype: str) -> int:
        """Keys and values of one token in one layer, in bytes."""
        return 2 * self.kv_heads * self.head_size * ITEM_BYTES[dtype]

    def __str__(self) -> str:
        return (
            f"{self.layers} layers of {self.hidden}, {self.heads} heads of {self.head_size}, {self.kv_heads} kv heads, "
            f"MLP {self.intermediate}, vocabulary {self.vocabulary}, K {self.concepts}, k {self.active_concepts}, "
            f"{self.image_tokens} image tokens"
        )


def save_random_llava(
    folder: Path, shape: LlavaShape, *, dtype: str = "float32", max_tokens: int = 2048, device: str = "cpu"
) -> Path:
    """Checkpoint in the published layout, one shard per decoder layer; `max_tokens` is its context.

    `device`: where the weights are drawn; on a CPU the 7 G of LLaVA-1.5-7B take minutes.
    """
    torch.manual_seed(0)
    config = _config(shape, max_tokens)
    folder.mkdir(parents=True)
    index: dict[str, str] = {}
    for number, tensors in enumerate(_shards(config, shape, getattr(torch, dtype), device)):
        file = f"model-{number + 1:05d}-of-{shape.layers + 1:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    description = config.to_dict() | {"architectures": ["LlavaForConditionalGeneration"], "dtype": dtype}
    (folder / "config.json").write_text(json.dumps(description, default=str))
    ends = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 259}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    side = shape.image_size
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer=_tokenizer(shape.vocabulary), patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_random_artifact(folder: Path, shape: LlavaShape, *, device: str = "cpu") -> Path:
    """Random VL-SAE at layer `layers - 2`. Its canary is random too, and says so (`canary_synthetic`)."""
    torch.manual_seed(0)
    preset = Preset(form="difference", alpha=1.0, beta_up=0.9, beta_down=0.9)
    config = ArtifactConfig(
        base_model=BaseModelInfo(name="random"), family="llava", hidden_size=shape.hidden, num_layers=shape.layers,
        hook_layer=shape.layers - 2, shared_size=shape.hidden, num_concepts=shape.concepts,
        active_concepts=shape.active_concepts, presets={"captions": preset}, canary_synthetic=True,
        alignment={"paired_overlap": 0.0, "shuffled_overlap": 0.0, "recall_at_1": 0.0},
    )  # fmt: skip
    prompt = tuple(_tokenizer(shape.vocabulary)(f"{IMAGE_MARK}x", add_special_tokens=False)["input_ids"])
    with torch.device(device):
        auxiliary = AuxiliaryAutoencoder(shape.hidden, shape.hidden)
        sae = VisionLanguageSAE(shape.hidden, shape.concepts, shape.active_concepts)
    artifact = Artifact(
        config=config,
        auxiliary=auxiliary.cpu(),
        sae=sae.cpu(),
        canary=Canary(
            images=(noise(0, shape.image_size),), token_ids=(prompt,),
            image_ND=torch.randn(1, shape.hidden), text_ND=torch.randn(1, shape.hidden),
        ),
        control_image_MD=torch.randn(1, shape.hidden),
    )  # fmt: skip
    save_artifact(folder, artifact)
    return folder


def noise(seed: int, side: int) -> Image.Image:
    """A picture that no other seed gives."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (side, side, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def describe(shape: LlavaShape) -> dict[str, Any]:
    """For a manifest."""
    return asdict(shape) | {
        "heads": shape.heads,
        "image_tokens": shape.image_tokens,
        "pooling_layers": shape.pooling_layers,
    }


def _config(shape: LlavaShape, max_tokens: int) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        image_size=shape.image_size, patch_size=PATCH,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size, max_position_embeddings=max_tokens, bos_token_id=256, eos_token_id=257,
        pad_token_id=259,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=260, vision_feature_layer=-2,
        image_seq_length=shape.image_tokens,
    )  # fmt: skip


def _shards(config: LlavaConfig, shape: LlavaShape, dtype: torch.dtype, device: str) -> Iterator[dict[str, Tensor]]:
    """Random weights: decoder layer by decoder layer, then all the rest."""
    with torch.device("meta"):
        wanted = {name: value.shape for name, value in LlavaForConditionalGeneration(config).state_dict().items()}
    layers = [f"model.language_model.layers.{number}." for number in range(shape.layers)]
    for prefix in layers:
        names = [name for name in wanted if prefix in name]
        yield {_published(name): _random(name, wanted.pop(name), dtype, device) for name in names}
    yield {_published(name): _random(name, size, dtype, device) for name, size in wanted.items()}


def _random(name: str, size: torch.Size, dtype: torch.dtype, device: str) -> Tensor:
    """Scaled so that states keep their magnitude from layer to layer; norms at one."""
    if len(size) == 1:
        is_scale = "norm" in name and name.endswith("weight")
        return torch.ones(size, dtype=dtype) if is_scale else torch.zeros(size, dtype=dtype)
    value = (torch.randn(size, dtype=dtype, device=device) * size[-1] ** -0.5).cpu()
    if name == "lm_head.weight":
        value[:NEVER_GENERATED] = 0
    return value


def _published(name: str) -> str:
    """Parameter names of the class to those of the published files."""
    for ours, published in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ):
        if name.startswith(ours):
            return published + name.removeprefix(ours).removeprefix("vision_model.")
    raise ValueError(f"no published name is known for {name}")


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token per byte, LLaVA's special tokens, and filler up to the vocabulary's size."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    filler = [f"word{index}" for index in range(vocabulary - NEVER_GENERATED)]
    ids = {piece: index for index, piece in enumerate([*pieces, *SPECIAL_TOKENS, *filler])}
    backend = Tokenizer(models.BPE(vocab=ids, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        extra_special_tokens={"image_token": IMAGE_MARK},
    )  # fmt: skip
