"""POPE as published: files of yes/no questions about photographs, asked in the files' own words. No model.

Li et al. 2023 (arXiv 2305.10355) publish one file per split, one JSON object a line:
    {"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a snowboard in the image?",
     "label": "yes"}
The files for other collections of photographs (GQA, A-OKVQA) have the same form.
"""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from training.durable_files import sha256_of
from training.errors import InvalidTraining
from training.evaluation.benchmark import Benchmark, BenchmarkQuestion, BenchmarkScene
from training.evaluation.picture_files import pictures_in
from training.pope import SPLITS, Split

ANSWER_MAX_TOKENS = 16
"""Enough for 'Based on the image, yes'; the first yes or negation decides."""


class PopeLine(BaseModel):
    """What is read of a line; other keys (`question_id`) are passed over."""

    model_config = ConfigDict(frozen=True)

    image: str = Field(min_length=1)
    text: str = Field(min_length=1)
    label: Literal["yes", "no"]


@dataclass(frozen=True)
class _Asked:
    split: Split
    line: PopeLine


def pope_benchmark(
    files: Sequence[Path],
    images: Path,
    *,
    questions: int | None = None,
    seed: int = 0,
    answer_max_tokens: int = ANSWER_MAX_TOKENS,
) -> Benchmark:
    """All questions of the files, or those about so many pictures that no split has more than `questions`."""
    asked = list(_read_files(files))
    names = list(dict.fromkeys(one.line.image for one in asked))
    if questions is not None:
        names = _draw_pictures(asked, names, limit=questions, seed=seed)
    numbers = {name: number for number, name in enumerate(names)}
    read = pictures_in(images, names)
    return Benchmark(
        name="pope",
        scenes=tuple(BenchmarkScene(name=name, seed=zlib.crc32(name.encode()), read=read[name]) for name in names),
        questions=tuple(
            BenchmarkQuestion(
                split=one.split,
                scene=numbers[one.line.image],
                text=one.line.text,
                truth=one.line.label == "yes",
            )
            for one in asked
            if one.line.image in numbers
        ),
        caption_max_tokens=0,
        answer_max_tokens=answer_max_tokens,
        sources={file.name: sha256_of(file) for file in files},
    )


def split_of(file: Path) -> Split:
    """The split that a file's name holds, as in coco_pope_adversarial.json."""
    found: list[Split] = [split for split in SPLITS if file.name.lower().count(split)]
    if len(found) != 1:
        raise InvalidTraining(
            f"--pope-files: the name of {file} must hold one of {', '.join(SPLITS)}, which tells its split"
        )
    return found[0]


def _read_files(files: Sequence[Path]) -> Iterator[_Asked]:
    """Every question once per split; two files of a split, or two labels for a question, are refused."""
    splits: list[Split] = [split_of(file) for file in files]
    for split, number in Counter(splits).items():
        if number > 1:
            raise InvalidTraining(f"--pope-files: {number} files hold the split {split}; evaluate them one by one")
    labels: dict[tuple[str, str], str] = {}
    for split, file in zip(splits, files, strict=True):
        for number, line in _read_lines(file):
            known = labels.setdefault((line.image, line.text), line.label)
            if known != line.label:
                raise InvalidTraining(
                    f"{file}, line {number}: label {line.label!r}, but the same question about {line.image} "
                    f"has {known!r} elsewhere"
                )
            yield _Asked(split, line)


def _read_lines(file: Path) -> Iterator[tuple[int, PopeLine]]:
    """Line numbers, from 1, and what stands there."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise InvalidTraining(f"--pope-files: {file} is missing") from None
    except UnicodeDecodeError as error:
        raise InvalidTraining(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not any(line.strip() for line in lines):
        raise InvalidTraining(f"{file}: holds no question")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, PopeLine.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            field = f"{first['loc'][0]}: " if first["loc"] else ""
            raise InvalidTraining(
                f"{file}, line {number}: {field}{first['msg']}; a line is one JSON object with image, text and "
                "label yes or no"
            ) from None


def _draw_pictures(asked: Sequence[_Asked], names: Sequence[str], *, limit: int, seed: int) -> list[str]:
    """Pictures drawn by `seed`, in the files' order; all that is asked about a picture stays together."""
    by_picture: dict[str, Counter[Split]] = defaultdict(Counter)
    for one in asked:
        by_picture[one.line.image][one.split] += 1
    total: Counter[Split] = Counter()
    chosen = set()
    for name in Random(seed).sample(list(names), len(names)):
        if max((total + by_picture[name]).values()) > limit:
            break
        total += by_picture[name]
        chosen.add(name)
    if not chosen:
        raise InvalidTraining(f"--questions: {limit} is less than what is asked about one picture; give more")
    return [name for name in names if name in chosen]
