"""Does the mismatch of image and text tell captions that invent something, and does a strength that follows it help?

    python -m tests.benchmarks.hallucination.mismatch --json FILE

Held-out scenes of the miniature, greedy. First the area under the ROC curve of the mismatch at the caption's end, plain
and steered, beside that of the caption's length, and of the mismatch with what length explains taken out. Then an
adaptive strength, which the service does not have: each position's step is scaled by its own mismatch, with numbers
calibrated on dev scenes, against the fixed strengths; whether it wins is judged at the recall that it has, between the
fixed strengths that enclose it. A ratio is CHAIR_s by that of the fixed strength of the same recall; spreads are 95 %
intervals by bootstrap.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from pydantic import Field
from scipy.stats import rankdata

from steering.artifact_config import read_config
from steering.realignment import Mix, MixedCodes, Realignment
from steering.request import SteeringRequest
from training.command_line import parse_settings, run_stage
from training.durable_files import write_json
from training.evaluation.asking import Question, Reply, Respondent, ask_all
from training.evaluation.benchmark import Benchmark
from training.evaluation.engines import EngineSettings, respondent
from training.evaluation.manifest import describe_benchmark, describe_run, weights_digest
from training.evaluation.miniature_benchmark import miniature_benchmark

STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
CALIBRATED = ((0.0, 1.0), (0.3, 0.6), (0.6, 0.4), (0.8, 0.3))
"""(floor, span) of strength = (mismatch - floor) / span within [0, 1]: those of 13 tried on dev scenes that came
closest to the fixed strengths."""
INVENTS, FOUND, PRESENT = range(3)
"""Counts of a caption: 1 where it names what is not there, shapes named of those there, shapes there."""


class MismatchSettings(EngineSettings):
    """Scenes captioned plain, at fixed strengths, and with a strength that follows the mismatch."""

    scenes: int = Field(default=500, ge=20)
    """Held-out scenes with an absent partner."""
    seed: int = Field(default=0, ge=0)
    """Opens the window of held-out scenes, and draws the resamples."""
    resamples: int = Field(default=2000, ge=100)
    """Bootstrap resamples."""
    json_file: Path | None = Field(default=None, alias="json")
    """Where the report goes."""


@contextmanager
def adaptive(floor: float, span: float) -> Iterator[None]:
    """In here every delta is scaled by its position's mismatch."""
    fixed = Realignment._decode

    def scaled(self: Realignment, codes: MixedCodes, text_ND: torch.Tensor, mix: Mix) -> torch.Tensor:
        once = ~codes.repeated
        least = (torch.minimum(codes.image, codes.text) * once).sum(1)
        most = (torch.maximum(codes.image, codes.text) * once).sum(1)
        strength = ((1 - least / most - floor) / span).clamp(0, 1)
        return fixed(self, codes, text_ND, mix) * strength[:, None]

    with patch.object(Realignment, "_decode", scaled):
        yield


async def captions(
    benchmark: Benchmark, answers: Respondent, settings: MismatchSettings, steering: SteeringRequest, label: str
) -> list[Reply]:
    questions = (
        Question(
            image=scene.image, text=benchmark.caption_prompt, max_tokens=benchmark.caption_max_tokens, steering=steering
        )
        for scene in benchmark.scenes
    )
    total = len(benchmark.scenes)
    return await ask_all(answers, questions, total=total, concurrency=2 * settings.batch, label=label)


def counts_of(benchmark: Benchmark, replies: Sequence[Reply]) -> np.ndarray:
    """[scenes, 3]."""
    rows = []
    for scene, reply in zip(benchmark.scenes, replies, strict=True):
        named = set(benchmark.mentions(reply.text))
        rows.append([bool(named - scene.truth), len(named & scene.truth), len(scene.truth)])
    return np.array(rows, dtype=float)


def area(invents: np.ndarray, score: np.ndarray) -> float:
    """Chance that a caption that invents has the higher score; a tie is half of one."""
    ranks, positives = rankdata(score), int(invents.sum())
    negatives = len(invents) - positives
    return float((ranks[invents > 0].sum() - positives * (positives + 1) / 2) / max(1, positives * negatives))


