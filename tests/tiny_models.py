"""Tiny real checkpoints and artifacts: random weights, true classes, true processors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from steering.artifact import Artifact, Canary, save_artifact
from steering.artifact_config import ArtifactConfig, BaseModelInfo
from steering.auxiliary_autoencoder import AuxiliaryAutoencoder
from steering.engines.huggingface.canary import pool_prompt
from steering.lvlm.decoder_layers import find_decoder
from steering.lvlm.families import find_family, tokens_per_image
from steering.lvlm.token_spans import expand_image_tokens
from steering.settings import Preset
from steering.sparse_autoencoder import VisionLanguageSAE

SPECIAL_TOKENS = ["<s>", "</s>", "<unk>", "<pad>", "<image>"]
LLAVA_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and LLaVA's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def save_tiny_llava(folder: Path, *, num_kv_heads: int = 4, hidden_size: int = 32, seed: int = 0) -> Path:
    """A random LLaVA of 5 layers, 4 heads, 4 image tokens, under llava-1.5-7b-hf's key names.

    Weights are large enough that tokens depend on everything. D 128 (heads of 32) is the smallest vLLM takes on CPU.
    """
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=2 * hidden_size, num_hidden_layers=5,
        num_attention_heads=4, num_key_value_heads=num_kv_heads, max_position_embeddings=256,
        initializer_range=0.2 * (32 / hidden_size) ** 0.5, bos_token_id=256, eos_token_id=257, pad_token_id=259,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=260, vision_feature_layer=-2)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = 257
    save_published(folder, model, _published_name)
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=LLAVA_CHAT_TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def drawn_image(seed: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """Noise, reproducibly."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def tiny_presets() -> dict[str, Preset]:
    """One preset per thing a test wants to vary from; 'captions' is the default."""
    return {
        "captions": Preset(form="difference", alpha=2.0),
        "questions": Preset(form="difference", alpha=1.0, beta_up=0.0, beta_down=1.0),
        "off": Preset(strength=0.0),
        "paper_pope": Preset(form="published", alpha=0.8, gamma=0.6, plausibility=0.8),
        "paper_chair": Preset(form="published", alpha=0.7, gamma=0.6, plausibility=0.8),
    }


