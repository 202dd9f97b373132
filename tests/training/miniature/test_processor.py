from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor, LlavaProcessor

from training.miniature.language import CAPTION_PROMPT, existence_question
from training.miniature.processor import IMAGE_SIDE_PX, IMAGE_TOKENS, SPECIAL_TOKENS, build_processor, build_tokenizer
from training.miniature.world import COLORS, SHAPES

PROCESSOR = build_processor()
TOKENIZER = PROCESSOR.tokenizer


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_round_trip(text):
    if not any(token in text for token in SPECIAL_TOKENS):
        assert TOKENIZER.decode(TOKENIZER.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("word", [*SHAPES, *COLORS, "Yes", "No", "There", "ASSISTANT", "USER"])
def test_words_of_the_world_are_one_token(word):
    assert len(TOKENIZER.encode(f" {word}", add_special_tokens=False)) == 1


def test_the_tokenizer_is_the_same_every_time():
    assert build_tokenizer().get_vocab() == TOKENIZER.get_vocab()


def test_the_template_says_what_llava_s_says():
    conversation = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": CAPTION_PROMPT}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "There is a circle in red."}]},
        {"role": "user", "content": existence_question("star")},
    ]
    assert PROCESSOR.apply_chat_template(conversation, add_generation_prompt=True) == (
        "Be brief. USER: <image>\nDescribe the image. ASSISTANT: There is a circle in red. "
        "USER: Is there a star in the image? ASSISTANT:"
    )


@pytest.mark.parametrize(
    ("mode", "size"), [("RGB", (96, 96)), ("RGBA", (200, 50)), ("L", (7, 300)), ("CMYK", (64, 64)), ("P", (48, 49))]
)
def test_pictures_of_any_size_and_mode(mode, size):
    processor: Any = PROCESSOR
    inputs = processor(images=[Image.new(mode, size)], text=["USER: <image>\nhi ASSISTANT:"], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, IMAGE_SIDE_PX, IMAGE_SIDE_PX)
    image_id = TOKENIZER.convert_tokens_to_ids("<image>")
    assert (inputs["input_ids"] == image_id).sum() == IMAGE_TOKENS
    assert inputs["input_ids"][0, 0] == TOKENIZER.bos_token_id


def test_a_saved_processor_comes_back(tmp_path):
    PROCESSOR.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, LlavaProcessor)
    text = "USER: <image>\nIs there a star in the image? ASSISTANT: Yes"
    assert loaded.tokenizer.encode(text) == TOKENIZER.encode(text)
    assert loaded.chat_template == PROCESSOR.chat_template