def detection(benchmark: Benchmark, replies: Sequence[Reply], draws: np.ndarray) -> dict[str, list[float]]:
    """The areas of mismatch, length, and mismatch without length, with intervals."""
    invents = counts_of(benchmark, replies)[:, INVENTS]
    mismatch, length = (
        np.array(one, dtype=float) for one in zip(*((r.mismatch, len(r.token_ids)) for r in replies), strict=True)
    )
    slope, height = np.polyfit(length, mismatch, 1)
    scores = {"mismatch": mismatch, "length": length, "mismatch_without_length": mismatch - slope * length - height}
    return {name: interval(area(invents, score), [area(invents[draw], score[draw]) for draw in draws])
            for name, score in scores.items()}  # fmt: skip


def interval(value: float, resampled: Sequence[float]) -> list[float]:
    return [round(float(one), 4) for one in (value, *np.quantile(resampled, (0.025, 0.975)))]


def rates(counts: np.ndarray) -> tuple[float, float]:
    """CHAIR_s and recall."""
    invents, found, present = counts.sum(axis=0)
    return invents / len(counts), found / present


def against_fixed(auto: np.ndarray, fixed: Sequence[np.ndarray]) -> float:
    """CHAIR_s by that of fixed strengths at the same recall, on the line between those that enclose it."""
    chair, recall = rates(auto)
    points = sorted((r, c) for c, r in map(rates, fixed))
    return chair / float(np.interp(recall, [r for r, _ in points], [c for _, c in points]))


async def run(settings: MismatchSettings) -> dict[str, Any]:
    benchmark = miniature_benchmark(captions=settings.scenes, questions=2, seed=settings.seed)
    draws = np.random.default_rng(settings.seed).integers(0, settings.scenes, (settings.resamples, settings.scenes))
    rows: list[dict[str, Any]] = []
    async with respondent(settings) as answers:
        told = {"plain": SteeringRequest(enabled=False, explain=True), "default": SteeringRequest(explain=True)}
        for name, steering in told.items():
            replies = await captions(benchmark, answers, settings, steering, f"{name}, explained")
            rows += [{"what": "detection", "captions": name, "by": by, "area": found}
                     for by, found in detection(benchmark, replies, draws).items()]  # fmt: skip
        fixed = []
        for strength in STRENGTHS:
            replies = await captions(benchmark, answers, settings, SteeringRequest(strength=strength), f"{strength}")
            fixed.append(counts_of(benchmark, replies))
            chair, recall = rates(fixed[-1])
            rows.append({"what": "fixed", "strength": strength, "chair_s": round(chair, 4), "recall": round(recall, 4)})
        for floor, span in CALIBRATED:
            with adaptive(floor, span):
                replies = await captions(
                    benchmark, answers, settings, SteeringRequest(strength=1.0), f"{floor}, {span}"
                )
            counts = counts_of(benchmark, replies)
            resampled = [against_fixed(counts[draw], [one[draw] for one in fixed]) for draw in draws]
            (chair, recall), found = rates(counts), interval(against_fixed(counts, fixed), resampled)
            rows.append({"what": "adaptive", "floor": floor, "span": span, "chair_s": round(chair, 4),
                         "recall": round(recall, 4), "by_fixed": found})  # fmt: skip
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    ratios = {f"adaptive_{row['floor']}_{row['span']}": row["by_fixed"] for row in rows if row["what"] == "adaptive"}
    return {
        "ratios": {name: found[0] for name, found in ratios.items()},
        "spread": {name: found[1:] for name, found in ratios.items()},
        "table": rows,
        "manifest": describe_run(settings.model_dump(mode="json"))
        | {"benchmark": describe_benchmark(benchmark), "artifact": read_config(settings.artifact).fingerprint}
        | {"model_sha256": weights_digest(settings.model)},
    }


def main() -> None:
    settings = parse_settings(MismatchSettings, program="mismatch.py", description=__doc__)
    report = asyncio.run(run(settings))
    if settings.json_file:
        write_json(settings.json_file, report)


if __name__ == "__main__":
    run_stage(main)
