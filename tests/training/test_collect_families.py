"""Stage 1 on LLaVA-NeXT and Qwen2.5-VL: images of different shapes in one batch, each family's own prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from steering.hooks import output_hook
from tests.tiny_models import drawn_image
from training.collect_representations import CollectionSettings, Pair, collect, fill_prompt

PAIRS = [
    Pair(image=drawn_image(index, size), text=text, reference=str(index))
    for index, (size, text) in enumerate([((24, 20), "a star"), ((100, 31), "a circle in red"), ((60, 90), "none")])
]


@pytest.fixture(scope="module")
def loaded(tiny_family) -> tuple[Any, Any]:
    model = AutoModelForImageTextToText.from_pretrained(tiny_family, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(tiny_family)


def test_the_prompt_is_the_family_s_own(loaded):
    model, processor = loaded
    expected = {
        "llava_next": "USER: <image>\na star ASSISTANT:",
        "qwen2_5_vl": (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            "<|vision_start|><|image_pad|><|vision_end|>a star<|im_end|>\n<|im_start|>assistant\n"
        ),
    }
    assert fill_prompt(processor, model.config.model_type, "a star") == expected[model.config.model_type]


def test_pooling_in_a_batch_is_that_of_a_full_forward_alone(loaded):
    model, processor = loaded
    found = collect(model, processor, PAIRS, CollectionSettings(layers=(1, 3), batch_size=3))
    for layer in (1, 3):
        for row, pair in enumerate(PAIRS):
            image_D, text_D = pooled_by_hooks(model, processor, pair, layer)
            torch.testing.assert_close(found[layer].image_ND[row], image_D, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(found[layer].text_ND[row], text_D, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def pooled_by_hooks(model, processor, pair, layer):
    text = fill_prompt(processor, model.config.model_type, pair.text)
    inputs = processor(images=[pair.image], text=[text], return_tensors="pt")
    seen = []
    with output_hook(model.model.language_model.layers[layer], lambda states: seen.append(states) or states):
        model(**inputs)
    image = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    return seen[0][0, image].mean(0), seen[0][0, image[-1] + 1 :].mean(0)
