"""COCO's annotation files: which objects a photograph holds, and what people wrote about it. No pixels, no model.

As published for 2014: `instances_SPLIT.json` (objects outlined, by category) and `captions_SPLIT.json` (five captions a
picture). The instances of val2014 are some 150 MB; what is not needed of them is never made a Python object.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from training.durable_files import sha256_of
from training.errors import InvalidTraining
from training.evaluation.coco_objects import ObjectNames, coco_categories


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True)


class _Picture(_Entry):
    id: int
    file_name: str


class _Category(_Entry):
    id: int
    name: str


class _Instance(_Entry):
    image_id: int
    category_id: int


class _Caption(_Entry):
    image_id: int
    caption: str


class _InstancesFile(_Entry):
    images: list[_Picture]
    categories: list[_Category]
    annotations: list[_Instance]


class _CaptionsFile(_Entry):
    annotations: list[_Caption]


@dataclass(frozen=True, kw_only=True)
class CocoAnnotations:
    """What both files say, by picture id."""

    file_names: dict[int, str]
    outlined: dict[int, frozenset[str]]
    """Categories with at least one outline; a picture without any has no entry."""
    captions: dict[int, tuple[str, ...]]
    sources: dict[str, str]
    """sha256 by file name."""

    def truth(self, picture: int, objects: ObjectNames) -> frozenset[str]:
        """Rohrbach et al. 2018: an object is there if it is outlined or if a reference caption names it."""
        named = {name for caption in self.captions.get(picture, ()) for name in objects.mentioned(caption)}
        return frozenset(named | {objects.name_of(category) for category in self.outlined.get(picture, ())})


@lru_cache(maxsize=2)
def read_annotations(folder: Path, split: str) -> CocoAnnotations:
    """Both files of a split; anything that does not fit is refused by file and field."""
    instances_file, captions_file = folder / f"instances_{split}.json", folder / f"captions_{split}.json"
    instances, captions = _read(instances_file, _InstancesFile), _read(captions_file, _CaptionsFile)
    categories = _category_names(instances_file, instances)
    file_names = {picture.id: picture.file_name for picture in instances.images}
    outlined: dict[int, set[str]] = defaultdict(set)
    for number, one in enumerate(instances.annotations):
        where = f"{instances_file}: annotations[{number}]"
        if one.category_id not in categories:
            raise InvalidTraining(f"{where}.category_id: {one.category_id} is none of the file's categories")
        if one.image_id not in file_names:
            raise InvalidTraining(f"{where}.image_id: {one.image_id} is none of the file's images")
        outlined[one.image_id].add(categories[one.category_id])
    written: dict[int, list[str]] = defaultdict(list)
    for one in captions.annotations:
        written[one.image_id].append(one.caption)
    if not file_names.keys() & written.keys():
        raise InvalidTraining(f"{captions_file}: has no caption of any picture in {instances_file.name}")
    return CocoAnnotations(
        file_names=file_names,
        outlined={picture: frozenset(names) for picture, names in outlined.items()},
        captions={picture: tuple(texts) for picture, texts in written.items()},
        sources={file.name: sha256_of(file) for file in (instances_file, captions_file)},
    )


def _category_names(file: Path, instances: _InstancesFile) -> dict[int, str]:
    known = set(coco_categories())
    for number, category in enumerate(instances.categories):
        if category.name not in known:
            raise InvalidTraining(
                f"{file}: categories[{number}].name: {category.name!r} is none of COCO's 80 object categories"
            )
    return {category.id: category.name for category in instances.categories}


F = TypeVar("F", bound=BaseModel)


def _read(file: Path, model: type[F]) -> F:
    try:
        return model.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise InvalidTraining(f"--annotations: {file} is missing; see --coco-split for the names looked for") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        raise InvalidTraining(
            f"{file}: {field + ': ' if field else ''}{first['msg']}; it is not COCO's {file.name}"
        ) from None
