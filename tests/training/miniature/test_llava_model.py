import json
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoProcessor

from training.miniature.clip_training import build_clip
from training.miniature.llava_model import build_llava, load_llava, save_llava


def test_the_vision_tower_is_clip_s():
    torch.manual_seed(0)
    clip: Any = build_clip().eval()
    tower = build_llava(clip).model.vision_tower
    pixels = torch.randn(2, 3, 48, 48)
    kept = []
    handle = clip.visual.transformer.resblocks[-2].register_forward_hook(lambda *args: kept.append(args[-1]))
    with torch.no_grad():
        clip.encode_image(pixels)
        states = tower(pixels, output_hidden_states=True).hidden_states[-2]
    handle.remove()
    torch.testing.assert_close(states, kept[0], atol=1e-5, rtol=1e-5)


def test_a_checkpoint_has_the_published_layout_and_comes_back(untrained_llava, tmp_path):
    save_llava(untrained_llava, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
        dtypes = {file.get_tensor(name).dtype for name in names}
    assert dtypes == {torch.bfloat16}
    assert {
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "multi_modal_projector.linear_1.weight",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
    } <= names
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = load_llava(tmp_path)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, untrained_llava.state_dict()[name].bfloat16().float()), name
    assert AutoProcessor.from_pretrained(tmp_path).chat_template


def test_it_is_small(untrained_llava):
    assert untrained_llava.num_parameters() < 2_000_000
    assert untrained_llava.config.text_config.max_position_embeddings >= 512
