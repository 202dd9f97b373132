"""The bundled CLIP through open_clip's own loading: what any later stage does with it."""

import random
from itertools import islice

import open_clip
import pytest
import torch

from training.miniature.drawing import draw_scene
from training.miniature.language import Noise, caption
from training.miniature.paths import CLIP
from training.miniature.world import scenes


@pytest.mark.skipif(not CLIP.exists(), reason="the miniature is not built")
@torch.no_grad()
def test_captions_find_their_pictures():
    """A tokenizer that pads on the wrong side leaves a fifth of this."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{CLIP}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{CLIP}")
    drawn, draw = list(islice(scenes("dev", start=5_000), 64)), random.Random(0)
    pixels = torch.stack([preprocess(draw_scene(scene)) for scene in drawn])  # pyright: ignore
    tokens = tokenize([caption(scene, Noise(), draw) for scene in drawn])
    cosines = model.eval().encode_image(pixels, normalize=True) @ model.encode_text(tokens, normalize=True).T
    own = torch.arange(len(drawn))
    assert (cosines.argmax(1) == own).float().mean() > 0.95
    assert (cosines.argmax(0) == own).float().mean() > 0.95
