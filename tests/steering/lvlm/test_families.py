"""What differs between the families: how many tokens an image gets, where they stand, and what positions follow."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText

from steering.engines.checkpoint import read_checkpoint
from steering.engines.preparation import expand_prompt
from steering.errors import BadArtifact, InvalidSteering
from steering.lvlm.decoder_layers import embed_prompt, place_prompt
from steering.lvlm.families import context_limit, find_family, join_image_inputs, tokens_per_image
from steering.lvlm.token_spans import find_spans
from tests.steering.engines.driving import chat_text
from tests.tiny_models import drawn_image

SIZES = [(), ((24, 20),), ((100, 31),), ((31, 100), (64, 64)), ((7, 9), (333, 120))]
"""Images of a prompt, width and height each."""


@pytest.fixture(scope="module")
def checkpoint(tiny_family):
    return read_checkpoint(str(tiny_family), None, None)


@pytest.fixture(scope="module")
def model(tiny_family) -> Any:
    return AutoModelForImageTextToText.from_pretrained(tiny_family, dtype=torch.float32).eval()


def as_the_processor_makes_it(checkpoint, sizes):
    """Prompt ids with one token per image, the images, and what the checkpoint's own processor makes of both."""
    images = [drawn_image(index, size) for index, size in enumerate(sizes)]
    text = chat_text(checkpoint.processor, len(images), "what is this?")
    made = checkpoint.processor(images=images or None, text=[text], add_special_tokens=False, return_tensors="pt")
    return checkpoint.processor.tokenizer(text, add_special_tokens=False)["input_ids"], images, made


def test_every_published_weight_is_loaded(tiny_family):
    loaded: Any = AutoModelForImageTextToText.from_pretrained(tiny_family, output_loading_info=True)
    report = loaded[1]
    assert report["missing_keys"] == report["unexpected_keys"] == report["mismatched_keys"] == set()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_prompt_is_expanded_as_the_processor_expands_it(checkpoint, sizes):
    prompt, images, made = as_the_processor_makes_it(checkpoint, sizes)
    expected = made["input_ids"][0].tolist()
    expanded = expand_prompt(checkpoint, images, prompt)
    assert expanded == expected
    spans = find_spans(expanded, checkpoint.image_token_id)
    image_positions = [index for index, token in enumerate(expected) if token == checkpoint.image_token_id]
    assert list(spans.image_positions) == image_positions
    assert spans.text_start == (image_positions[-1] + 1 if sizes else None)
    if sizes:
        question = expected[image_positions[-1] + 1 :]
        assert checkpoint.image_token_id not in question
        assert "what is this?" in checkpoint.processor.tokenizer.decode(question)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 300), st.integers(1, 300))
def test_every_size_has_as_many_tokens_as_the_processor_writes(checkpoint, width, height):
    if max(width, height) > 200 * min(width, height):
        return
    text = chat_text(checkpoint.processor, 1, "")
    image = drawn_image(0, (width, height))
    made = checkpoint.processor(images=[image], text=[text])["input_ids"][0]
    assert tokens_per_image(checkpoint.processor, [image]) == [list(made).count(checkpoint.image_token_id)]


@pytest.mark.parametrize("sizes", SIZES[1:], ids=str)
def test_prompts_of_a_batch_are_embedded_and_placed_as_each_alone(checkpoint, model, sizes):
    """Rows: these images, none, one more; against the model's own `generate` preparation of every row."""
    family = find_family(checkpoint.family)
    rows = [as_the_processor_makes_it(checkpoint, one) for one in (sizes, (), ((90, 29),))]
    ids = [made["input_ids"][0] for _, _, made in rows]
    ids_BT = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    image_BT = ids_BT == checkpoint.image_token_id
    inputs = join_image_inputs(
        [family.image_inputs(checkpoint.processor.image_processor, images) if images else {} for _, images, _ in rows]
    )
    with torch.no_grad():
        embeds_BTD = embed_prompt(model, ids_BT, image_BT, inputs)
    rotary, shift_B = place_prompt(model, ids_BT, image_BT, inputs)
    for row, (_, _, made) in enumerate(rows):
        expected_TD, expected_positions, expected_next = first_layer_input(model, made)
        length = len(ids[row])
        torch.testing.assert_close(embeds_BTD[row, :length], expected_TD, atol=1e-4, rtol=0)
        assert torch.equal(rotary[..., row, :length], expected_positions)
        assert int(shift_B[row]) + length == expected_next


