"""COCO photographs as a benchmark: CHAIR on captions, and yes/no questions in the manner of POPE. No model.

Captions are judged as by Rohrbach et al. 2018: what is outlined or named in a reference caption is there. Questions,
where asked for, are built from the same truth (see `training.pope`); POPE's published ones are
`training.evaluation.pope_benchmark`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from random import Random

from training.errors import InvalidTraining
from training.evaluation.benchmark import Benchmark, BenchmarkQuestion, BenchmarkScene, Turn
from training.evaluation.coco_annotations import CocoAnnotations, read_annotations
from training.evaluation.coco_objects import ObjectNames, object_names
from training.evaluation.coco_synonyms import names_from_synonyms
from training.evaluation.picture_files import pictures_in
from training.pope import build_questions

CAPTION_PROMPT = "Please describe this image in detail."
CAPTION_MAX_TOKENS = 512
ANSWER_MAX_TOKENS = 16


@cache
def coco_benchmark(
    annotations: Path,
    images: Path,
    *,
    split: str = "val2014",
    captions: int,
    questions: int = 0,
    seed: int = 0,
    skip: int = 0,
    turns: tuple[Turn, ...] = ("first",),
    synonyms: Path | None = None,
    caption_prompt: str = CAPTION_PROMPT,
    caption_max_tokens: int = CAPTION_MAX_TOKENS,
    answer_max_tokens: int = ANSWER_MAX_TOKENS,
) -> Benchmark:
    """`questions` per POPE split, half of them about an object that is there; one of each kind per picture and split.

    `seed` puts the pictures into an order of its own; the first are taken, or those after the first `skip`.
    `synonyms`: a table of objects instead of our own.
    """
    if questions % 2:
        raise InvalidTraining(f"--questions: half are about objects that are there; {questions} is odd")
    objects = object_names() if synonyms is None else names_from_synonyms(synonyms)
    read = read_annotations(annotations, split)
    chosen = _draw(read, max(captions, questions // 2), seed=seed, skip=skip)
    scenes = _scenes(read, chosen, objects, images)
    return Benchmark(
        name="coco",
        scenes=scenes,
        captions=captions,
        questions=_questions([scene.truth for scene in scenes[: questions // 2]], objects, seed),
        caption_prompt=caption_prompt,
        mentions=objects.mentioned,
        caption_max_tokens=caption_max_tokens,
        answer_max_tokens=answer_max_tokens,
        turns=turns,
        sources=read.sources | objects.sources,
    )


def existence_question(category: str) -> str:
    """In POPE's words."""
    if category in ("skis", "scissors"):
        return f"Are there {category} in the image?"
    article = "an" if category[0] in "aeiou" else "a"
    return f"Is there {article} {category} in the image?"


def _draw(read: CocoAnnotations, number: int, *, seed: int, skip: int) -> list[int]:
    """Ids of pictures with a caption and at least one outlined object, which a question about what is there needs."""
    usable = sorted(read.captions.keys() & read.outlined.keys())
    Random(seed).shuffle(usable)
    if len(usable) < skip + number:
        raise InvalidTraining(
            f"--captions, --questions: {skip + number} pictures are needed, the annotations have {len(usable)}"
        )
    return usable[skip : skip + number]


def _scenes(read: CocoAnnotations, chosen: list[int], objects: ObjectNames, images: Path) -> tuple[BenchmarkScene, ...]:
    pictures = pictures_in(images, [read.file_names[picture] for picture in chosen])
    return tuple(
        BenchmarkScene(
            name=read.file_names[picture],
            seed=picture,
            read=pictures[read.file_names[picture]],
            truth=read.truth(picture, objects),
            caption=read.captions[picture][0],
        )
        for picture in chosen
    )


def _questions(truths: list[frozenset[str]], objects: ObjectNames, seed: int) -> tuple[BenchmarkQuestion, ...]:
    return tuple(
        BenchmarkQuestion(split=one.split, scene=one.scene, text=existence_question(one.object), truth=one.truth)
        for one in build_questions(truths, objects.names, seed=seed)
    )
