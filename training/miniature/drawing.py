"""Draws a scene with PIL: the same seed gives the same picture. Knows no words and no models."""

import math
import random

import numpy as np
from PIL import Image, ImageDraw

from training.miniature.world import GRID_SIDE, Scene, SceneObject

IMAGE_SIZE_PX = 96
CELL_PX = IMAGE_SIZE_PX // GRID_SIDE
MIN_RADIUS_PX, MAX_RADIUS_PX = 10.5, 13.5
MAX_OFFSET_PX = 2.0
PIXEL_NOISE = 9.0
SUPERSAMPLING = 3

RGB = {
    "red": (214, 48, 49),
    "green": (39, 158, 75),
    "blue": (45, 92, 214),
    "yellow": (236, 206, 45),
    "purple": (136, 58, 178),
    "orange": (240, 134, 32),
}


def draw_scene(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of IMAGE_SIZE_PX squared, with noise in place, size, brightness and pixels."""
    noise = random.Random(f"drawing {scene.seed}")
    background = noise.randint(214, 246)
    side = IMAGE_SIZE_PX * SUPERSAMPLING
    canvas = Image.new("RGB", (side, side), (background,) * 3)
    pen = ImageDraw.Draw(canvas)
    for item in scene.objects:
        _draw_object(pen, item, noise, background)
    pixels = np.asarray(canvas.resize((IMAGE_SIZE_PX, IMAGE_SIZE_PX), Image.Resampling.BOX), dtype=np.float32)
    grain = np.random.default_rng(scene.seed).normal(0.0, PIXEL_NOISE, pixels.shape)
    return Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))


def _draw_object(pen: ImageDraw.ImageDraw, item: SceneObject, noise: random.Random, background: int) -> None:
    row, column = divmod(item.cell, GRID_SIDE)
    x = (column + 0.5) * CELL_PX + noise.uniform(-MAX_OFFSET_PX, MAX_OFFSET_PX)
    y = (row + 0.5) * CELL_PX + noise.uniform(-MAX_OFFSET_PX, MAX_OFFSET_PX)
    radius = noise.uniform(MIN_RADIUS_PX, MAX_RADIUS_PX)
    brightness = noise.uniform(0.82, 1.12)
    color = tuple(min(255, round(channel * brightness)) for channel in RGB[item.color])
    x, y, radius = (value * SUPERSAMPLING for value in (x, y, radius))
    if item.shape in ("circle", "ring", "moon"):
        _draw_round(pen, item.shape, (x, y, radius), color, background)
    else:
        pen.polygon([(x + radius * u, y + radius * v) for u, v in POLYGONS[item.shape]], fill=color)


def _draw_round(pen: ImageDraw.ImageDraw, shape: str, place: tuple, color: tuple, background: int) -> None:
    x, y, radius = place
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    if shape == "ring":
        hole = 0.52 * radius
        pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=(background,) * 3)
    if shape == "moon":
        bite = 0.88 * radius
        shift = 0.62 * radius
        pen.ellipse((x + shift - bite, y - bite, x + shift + bite, y + bite), fill=(background,) * 3)


def _star() -> list[tuple[float, float]]:
    points = []
    for corner in range(10):
        reach = 1.1 if corner % 2 == 0 else 0.45
        angle = math.pi * corner / 5 - math.pi / 2
        points.append((reach * math.cos(angle), reach * math.sin(angle)))
    return points


def _heart() -> list[tuple[float, float]]:
    points = []
    for step in range(40):
        angle = 2 * math.pi * step / 40
        across = 16 * math.sin(angle) ** 3
        down = -13 * math.cos(angle) + 5 * math.cos(2 * angle) + 2 * math.cos(3 * angle) + math.cos(4 * angle)
        points.append((across / 16, down / 15))
    return points


_ARM = 0.34
POLYGONS = {
    "star": _star(),
    "heart": _heart(),
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -1), (1, 0.85), (-1, 0.85)],
    "diamond": [(0, -1.1), (0.72, 0), (0, 1.1), (-0.72, 0)],
    "cross": [
        (-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
        (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM),
    ],
    "arrow": [(-1, -0.25), (0.1, -0.25), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.25), (-1, 0.25)],
}  # fmt: skip
"""Corners in units of the radius, y down."""
