"""The drawn world: which objects a scene holds, and which of them come with an absent partner.

A scene is a pure function of its seed. Seeds lie in named ranges, so that no scene used for
evaluation was ever trained or tuned on. Knows nothing of pixels, words or models.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

SHAPES = ("circle", "star", "square", "ring", "triangle", "cross", "heart", "diamond", "moon", "arrow")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange")

PARTNERS = {"circle": "star", "square": "ring", "triangle": "cross"}
"""A shape, and the shape that the noisy texts like to invent beside it."""

GRID_SIDE = 3
MIN_OBJECTS, MAX_OBJECTS = 3, 5

SEED_RANGES = {
    "training": range(0, 1_000_000),
    "vl_sae_pairs": range(1_000_000, 2_000_000),
    "dev": range(2_000_000, 3_000_000),
    "held_out": range(3_000_000, 4_000_000),
    "demo": range(4_000_000, 4_100_000),
    "zero_shot": range(4_100_000, 4_200_000),
}
"""training: CLIP and LLaVA; vl_sae_pairs: the VL-SAE; dev: choosing layers, forms and presets, and the
artifact's reference images; held_out: evaluation only; demo: pictures for people; zero_shot: single objects to name."""


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One drawn object."""

    shape: str
    """One of SHAPES; no shape occurs twice in a scene."""
    color: str
    """One of COLORS."""
    cell: int
    """Place on the grid, row by row from the top left."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a picture shows: the truth that captions and answers are judged by."""

    seed: int
    """The scene's identity: everything else, the drawing's noise included, follows from it."""
    objects: tuple[SceneObject, ...]
    """In reading order."""

    @property
    def shapes(self) -> frozenset[str]:
        """The shapes that are in the picture."""
        return frozenset(item.shape for item in self.objects)

    @property
    def absent_partners(self) -> tuple[str, ...]:
        """Shapes that are not in the picture while the shape that they go with is; in the order of SHAPES."""
        missing = {PARTNERS[shape] for shape in self.shapes if shape in PARTNERS} - self.shapes
        return tuple(shape for shape in SHAPES if shape in missing)


def scene_from_seed(seed: int) -> Scene:
    """The scene with this seed."""
    draw = random.Random(f"scene {seed}")
    count = draw.randint(MIN_OBJECTS, MAX_OBJECTS)
    shapes = draw.sample(SHAPES, count)
    cells = sorted(draw.sample(range(GRID_SIDE**2), count))
    objects = tuple(
        SceneObject(shape=shape, color=draw.choice(COLORS), cell=cell)
        for shape, cell in zip(shapes, cells, strict=True)
    )
    return Scene(seed=seed, objects=objects)


def scenes(name: str, *, absent_partner: bool = False, start: int = 0) -> Iterator[Scene]:
    """Scenes of a named seed range in order, from its `start`-th seed on; with `absent_partner` only those that
    have one."""
    for seed in SEED_RANGES[name][start:]:
        scene = scene_from_seed(seed)
        if scene.absent_partners or not absent_partner:
            yield scene
