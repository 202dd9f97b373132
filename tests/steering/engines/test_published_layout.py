"""A checkpoint in llava-1.5-7b-hf's published layout takes the same path as any other."""

from __future__ import annotations

import json

import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

from steering.engines.huggingface.engine import HuggingFaceEngine
from tests.steering.engines.driving import ask, make_request


def test_every_published_weight_is_loaded(published_llava):
    index = json.loads((published_llava / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) == 3
    model = AutoModelForImageTextToText.from_pretrained(published_llava, dtype=torch.float16)
    name = "vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight"
    with safe_open(published_llava / index[name], "pt") as file:
        stored = file.get_tensor(name)
    loaded = dict(model.named_parameters())
    key = next(key for key in loaded if key.endswith("encoder.layers.1.mlp.fc1.weight"))
    assert torch.equal(loaded[key], stored)
    assert len(loaded) == len(index)


async def test_it_is_served_with_576_image_tokens(published_llava, published_artifact):
    engine = HuggingFaceEngine(published_llava, published_artifact)
    await engine.start()
    steered = await ask(engine, "what is this?", steering={"strength": 1.0}, max_tokens=5, top_logprobs=5)
    plain = await ask(engine, "what is this?", steering={"strength": 0.0}, max_tokens=5, top_logprobs=5)
    prompt = make_request(engine, "what is this?").prompt_token_ids
    await engine.stop()
    assert steered.end.prompt_tokens == len(prompt) - 1 + 576
    assert steered.end.receipt.applied
    assert steered.end.receipt.positions[0] >= len(prompt) - prompt.index(32000) - 1
    assert steered.logprobs()[0] != plain.logprobs()[0]
