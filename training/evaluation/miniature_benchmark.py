"""The miniature world as a benchmark: which scenes, which questions, and what counts as naming a shape. No model.

Captions and questions are about the same scenes, all with an absent partner, so that the inventions that the miniature
learned can occur in every one of them. A seed opens its own window of the range of scenes.
"""

from __future__ import annotations

import random
from functools import cache, partial
from itertools import islice

from training.errors import InvalidTraining
from training.evaluation.benchmark import Benchmark, BenchmarkQuestion, BenchmarkScene, Turn
from training.miniature import language
from training.miniature.drawing import draw_scene
from training.miniature.world import PARTNERS, SEED_RANGES, SHAPES, Scene, scenes
from training.pope import build_questions

WINDOW = 20_000
"""Scene seeds set aside for one evaluation seed."""
CAPTION_MAX_TOKENS = 80
ANSWER_MAX_TOKENS = 3


@cache
def miniature_benchmark(
    *, captions: int, questions: int, seed: int, scene_range: str = "held_out", turns: tuple[Turn, ...] = ("first",)
) -> Benchmark:
    """`questions` per POPE split, half of them about a present shape; one of each kind per scene and split."""
    if questions % 2:
        raise InvalidTraining(f"questions per split must be even, half are about present objects; got {questions}")
    start, window = seed * WINDOW, max(captions, questions // 2)
    if seed < 0 or start + WINDOW > len(SEED_RANGES[scene_range]):
        raise InvalidTraining(f"seed must be 0..{len(SEED_RANGES[scene_range]) // WINDOW - 1}, got {seed}")
    chosen = list(islice(scenes(scene_range, absent_partner=True, start=start), window))
    if chosen and chosen[-1].seed >= SEED_RANGES[scene_range][start] + WINDOW:
        raise InvalidTraining(f"{window} scenes are more than one seed's window holds; ask for fewer")
    asked = build_questions([scene.shapes for scene in chosen[: questions // 2]], SHAPES, partners=PARTNERS, seed=seed)
    return Benchmark(
        name="miniature",
        scenes=tuple(_benchmark_scene(scene) for scene in chosen),
        captions=captions,
        questions=tuple(
            BenchmarkQuestion(
                split=one.split, scene=one.scene, text=language.existence_question(one.object), truth=one.truth
            )
            for one in asked
        ),
        caption_prompt=language.CAPTION_PROMPT,
        mentions=language.shapes_mentioned,
        caption_max_tokens=CAPTION_MAX_TOKENS,
        answer_max_tokens=ANSWER_MAX_TOKENS,
        turns=turns,
    )


def _benchmark_scene(scene: Scene) -> BenchmarkScene:
    return BenchmarkScene(
        name=str(scene.seed),
        seed=scene.seed,
        read=cache(partial(draw_scene, scene)),  # small enough to be kept
        truth=scene.shapes,
        caption=_true_caption(scene),
    )


def _true_caption(scene: Scene) -> str:
    return language.caption(scene, language.Noise(), random.Random(f"true caption {scene.seed}"))
