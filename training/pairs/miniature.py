"""Pairs of the drawn world: scenes of a seed range, each with one noisy caption.

Texts follow the distribution the miniature LLaVA was last trained on: clean ones would tell the VL-SAE what LLaVA
never knew. A caption follows from its scene's seed alone, so that any portion can be made on its own.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any

from PIL import Image

from training.errors import InvalidTraining
from training.miniature.drawing import draw_scene
from training.miniature.language import caption
from training.miniature.recipe import NOISE
from training.miniature.world import SEED_RANGES, scene_from_seed
from training.pairs.pair import Pair, PortionPlace, Unusable

_REFERENCE = "scene:"


class MiniaturePairs:
    """Scenes of neighbouring seeds."""

    def __init__(self, spec: str, seeds: range) -> None:
        self._spec, self._seeds = spec, seeds

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "miniature",
            "spec": self._spec,
            "first_seed": self._seeds.start,
            "scenes": len(self._seeds),
            "caption_noise": NOISE.caption,
        }

    def portions(self, size: int) -> list[PortionPlace]:
        starts = range(0, len(self._seeds), size)
        return [{"first": start, "count": min(size, len(self._seeds) - start)} for start in starts]

    def read(self, portion: PortionPlace) -> Iterator[tuple[int, Pair | Unusable]]:
        first = portion["first"]
        for index, seed in enumerate(self._seeds[first : first + portion["count"]], start=first):
            yield index, miniature_pair(seed)

    def images(self, references: Iterable[str]) -> Iterator[tuple[str, Image.Image]]:
        wanted = {int(name.removeprefix(_REFERENCE)) for name in references if name.startswith(_REFERENCE)}
        for seed in sorted(wanted):
            if seed in self._seeds:
                yield f"{_REFERENCE}{seed}", draw_scene(scene_from_seed(seed))


def miniature_pair(seed: int) -> Pair:
    """A scene and what its noisy caption says."""
    scene = scene_from_seed(seed)
    text = caption(scene, NOISE, random.Random(f"noisy caption {seed}"))
    return Pair(image=draw_scene(scene).convert("RGB"), text=text, reference=f"{_REFERENCE}{seed}")


def open_miniature(place: str) -> MiniaturePairs:
    """From `RANGE:COUNT[:START]`."""
    spec = f"miniature:{place}"
    name, *numbers = place.split(":")
    if name not in SEED_RANGES:
        raise InvalidTraining(f"--pairs {spec}: no range {name!r}; known: {', '.join(SEED_RANGES)}")
    try:
        count, start = (int(number) for number in [*numbers, "0"][:2])
    except ValueError:
        count = start = -1
    if len(numbers) not in (1, 2) or count < 1 or start < 0 or start + count > len(SEED_RANGES[name]):
        raise InvalidTraining(
            f"--pairs {spec}: the form is miniature:RANGE:COUNT[:START], with at least one and "
            f"at most {len(SEED_RANGES[name])} scenes of {name}"
        )
    return MiniaturePairs(spec, SEED_RANGES[name][start : start + count])