def save_tiny_artifact(folder: Path, model_folder: Path, *, seed: int = 0, min_text_tokens: int = 1) -> Path:
    """Random VL-SAE for a checkpoint, at layer num_layers - 2, with a canary read from the model."""
    model = AutoModelForImageTextToText.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="sdpa")
    processor = AutoProcessor.from_pretrained(model_folder)
    decoder = find_decoder(model)
    torch.manual_seed(seed)
    hidden, layers, shared, concepts, active = decoder.hidden_size, len(decoder.layers), 24, 96, 8
    auxiliary = AuxiliaryAutoencoder(hidden, shared)
    torch.nn.init.orthogonal_(auxiliary.vision_projection.weight)
    auxiliary.text_projection.load_state_dict(auxiliary.vision_projection.state_dict())
    sae = _scattered_sae(shared, concepts, active)
    images = [drawn_image(index) for index in range(4)]
    content = [{"type": "image"}, {"type": "text", "text": "scene"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    prompt = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    pooled = []
    for image in images:
        expanded = expand_image_tokens(prompt, model.config.image_token_id, tokens_per_image(processor, [image]))
        inputs = find_family(decoder.family).image_inputs(processor.image_processor, [image])
        pooled.append(pool_prompt(model, decoder, expanded, inputs, layers - 2))
    config = ArtifactConfig(
        base_model=BaseModelInfo(name="tiny"), family=decoder.family, hidden_size=hidden, num_layers=layers,
        hook_layer=layers - 2, shared_size=shared, num_concepts=concepts, active_concepts=active,
        min_text_tokens=min_text_tokens, presets=tiny_presets(), canary_synthetic=False,
        alignment={"paired_overlap": 0.5, "stranger_overlap": 0.2, "overlap_beyond_chance": 0.25, "pairs": 500.0},
        faithfulness={"image_unexplained": 0.1, "text_unexplained": 0.2, "text_unexplained_free": 0.2},
    )  # fmt: skip
    with torch.no_grad():
        _centre_on(auxiliary, sae, pooled)
    artifact = Artifact(
        config=config, auxiliary=auxiliary, sae=sae,
        canary=Canary(
            images=tuple(images), token_ids=(tuple(prompt),) * 4,
            image_ND=torch.stack([v for v, _ in pooled]), text_ND=torch.stack([t for _, t in pooled]),
        ),
        control_image_MD=torch.randn(8, hidden, generator=torch.Generator().manual_seed(5)),
        concepts=tuple({"id": index, "label": f"concept {index}"} for index in range(concepts)),
    )  # fmt: skip
    save_artifact(folder, artifact)
    return folder


def _scattered_sae(shared: int, concepts: int, active: int) -> VisionLanguageSAE:
    """Drawn from a normal distribution, with which the parity tests' cases are free of near ties."""
    state = torch.get_rng_state()
    sae = VisionLanguageSAE(shared, concepts, active)
    torch.set_rng_state(state)
    with torch.no_grad():
        sae.encoder.copy_(torch.randn(concepts, shared) / shared**0.5)
        for decoder in (sae.vision_decoder, sae.text_decoder):
            decoder.reset_parameters()
    return sae


def _centre_on(auxiliary: AuxiliaryAutoencoder, sae: VisionLanguageSAE, pooled: list) -> None:
    """Biases that give the canary's mean back: random decoders would fail the reconstruction check."""
    for decoder in (sae.vision_decoder, sae.text_decoder, auxiliary.vision_decoder, auxiliary.text_decoder):
        torch.nn.init.normal_(decoder.weight, std=0.2)
    image_ND, text_ND = (torch.stack(states) for states in zip(*pooled, strict=True))
    again_v, again_t = auxiliary.reconstruct(*sae(*auxiliary(image_ND, text_ND)))
    auxiliary.vision_decoder.bias.add_((image_ND - again_v).mean(0))
    auxiliary.text_decoder.bias.add_((text_ND - again_t).mean(0))


def sentencepiece_like_tokenizer() -> PreTrainedTokenizerFast:
    """Llama's vocabulary layout: specials 0-2, bytes 3-258, then pieces with U+2581; <image> 32000, <pad> 32001."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [chr(code) for code in range(33, 127)]
    pieces += [f"<unused_{index}>" for index in range(32000 - len(pieces))]
    backend = Tokenizer(
        models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], unk_token="<unk>",
                   fuse_unk=True, byte_fallback=True)
    )  # fmt: skip
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    for token in ("<unk>", "<s>", "</s>", "<image>", "<pad>"):
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def save_published_llava(folder: Path, *, seed: int = 0) -> Path:
    """A tiny random checkpoint in llava-1.5-7b-hf's published layout.

    Its key names, several shards with an index, float16, 336 px in patches of 14 (576 image tokens), vocabulary
    32064 with <image> at 32000, context 4096 and its chat template.
    """
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14,
        projection_dim=16,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=32064, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=4096, initializer_range=0.2, rms_norm_eps=1e-5,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=32000, vision_feature_layer=-2, image_seq_length=576
    )
    model = LlavaForConditionalGeneration(config).half()
    folder.mkdir(parents=True)
    _save_shards(folder, {_published_name(name): value for name, value in model.state_dict().items()})
    description = config.to_dict() | {"architectures": ["LlavaForConditionalGeneration"], "dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(description, default=str))
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32001}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        tokenizer=sentencepiece_like_tokenizer(), patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=LLAVA_CHAT_TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_published(folder: Path, model: PreTrainedModel, published_name: Callable[[str], str]) -> None:
    """Weights in one file under the names of the published checkpoint, and the model's configurations."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {published_name(name): value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def _published_name(name: str) -> str:
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


def _save_shards(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 3) -> None:
    names, index = sorted(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[shard::shards]
        save_file({name: tensors[name].contiguous() for name in mine}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(mine, file)
    size = sum(value.nbytes for value in tensors.values())
    description = {"metadata": {"total_size": size}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(description))
