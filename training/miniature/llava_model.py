"""The miniature LLaVA as a model: its sizes, its vision tower from CLIP, and its checkpoint on disk.

A plain `LlavaForConditionalGeneration` with a CLIP tower and a Llama, saved in the layout of llava-1.5-7b-hf.
Knows nothing of scenes and training.
"""

import copy
from pathlib import Path

import torch
from open_clip import CLIP
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from training.miniature.clip_training import MODEL_CONFIG
from training.miniature.processor import IMAGE_TOKENS, build_processor

HIDDEN = 128
LAYERS = 5

PUBLISHED_PREFIXES = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.vision_tower.vision_model.": "vision_tower.vision_model.",
    "model.vision_tower.": "vision_tower.vision_model.",
}
"""Names in memory to names on disk; the first that fits counts."""


def build_llava(clip: CLIP, *, hidden: int = HIDDEN, layers: int = LAYERS) -> LlavaForConditionalGeneration:
    """A LLaVA with CLIP's vision tower; everything behind the tower is untrained."""
    tokenizer = build_processor().tokenizer
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        **ids,
    )
    config = LlavaConfig(
        vision_config=vision_config(),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**ids)
    model.model.vision_tower.load_state_dict(vision_tower_weights(clip))
    return model.eval()


def vision_config() -> CLIPVisionConfig:
    """CLIP's vision tower as transformers describes it."""
    vision = MODEL_CONFIG["vision_cfg"]
    return CLIPVisionConfig(
        hidden_size=vision["width"],
        intermediate_size=int(vision["width"] * vision["mlp_ratio"]),
        num_hidden_layers=vision["layers"],
        num_attention_heads=vision["width"] // vision["head_width"],
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        projection_dim=MODEL_CONFIG["embed_dim"],
        hidden_act="quick_gelu",
    )


def vision_tower_weights(clip: CLIP) -> dict[str, Tensor]:
    """open_clip's vision tower under the names of transformers' CLIPVisionModel."""
    source = clip.visual.state_dict()
    weights = {
        "embeddings.class_embedding": source["class_embedding"],
        "embeddings.patch_embedding.weight": source["conv1.weight"],
        "embeddings.position_embedding.weight": source["positional_embedding"],
    }
    renamed = {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}
    for old, new in renamed.items():
        weights |= {f"{new}.{kind}": source[f"{old}.{kind}"] for kind in ("weight", "bias")}
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    parts |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for layer in range(MODEL_CONFIG["vision_cfg"]["layers"]):
        old_block, new_block = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            for old, new in parts.items():
                weights[f"{new_block}.{new}.{kind}"] = source[f"{old_block}.{old}.{kind}"]
            joint = source[f"{old_block}.attn.in_proj_{kind}"].chunk(3)
            for name, tensor in zip("qkv", joint, strict=True):
                weights[f"{new_block}.self_attn.{name}_proj.{kind}"] = tensor
    prefix = "vision_model." if _tower_has_prefix() else ""
    return {prefix + name: tensor.clone() for name, tensor in weights.items()}


def save_llava(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Checkpoint and processor, in bfloat16, under llava-1.5-7b-hf's names; the model itself is left as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {published_name(name): tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    build_processor().save_pretrained(folder)


def published_name(name: str) -> str:
    """A weight's name in llava-1.5-7b-hf's files."""
    for inside, published in PUBLISHED_PREFIXES.items():
        if name.startswith(inside):
            return published + name.removeprefix(inside)
    raise ValueError(f"no published name for the weight {name!r}; add its prefix to PUBLISHED_PREFIXES")


def load_llava(folder: Path) -> LlavaForConditionalGeneration:
    """The checkpoint in float32, ready for inference."""
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def _tower_has_prefix() -> bool:
    """Some releases of transformers wrap the tower's modules in `vision_model`."""
    with torch.device("meta"):
        tower = CLIPVisionModel(vision_config())
    return next(iter(tower.state_dict())).startswith("vision_model.")
