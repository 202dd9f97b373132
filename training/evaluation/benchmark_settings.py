"""Which benchmark is run and on what: the options that evaluations share. Asks nobody."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from training.command_line import Settings
from training.errors import InvalidTraining
from training.evaluation.benchmark import TURNS, Benchmark, Turn
from training.evaluation.miniature_benchmark import miniature_benchmark

BenchmarkName = Literal["miniature", "pope", "coco"]
TurnsName = Literal["first", "second", "both"]
MINIATURE_CAPTIONS = 1000
MINIATURE_QUESTIONS = 2000
COCO_CAPTIONS = 500
"""As many as papers caption."""
NEEDED: dict[BenchmarkName, tuple[str, ...]] = {
    "miniature": (),
    "pope": ("pope_files", "images"),
    "coco": ("annotations", "images"),
}
_COCO_ONLY = ("annotations", "coco_split", "caption_prompt", "caption_max_tokens", "synonyms")
FOREIGN: dict[BenchmarkName, tuple[str, ...]] = {
    "miniature": ("pope_files", "images", "answer_max_tokens", *_COCO_ONLY),
    "pope": ("captions", "turns", *_COCO_ONLY),  # whose pictures have no true captions to follow
    "coco": ("pope_files",),
}
"""Options that mean nothing to a benchmark; given all the same, they are refused."""


TURNS_ASKED: dict[TurnsName, tuple[Turn, ...]] = {"first": ("first",), "second": ("second",), "both": TURNS}


class PhotographSettings(Settings):
    """Where photographs and what is known of them lie, and how pictures are asked about."""

    images: Path | None = None
    """Folder of the photographs, for pope and coco."""
    annotations: Path | None = None
    """Folder of COCO's instances_SPLIT.json and captions_SPLIT.json."""
    coco_split: str = "val2014"
    """SPLIT in those names."""
    synonyms: Path | None = None
    """Table of COCO's objects and their names, a line per object as in CHAIR's synonyms.txt; without it our own."""
    question_suffix: str | None = None
    """Stands after every question, a space before it; the authors': 'Please answer this question with one word.'"""
    caption_prompt: str | None = None
    """What asks for a caption of a COCO photograph; without it 'Please describe this image in detail.'"""
    caption_max_tokens: int | None = Field(default=None, ge=1)
    """Longest caption of a photograph, in tokens; without it 512."""
    answer_max_tokens: int | None = Field(default=None, ge=1)
    """Longest answer to a question about a photograph, in tokens; without it 16."""


class BenchmarkSettings(PhotographSettings):
    """Scenes, captions and questions."""

    benchmark: BenchmarkName = "miniature"
    """miniature: drawn scenes; pope: published question files; coco: CHAIR on COCO photographs."""
    captions: int | None = Field(default=None, ge=0)
    """Pictures captioned; without it 1000 of the miniature, 500 of coco."""
    questions: int | None = Field(default=None, ge=0)
    """Questions per POPE split; without it 2000 of the miniature, all of pope, none of coco."""
    turns: TurnsName | None = None
    """Ask the questions with the picture (first), after a turn in which it was truly described (second), or in both
    ways; without it both, but first of pope."""
    seed: int = Field(default=0, ge=0)
    """Chooses the scenes or pictures and seeds the bootstrap."""
    pope_files: tuple[Path, ...] = ()
    """POPE's files, one per split: coco_pope_random.json, ..._popular.json, ..._adversarial.json."""


def build_benchmark(settings: BenchmarkSettings) -> Benchmark:
    """The benchmark that the settings describe; an option that is missing or means nothing is named."""
    check_options(settings, settings.benchmark)
    return with_suffix(_benchmark(settings), settings)


def with_suffix(benchmark: Benchmark, settings: PhotographSettings) -> Benchmark:
    """The questions as the settings want them asked."""
    return benchmark.with_suffix(settings.question_suffix) if settings.question_suffix else benchmark


def _benchmark(settings: BenchmarkSettings) -> Benchmark:
    turns = TURNS_ASKED[settings.turns or "both"]
    if settings.benchmark == "miniature":
        return miniature_benchmark(
            captions=MINIATURE_CAPTIONS if settings.captions is None else settings.captions,
            questions=MINIATURE_QUESTIONS if settings.questions is None else settings.questions,
            seed=settings.seed,
            turns=turns,
        )
    if settings.benchmark == "coco":
        return coco_photographs(
            settings,
            captions=COCO_CAPTIONS if settings.captions is None else settings.captions,
            questions=settings.questions or 0,
            seed=settings.seed,
            turns=turns,
        )
    from training.evaluation.pope_benchmark import pope_benchmark

    assert settings.images is not None
    return pope_benchmark(
        settings.pope_files,
        settings.images,
        questions=settings.questions,
        seed=settings.seed,
        **_given(settings, "answer_max_tokens"),
    )


def coco_photographs(settings: PhotographSettings, **chosen: Any) -> Benchmark:
    """COCO with the settings' files and limits; `chosen`: how many pictures and which, see `coco_benchmark`."""
    from training.evaluation.coco_benchmark import coco_benchmark  # only here: it needs the training packages

    assert settings.annotations is not None
    assert settings.images is not None
    limits = _given(settings, "synonyms", "caption_prompt", "caption_max_tokens", "answer_max_tokens")
    return coco_benchmark(settings.annotations, settings.images, split=settings.coco_split, **chosen, **limits)


def check_options(settings: PhotographSettings, benchmark: BenchmarkName) -> None:
    """Refuses options that the benchmark lacks, and those that it has no use for."""
    for name in NEEDED[benchmark]:
        if not getattr(settings, name):
            raise InvalidTraining(f"{_option(name)}: --benchmark {benchmark} needs it")
    fields = type(settings).model_fields
    for name in FOREIGN[benchmark]:
        if name in fields and getattr(settings, name) != fields[name].default:
            raise InvalidTraining(f"{_option(name)}: --benchmark {benchmark} has no use for it")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _given(settings: PhotographSettings, *names: str) -> dict[str, Any]:
    """Those of the named settings that are not None."""
    return {name: value for name in names if (value := getattr(settings, name)) is not None}
