"""The bundled CLIP through open_clip's own loading: what any later stage does with it."""

import random
from itertools import islice

import torch

from training.clip_model import load_clip
from training.miniature.drawing import draw_scene
from training.miniature.language import Noise, caption
from training.miniature.paths import CLIP
from training.miniature.world import scenes


def test_captions_find_their_pictures():
    """A tokenizer that pads on the wrong side leaves a fifth of this."""
    clip, drawn, draw = load_clip(CLIP), list(islice(scenes("dev", start=5_000), 64)), random.Random(0)
    images = clip.embed_images([draw_scene(scene) for scene in drawn])
    cosines = images @ clip.embed_texts([caption(scene, Noise(), draw) for scene in drawn]).T
    own = torch.arange(len(drawn))
    assert (cosines.argmax(1) == own).float().mean() > 0.95
    assert (cosines.argmax(0) == own).float().mean() > 0.95
