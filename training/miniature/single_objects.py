"""Pictures of a single object, to be named by its shape: harder for the miniature's CLIP than it looks, as it has only
ever seen scenes of three to five."""

from __future__ import annotations

import random
from collections.abc import Iterator

from training.labelled_images import Classes, LabelledImage
from training.miniature.drawing import draw_scene
from training.miniature.world import COLORS, GRID_SIDE, SEED_RANGES, SHAPES, Scene, SceneObject

SHAPE_CLASSES = Classes(
    labels=SHAPES,
    names=tuple((f"{'an' if shape[0] in 'aeiou' else 'a'} {shape}",) for shape in SHAPES),
    templates=tuple(f"There is {{}} in {color}." for color in COLORS),
)
"""A shape is called what captions call it, in every colour."""


def single_object(seed: int) -> Scene:
    """The picture with this seed: shape, colour and place at random."""
    draw = random.Random(f"single object {seed}")
    item = SceneObject(shape=draw.choice(SHAPES), color=draw.choice(COLORS), cell=draw.randrange(GRID_SIDE**2))
    return Scene(seed=seed, objects=(item,))


def single_objects(count: int) -> Iterator[LabelledImage]:
    """Pictures of a seed range of their own."""
    for seed in SEED_RANGES["zero_shot"][:count]:
        scene = single_object(seed)
        yield LabelledImage(draw_scene(scene), SHAPES.index(scene.objects[0].shape))
