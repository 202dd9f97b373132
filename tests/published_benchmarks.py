"""COCO and POPE as they are published, in small: the files' own names and keys, a handful of drawn pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

CATEGORIES = ["person", "dog", "chair", "dining table", "hot dog", "train", "toilet", "teddy bear", "cup"]
PICTURES: dict[int, tuple[list[str], list[str]]] = {
    42: (["dog", "dog", "chair"], ["A puppy sleeps on a chair.", "Two dogs in a room."]),
    139: (["person"], ["A man eats a hot dog at a table.", "Somebody eating."]),
    285: (["train"], ["A train on the train tracks.", "A locomotive and a woman."]),
    9_001: (["toilet"], ["A toilet seat is up.", "A white toilet."]),
    310_196: (["teddy bear", "cup"], ["A teddy bear with a mug.", "A stuffed bear sits."]),
    310_197: ([], ["Nothing much.", "An empty field."]),
}
"""By id: outlined objects and reference captions."""


def picture_name(number: int) -> str:
    return f"COCO_val2014_{number:012d}.jpg"


class CocoFolders(NamedTuple):
    annotations: Path
    images: Path


def instances() -> dict[str, Any]:
    """As instances_val2014.json has it, keys that nobody reads among them."""
    return {
        "info": {"description": "COCO 2014 Dataset", "year": 2014},
        "licenses": [{"id": 1, "name": "Attribution-NonCommercial-ShareAlike License", "url": ""}],
        "images": [
            {"id": number, "file_name": picture_name(number), "height": 24, "width": 32, "license": 1}
            for number in PICTURES
        ],
        "annotations": [
            {
                "id": 100 * number + position,
                "image_id": number,
                "category_id": 1 + CATEGORIES.index(name),
                "segmentation": [[1.5, 2.0, 3.0, 4.25, 5.0, 6.0]],
                "area": 12.5,
                "bbox": [1.5, 2.0, 3.0, 4.25],
                "iscrowd": 0,
            }
            for number, (outlined, _) in PICTURES.items()
            for position, name in enumerate(outlined)
        ],
        "categories": [{"supercategory": "thing", "id": 1 + n, "name": name} for n, name in enumerate(CATEGORIES)],
    }


def captions() -> dict[str, Any]:
    rows = [(number, caption) for number, (_, texts) in PICTURES.items() for caption in texts]
    return {
        "info": {"description": "COCO 2014 Dataset"},
        "annotations": [
            {"id": position, "image_id": number, "caption": caption} for position, (number, caption) in enumerate(rows)
        ],
    }


def write_coco(folder: Path) -> CocoFolders:
    """Annotations and pictures of val2014; every picture is of another colour."""
    folders = CocoFolders(folder / "annotations", folder / "val2014")
    for folder in folders:
        folder.mkdir()
    (folders.annotations / "instances_val2014.json").write_text(json.dumps(instances()))
    (folders.annotations / "captions_val2014.json").write_text(json.dumps(captions()))
    for number in PICTURES:
        Image.new("RGB", (32, 24), (number % 256, number % 199, 90)).save(folders.images / picture_name(number))
    return folders


def pope_line(number: int, picture: int, name: str, label: str) -> dict[str, Any]:
    text = f"Is there a {name} in the image?"
    return {"question_id": number, "image": picture_name(picture), "text": text, "label": label}


POPE_ABSENT = {"random": "toilet", "popular": "person", "adversarial": "cup"}
"""What each split asks for that is not there."""


def write_pope(folder: Path, change: Callable[[str, list[str]], list[str]] = lambda split, lines: lines) -> list[Path]:
    """The three files about two pictures; `change` may alter the lines of each split."""
    files = []
    for split, absent in POPE_ABSENT.items():
        rows = [
            row
            for position, (picture, present) in enumerate([(42, "dog"), (285, "train")])
            for row in (
                pope_line(2 * position + 1, picture, present, "yes"),
                pope_line(2 * position + 2, picture, absent, "no"),
            )
        ]
        files.append(folder / f"coco_pope_{split}.json")
        files[-1].write_text("\n".join(change(split, [json.dumps(row) for row in rows])) + "\n")
    return files
