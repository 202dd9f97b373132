"""The playground's bundled pictures: scenes drawn for people, that nothing was trained, tuned or judged on.

`python -m tests.service.playground.scenes` draws them anew.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

from PIL import Image

from service.http.pages.playground import FOLDER
from training.miniature.drawing import draw_scene
from training.miniature.world import Scene, scenes

SCENES = 6
INTO = FOLDER / "scenes"


def bundled() -> dict[str, tuple[Image.Image, str]]:
    """File name to its picture and what it shows. All have an absent partner: the plain model likes to invent it, and
    in the scene that people see first it does, which is the second of the range."""
    chosen = islice(scenes("demo", absent_partner=True), 1, 1 + SCENES)
    return {f"scene_{number}.png": (draw_scene(scene), shown_in(scene)) for number, scene in enumerate(chosen, 1)}


def shown_in(scene: Scene) -> str:
    """In words, for who cannot see it."""
    *others, last = [f"{'an' if one.color[0] in 'aeiou' else 'a'} {one.color} {one.shape}" for one in scene.objects]
    return f"A drawing of {', '.join(others)} and {last}"


def write(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    pictures = bundled()
    for name, (picture, _) in pictures.items():
        picture.save(folder / name, optimize=True)
    index = [{"file": name, "alt": alt} for name, (_, alt) in pictures.items()]
    (folder / "scenes.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(INTO)
