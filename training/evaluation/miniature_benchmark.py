"""The miniature world as a benchmark: which scenes, which questions, and what counts as naming a shape. No model.

Captions and questions are about the same scenes, all with an absent partner, so that the inventions that the miniature
learned can occur in every one of them. A seed opens its own window of the range of scenes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import islice

from PIL.Image import Image

from training.miniature import language
from training.miniature.drawing import draw_scene
from training.miniature.world import PARTNERS, SEED_RANGES, SHAPES, Scene, scenes
from training.pope import ObjectQuestion, build_questions

WINDOW = 20_000
"""Scene seeds set aside for one evaluation seed."""
CAPTION_MAX_TOKENS = 80
ANSWER_MAX_TOKENS = 3


@dataclass(frozen=True, kw_only=True)
class BenchmarkScene:
    """A picture and what is truly on it."""

    seed: int
    image: Image
    truth: frozenset[str]
    caption: str
    """A true one."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Everything that is asked, and how answers are judged."""

    name: str
    scenes: tuple[BenchmarkScene, ...]
    captions: int
    """The first so many scenes are captioned."""
    questions: tuple[ObjectQuestion, ...]
    caption_prompt: str
    question_text: Callable[[str], str]
    mentions: Callable[[str], list[str]]
    """The objects that a caption names, in order and with repetitions."""
    caption_max_tokens: int = CAPTION_MAX_TOKENS
    answer_max_tokens: int = ANSWER_MAX_TOKENS
    second_turn: bool = False
    """Questions are asked after a first turn in which the picture was described, truly."""

    def before_question(self, scene: int) -> tuple[str, str] | None:
        """What is asked and answered before a question about a scene."""
        return (self.caption_prompt, self.scenes[scene].caption) if self.second_turn else None

    @property
    def question_scenes(self) -> int:
        """The first so many scenes are asked about."""
        return 1 + max((question.scene for question in self.questions), default=-1)


@cache
def miniature_benchmark(
    *, captions: int, questions: int, seed: int, scene_range: str = "held_out", second_turn: bool = False
) -> Benchmark:
    """`questions` per POPE split, half of them about a present shape; one of each kind per scene and split."""
    if questions % 2:
        raise ValueError(f"questions per split must be even, since half are about present objects; got {questions}")
    start, window = seed * WINDOW, max(captions, questions // 2)
    if seed < 0 or start + WINDOW > len(SEED_RANGES[scene_range]):
        raise ValueError(f"seed must be 0..{len(SEED_RANGES[scene_range]) // WINDOW - 1}, got {seed}")
    chosen = list(islice(scenes(scene_range, absent_partner=True, start=start), window))
    if chosen and chosen[-1].seed >= SEED_RANGES[scene_range][start] + WINDOW:
        raise ValueError(f"{window} scenes are more than one seed's window holds; ask for fewer")
    asked = build_questions([scene.shapes for scene in chosen[: questions // 2]], SHAPES, partners=PARTNERS, seed=seed)
    return Benchmark(
        name="miniature",
        scenes=tuple(
            BenchmarkScene(seed=s.seed, image=draw_scene(s), truth=s.shapes, caption=_true_caption(s)) for s in chosen
        ),
        second_turn=second_turn,
        captions=captions,
        questions=tuple(asked),
        caption_prompt=language.CAPTION_PROMPT,
        question_text=language.existence_question,
        mentions=language.shapes_mentioned,
    )


def _true_caption(scene: Scene) -> str:
    return language.caption(scene, language.Noise(), random.Random(f"true caption {scene.seed}"))
