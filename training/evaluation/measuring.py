"""Puts a benchmark to a respondent under a condition and counts the answers. Knows no statistics.

The result is a matrix of counts per scene for each benchmark, which is what the bootstrap takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from training import chair, pope
from training.evaluation.asking import Question, Reply, Respondent, ask_all
from training.evaluation.conditions import Condition
from training.evaluation.miniature_benchmark import Benchmark


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one condition gave; rows of all matrices are scenes."""

    counts: dict[str, np.ndarray]
    """[scenes, counts] by benchmark: 'captions' and the POPE splits; one of which nothing was asked is left out."""
    captions: list[str]
    """Texts in the order of the scenes; those of the first control seed."""
    receipts: dict[str, dict[str, float]]
    """By task: share of replies that were steered, mean steered positions, mean relative shift."""
    seconds: float
    """Wall clock for everything that was asked."""


async def measure(
    benchmark: Benchmark,
    condition: Condition,
    respondent: Respondent,
    *,
    concurrency: int,
    report: Callable[[str], None] = print,
) -> Measurement:
    """Ask everything once per seed of the condition; counts are summed over seeds, so ratios are pooled."""
    started = time.monotonic()
    caption_keys, caption_questions = _captions_to_ask(benchmark, condition)
    answer_keys, answer_questions = _answers_to_ask(benchmark, condition)
    captions, answers = [
        await ask_all(respondent, questions, concurrency=concurrency, label=f"{condition.name}, {task}", report=report)
        for task, questions in (("captions", caption_questions), ("questions", answer_questions))
    ]
    counts = {}
    if captions:
        counts["captions"] = _count_captions(benchmark, caption_keys, captions)
    if answers:
        counts |= _count_answers(benchmark, answer_keys, answers)
    return Measurement(
        counts=counts,
        captions=[reply.text for reply in captions[: benchmark.captions]],
        receipts={"captions": _receipts(captions), "questions": _receipts(answers)},
        seconds=time.monotonic() - started,
    )


def _captions_to_ask(benchmark: Benchmark, condition: Condition) -> tuple[list[int], list[Question]]:
    """Scene numbers, seed by seed, and what is asked about each."""
    numbers = list(range(benchmark.captions)) * len(condition.seeds)
    questions = [
        Question(
            image=scene.image,
            text=benchmark.caption_prompt,
            max_tokens=benchmark.caption_max_tokens,
            steering=condition.request("captions", seed=seed, scene_seed=scene.seed),
        )
        for seed in condition.seeds
        for scene in benchmark.scenes[: benchmark.captions]
    ]
    return numbers, questions


def _answers_to_ask(benchmark: Benchmark, condition: Condition) -> tuple[list[tuple[int, int, str]], list[Question]]:
    """(seed, scene number, object) and its question: the splits share questions, and each is asked once."""
    pairs = list(dict.fromkeys((question.scene, question.object) for question in benchmark.questions))
    keys = [(seed, *pair) for seed in condition.seeds for pair in pairs]
    questions = [
        Question(
            image=benchmark.scenes[scene].image,
            text=benchmark.question_text(name),
            earlier=benchmark.before_question(scene),
            max_tokens=benchmark.answer_max_tokens,
            steering=condition.request("questions", seed=seed, scene_seed=benchmark.scenes[scene].seed),
        )
        for seed, scene, name in keys
    ]
    return keys, questions


def _count_captions(benchmark: Benchmark, numbers: list[int], replies: list[Reply]) -> np.ndarray:
    counts = [
        chair.count_caption(reply.text, benchmark.mentions(reply.text), benchmark.scenes[number].truth)
        for number, reply in zip(numbers, replies, strict=True)
    ]
    return chair.counts_matrix(counts).reshape(-1, benchmark.captions, len(chair.COUNT_NAMES)).sum(axis=0)


def _count_answers(benchmark: Benchmark, keys: list[tuple[int, int, str]], replies: list[Reply]) -> dict:
    said = {key: pope.parse_answer(reply.text) for key, reply in zip(keys, replies, strict=True)}
    seeds = dict.fromkeys(seed for seed, _, _ in keys)
    counts = {}
    for split in pope.SPLITS:
        rows = [(seed, asked) for seed in seeds for asked in benchmark.questions if asked.split == split]
        counts[split] = pope.counts_matrix(
            [pope.count_answer(said[seed, asked.scene, asked.object], asked.truth) for seed, asked in rows],
            [asked.scene for _, asked in rows],
            number_of_scenes=benchmark.question_scenes,
        )
    return counts


def _receipts(replies: list[Reply]) -> dict[str, float]:
    if not replies:
        return {}
    return {
        "applied": float(np.mean([reply.applied for reply in replies])),
        "positions": float(np.mean([reply.positions for reply in replies])),
        "relative_shift": float(np.mean([reply.relative_shift for reply in replies])),
    }
