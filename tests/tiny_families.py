"""Tiny random checkpoints of the families beside LLaVA, in their published layouts, with their own processors.

Heads of 32 and names as published: transformers and vLLM load them. Weights are large enough that tokens depend on
everything, the image's places included.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from tests.tiny_models import byte_tokenizer, save_published

HIDDEN = 128
INITIALIZER_RANGE = 0.1
LLAVA_NEXT_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'][0]['text'] }}{% else %}"
    "{{ message['role'].upper() + ': '}}{% endif %}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{# Render all text next #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
QWEN_SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
QWEN_CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tiny_llava_next(folder: Path, seed: int = 0) -> Path:
    """Layout of llava-v1.6-vicuna-7b-hf: tiles of 16 px in 4 x 4 patches, the published grids in proportion.

    An image gets 16 tokens for itself in small and up to 8 x 9 or 4 x 13 for its tiles, newlines included.
    """
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    side, patch = 16, 4
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=side,
        patch_size=patch, projection_dim=16, initializer_range=0.2,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=5,
        num_attention_heads=4, max_position_embeddings=512, initializer_range=INITIALIZER_RANGE, rms_norm_eps=1e-5,
        bos_token_id=256, eos_token_id=257, pad_token_id=259,
    )  # fmt: skip
    grids = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side], [3 * side, side], [side, 3 * side]]
    config = LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_index=260, vision_feature_layer=-2,
        image_grid_pinpoints=grids, image_seq_length=(side // patch) ** 2,
    )  # fmt: skip
    model = LlavaNextForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.image_newline)
    model.generation_config = GenerationConfig(bos_token_id=256, eos_token_id=257, pad_token_id=259)
    save_published(folder, model, _published_llava_next_name)
    LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_grid_pinpoints=grids
        ),
        tokenizer=tokenizer, patch_size=patch, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=LLAVA_NEXT_CHAT_TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def _published_llava_next_name(name: str) -> str:
    for ours, published in (
        ("model.image_newline", "image_newline"),
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ):
        if name.startswith(ours):
            return published + name.removeprefix(ours)
    raise ValueError(f"no published name is known for {name}")


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and Qwen2.5-VL's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in QWEN_SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def save_tiny_qwen2_5_vl(folder: Path, seed: int = 0) -> Path:
    """Layout of Qwen2.5-VL-7B-Instruct: a flat config.json, GQA (2 key-value heads of 4), M-RoPE, windowed vision.

    Patches of 14 px, merged 2 x 2; an image gets 4 to 24 tokens.
    """
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in QWEN_SPECIAL_TOKENS}
    vision = {
        "depth": 3, "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "in_chans": 3,
        "out_hidden_size": HIDDEN, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
        "window_size": 56, "fullatt_block_indexes": [1], "tokens_per_second": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    published = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"], "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"], "hidden_act": "silu", "hidden_size": HIDDEN,
        "initializer_range": INITIALIZER_RANGE, "intermediate_size": 2 * HIDDEN, "max_position_embeddings": 512,
        "max_window_layers": 5, "model_type": "qwen2_5_vl", "num_attention_heads": 4, "num_hidden_layers": 5,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 512,
        "tie_word_embeddings": False, "torch_dtype": "float32", "use_cache": True, "use_sliding_window": False,
        "vision_config": vision, "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "vocab_size": len(tokenizer),
    }  # fmt: skip
    config: Any = Qwen2_5_VLConfig(**json.loads(json.dumps(published)))
    config.vision_config.initializer_range = 0.2
    model = Qwen2_5_VLForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=INITIALIZER_RANGE)
    model.generation_config = GenerationConfig(
        bos_token_id=ids["<|endoftext|>"], pad_token_id=ids["<|endoftext|>"],
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
    )  # fmt: skip
    save_published(folder, model, _published_qwen_name)
    (folder / "config.json").write_text(json.dumps(published, indent=2) + "\n")
    size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 24}
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size), tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size), chat_template=QWEN_CHAT_TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def _published_qwen_name(name: str) -> str:
    for ours, published in (
        ("model.language_model.", "model."),
        ("model.visual.", "visual."),
        ("lm_head.", "lm_head."),
    ):
        if name.startswith(ours):
            return published + name.removeprefix(ours)
    raise ValueError(f"no published name is known for {name}")
