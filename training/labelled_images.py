"""Pictures with a class each, and what the classes are called: from a folder or a JSON-lines file, and a JSON file.

    {"classes": {"n01443537": ["goldfish", "Carassius auratus"], ...}, "templates": ["a photo of a {}.", ...]}

Where `classes` is a list, a class is called what its label says. Knows no model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from training.errors import InvalidTraining
from training.pairs.decoding import decode_image


class LabelledImage(NamedTuple):
    """A picture and the class it is in."""

    image: Image.Image
    label: int
    """Index of the class."""


@dataclass(frozen=True, kw_only=True)
class Classes:
    """What can be said of a picture."""

    labels: tuple[str, ...]
    names: tuple[tuple[str, ...], ...]
    """Of each class, what it is called."""
    templates: tuple[str, ...]
    """With {} where the name goes."""

    def prompts(self) -> list[list[str]]:
        """Of each class: every name in every template."""
        return [[template.replace("{}", name) for name in names for template in self.templates] for names in self.names]


class _ClassesFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    classes: dict[str, list[str]] | list[str] = Field(min_length=2)
    templates: list[str] = Field(min_length=1)

    @field_validator("templates")
    @classmethod
    def _have_a_place(cls, templates: list[str]) -> list[str]:
        for template in templates:
            if "{}" not in template:
                raise ValueError(f"{template!r} has no {{}} for the class's name")
        return templates


def read_classes(file: Path) -> Classes:
    """Raises InvalidTraining naming the file and the field."""
    try:
        read = _ClassesFile.model_validate_json(file.read_bytes())
    except OSError as error:
        raise InvalidTraining(f"{file} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidTraining(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    named = read.classes if isinstance(read.classes, dict) else {label: [label] for label in read.classes}
    if nameless := [label for label, names in named.items() if not names]:
        raise InvalidTraining(f"{file}: classes.{nameless[0]} has no name")
    if len(named) < 2:
        raise InvalidTraining(f"{file}: classes: two different ones are needed")
    return Classes(
        labels=tuple(named), names=tuple(tuple(names) for names in named.values()), templates=tuple(read.templates)
    )


def read_labelled_images(place: Path, classes: Classes, report: Callable[[str], None]) -> Iterator[LabelledImage]:
    """In the order of the file or of the names; what is no picture is left out, and how many at the end is said.

    Raises InvalidTraining, naming the file, for a label that is no class and where there is no picture at all.
    """
    number_of = {label: number for number, label in enumerate(classes.labels)}
    read, left_out = 0, 0
    for file, label, where in _from_folder(place) if place.is_dir() else _from_lines(place):
        if label not in number_of:
            raise InvalidTraining(f"{where}: {label!r} is none of the {len(number_of)} classes")
        image = decode_image(file)
        if isinstance(image, Image.Image):
            read += 1
            yield LabelledImage(image, number_of[label])
        else:
            left_out += 1
    if not read:
        raise InvalidTraining(f"{place}: no picture could be read, {left_out} were left out")
    if left_out:
        report(f"{left_out} of {read + left_out} pictures could not be read and were left out")


def _from_folder(folder: Path) -> Iterator[tuple[Path, str, str]]:
    for of_class in sorted(one for one in folder.iterdir() if one.is_dir()):
        for file in sorted(one for one in of_class.iterdir() if one.is_file()):
            yield file, of_class.name, str(of_class)


def _from_lines(file: Path) -> Iterator[tuple[Path, str, str]]:
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _parse(file, number, line)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidTraining(f"{file} cannot be read: {error}") from error


def _parse(file: Path, number: int, line: str) -> tuple[Path, str, str]:
    where = f"{file}, line {number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InvalidTraining(f"{where}, is not JSON ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get("image"), str) or not isinstance(row.get("label"), str):
        raise InvalidTraining(f'{where}: a picture is {{"image": "path", "label": "class"}}')
    return file.parent / row["image"], row["label"], where