def first_layer_input(model, made):
    """Embeddings [T, D], rotary positions and the next token's position, from inside the model's own `generate`."""
    seen: list[dict] = []
    text = model.model.language_model
    handles = [
        text.layers[0].register_forward_pre_hook(lambda _module, args: seen.append({"hidden": args[0][0]})),
        text.rotary_emb.register_forward_pre_hook(
            lambda _module, args, kwargs: seen.append({"positions": kwargs.get("position_ids", args[-1])}),
            with_kwargs=True,
        ),
    ]
    try:
        model.generate(**made, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    finally:
        for handle in handles:
            handle.remove()
    hidden = [one["hidden"] for one in seen if "hidden" in one]
    positions = [one["positions"][..., 0, :] for one in seen if "positions" in one]
    assert len(set(positions[1].flatten().tolist())) == 1
    return hidden[0], positions[0], int(positions[1].max())


def test_only_multimodal_positions_shift(checkpoint, model):
    _, images, made = as_the_processor_makes_it(checkpoint, ((100, 60),))
    ids_1T = made["input_ids"]
    image_1T = ids_1T == checkpoint.image_token_id
    inputs = find_family(checkpoint.family).image_inputs(checkpoint.processor.image_processor, images)
    placed = place_prompt(model, ids_1T, image_1T, inputs)
    if checkpoint.family == "qwen2_5_vl":
        assert placed.rotary_BT.shape == (3, *ids_1T.shape)
        assert int(placed.shift_B[0]) < 0
    else:
        assert placed.rotary_BT.shape == ids_1T.shape
        assert int(placed.shift_B[0]) == 0


def test_an_image_that_the_processor_refuses_is_the_caller_s_error(checkpoint):
    stripe = drawn_image(0, (402, 2))
    if checkpoint.family != "qwen2_5_vl":
        assert tokens_per_image(checkpoint.processor, [stripe]) == [16]
        return
    with pytest.raises(InvalidSteering, match="aspect ratio") as caught:
        tokens_per_image(checkpoint.processor, [stripe])
    assert caught.value.field == "messages"


def test_a_processor_that_belongs_to_another_model_is_noticed(checkpoint, model):
    _, images, made = as_the_processor_makes_it(checkpoint, ((64, 40),))
    family = find_family(checkpoint.family)
    other = family.image_inputs(checkpoint.processor.image_processor, [*images, drawn_image(1)])
    image_1T = made["input_ids"] == checkpoint.image_token_id
    with pytest.raises(BadArtifact, match="do not belong together"), torch.no_grad():
        embed_prompt(model, made["input_ids"], image_1T, other)


def test_an_unknown_family_is_told_the_known_ones(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vipllava"}))
    with pytest.raises(BadArtifact, match=r"'vipllava'.*llava.*llava_next.*qwen2_5_vl") as caught:
        read_checkpoint(str(tmp_path), None, None)
    assert caught.value.field == "model"


def test_an_answer_ends_where_the_family_ends_it(checkpoint):
    ends = {"llava_next": {"</s>"}, "qwen2_5_vl": {"<|im_end|>", "<|endoftext|>"}}[checkpoint.family]
    assert set(checkpoint.processor.tokenizer.convert_ids_to_tokens(sorted(checkpoint.end_tokens))) == ends


def test_a_context_is_no_longer_than_a_sliding_window(model):
    text = model.config.get_text_config()
    assert context_limit(text) == 512
    text.sliding_window = 100
    assert context_limit(text) == 100
    text.sliding_window = None
