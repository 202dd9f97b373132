"""Puts a benchmark to a respondent under a condition and counts the answers. Knows no statistics.

The result is a matrix of counts per scene for each benchmark, which is what the bootstrap takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby, product
from typing import Literal, NamedTuple

import numpy as np

from training import chair, pope
from training.evaluation.asking import GREEDY, Decoding, Question, Reply, Respondent, ask_all
from training.evaluation.benchmark import Benchmark, Turn
from training.evaluation.conditions import Condition
from training.pope import Split
from training.yes_or_no import parse_answer


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one condition gave; rows of all matrices are scenes."""

    counts: dict[str, np.ndarray]
    """[scenes, counts] by 'captions' and by `answers_key`; what was not asked is left out."""
    captions: list[str]
    """Texts in the order of the scenes; those of the first control seed."""
    receipts: dict[str, dict[str, float]]
    """By 'captions', 'questions' and 'questions, second turn': share of replies that were steered, mean steered
    positions, mean relative shift."""
    seconds: float
    """Wall clock for everything that was asked."""


def answers_key(asked: Split | Literal["questions"], turn: Turn) -> str:
    """What a split's questions (or all) are called where they are asked in a turn."""
    return asked if turn == "first" else f"{asked}, {turn} turn"


async def measure(
    benchmark: Benchmark,
    condition: Condition,
    respondent: Respondent,
    *,
    concurrency: int,
    decoding: Decoding = GREEDY,
    report: Callable[[str], None] = print,
) -> Measurement:
    """Ask everything once per seed of the condition; counts are summed over seeds, so ratios are pooled."""
    started = time.monotonic()
    numbers = list(range(benchmark.captions)) * len(condition.seeds)
    captions = await ask_all(
        respondent,
        _captions_to_ask(benchmark, condition, decoding),
        total=len(numbers),
        concurrency=concurrency,
        label=f"{condition.name}, captions",
        report=report,
    )
    keys = _answers_wanted(benchmark, condition)
    answers = await ask_all(
        respondent,
        _answers_to_ask(benchmark, condition, keys, decoding),
        total=len(keys),
        concurrency=concurrency,
        label=f"{condition.name}, questions",
        report=report,
    )
    counts = {}
    if captions:
        counts["captions"] = _count_captions(benchmark, numbers, captions)
    if answers:
        counts |= _count_answers(benchmark, keys, answers)
    return Measurement(
        counts=counts,
        captions=[reply.text for reply in captions[: benchmark.captions]],
        receipts={"captions": _receipts(captions)} | _receipts_by_turn(benchmark, keys, answers),
        seconds=time.monotonic() - started,
    )


class AnswerKey(NamedTuple):
    """What tells the answers of one condition apart."""

    seed: int
    turn: Turn
    scene: int
    text: str


def _captions_to_ask(benchmark: Benchmark, condition: Condition, decoding: Decoding) -> Iterator[Question]:
    """What is asked about each scene, seed by seed; a picture is read when its turn comes."""
    for seed in condition.seeds:
        for scene in benchmark.scenes[: benchmark.captions]:
            yield Question(
                image=scene.image,
                text=benchmark.caption_prompt,
                max_tokens=benchmark.caption_max_tokens,
                steering=condition.request("captions", seed=seed, scene_seed=scene.seed),
                temperature=decoding.temperature,
                seed=decoding.seed_of(scene.seed, benchmark.caption_prompt),
            )


def _answers_wanted(benchmark: Benchmark, condition: Condition) -> list[AnswerKey]:
    """The splits share questions, and each is asked once per seed and turn; those about a scene stand together."""
    pairs = sorted(dict.fromkeys((one.scene, one.text) for one in benchmark.questions), key=lambda pair: pair[0])
    return [AnswerKey(seed, turn, *pair) for seed in condition.seeds for turn in benchmark.turns for pair in pairs]


def _answers_to_ask(
    benchmark: Benchmark, condition: Condition, keys: list[AnswerKey], decoding: Decoding
) -> Iterator[Question]:
    """Reads a picture once for all that is asked about it in a turn."""
    for (seed, turn, number), about_scene in groupby(keys, key=lambda key: (key.seed, key.turn, key.scene)):
        scene = benchmark.scenes[number]
        image = scene.image
        for key in about_scene:
            yield Question(
                image=image,
                text=key.text,
                earlier=benchmark.before_question(number, turn),
                max_tokens=benchmark.answer_max_tokens,
                steering=condition.request("questions", seed=seed, scene_seed=scene.seed),
                temperature=decoding.temperature,
                seed=decoding.seed_of(scene.seed, key.text),
            )


def _count_captions(benchmark: Benchmark, numbers: list[int], replies: list[Reply]) -> np.ndarray:
    counts = [
        chair.count_caption(reply.text, benchmark.mentions(reply.text), benchmark.scenes[number].truth)
        for number, reply in zip(numbers, replies, strict=True)
    ]
    return chair.counts_matrix(counts).reshape(-1, benchmark.captions, len(chair.COUNT_NAMES)).sum(axis=0)


def _count_answers(benchmark: Benchmark, keys: list[AnswerKey], replies: list[Reply]) -> dict[str, np.ndarray]:
    said = {key: parse_answer(reply.text) for key, reply in zip(keys, replies, strict=True)}
    seeds = dict.fromkeys(key.seed for key in keys)
    counts = {}
    for turn, split in product(benchmark.turns, benchmark.splits):
        rows = [(seed, asked) for seed in seeds for asked in benchmark.questions if asked.split == split]
        answers = [said[AnswerKey(seed, turn, asked.scene, asked.text)] for seed, asked in rows]
        counts[answers_key(split, turn)] = pope.counts_matrix(
            [pope.count_answer(answer, asked.truth) for answer, (_, asked) in zip(answers, rows, strict=True)],
            [asked.scene for _, asked in rows],
            number_of_scenes=benchmark.question_scenes,
        )
    return counts


def _receipts_by_turn(benchmark: Benchmark, keys: list[AnswerKey], replies: list[Reply]) -> dict[str, dict[str, float]]:
    return {
        answers_key("questions", turn): _receipts(
            [reply for key, reply in zip(keys, replies, strict=True) if key.turn == turn]
        )
        for turn in benchmark.turns
    }


def _receipts(replies: list[Reply]) -> dict[str, float]:
    if not replies:
        return {}
    return {
        "applied": float(np.mean([reply.applied for reply in replies])),
        "positions": float(np.mean([reply.positions for reply in replies])),
        "relative_shift": float(np.mean([reply.relative_shift for reply in replies])),
    }
