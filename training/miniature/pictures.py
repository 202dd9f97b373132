"""Scenes as model input, in bulk: draws them and runs them through the real image processor."""

from collections.abc import Sequence

import torch
from torch import Tensor

from training.miniature.drawing import draw_scene
from training.miniature.processor import build_image_processor
from training.miniature.world import Scene

CHUNK = 512


def pixels_of(scenes: Sequence[Scene]) -> Tensor:
    """Pixel values [N, 3, side, side] in float16, as the processor gives them."""
    processor = build_image_processor()
    chunks = []
    for start in range(0, len(scenes), CHUNK):
        pictures = [draw_scene(scene) for scene in scenes[start : start + CHUNK]]
        chunks.append(processor(images=pictures, return_tensors="pt")["pixel_values"].half())
    return torch.cat(chunks)
