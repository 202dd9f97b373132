"""Does removing the concepts that an invented shape rides on remove it from captions, and does adding them bring it?

    python -m tests.benchmarks.hallucination.concept_edits --json FILE
    python -m tests.benchmarks.hallucination.concept_edits --engine vllm --scenes 200 --json FILE

Held-out scenes of the miniature, steering's dial at 0, greedy. *Removing*: in scenes whose plain caption names a shape
that is not there, the concepts that have the shape's name in their label are weakened. *Boosting*: in scenes whose
plain caption leaves out the absent partner that the model tends to invent, that shape's concepts are strengthened.
Nothing but labels chooses the concepts, as a person would. Controls: the concepts of another shape that is neither
there nor named, and concepts drawn at random, as many and as strongly. A ratio is the share of cases that name the
shape, by the plain share (removing), or the share itself (boosting); spreads are 95 % intervals by bootstrap.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from pydantic import Field

from steering.artifact_config import read_config
from steering.concepts import read_concepts
from steering.request import MAX_EDITS, ConceptEdit, SteeringRequest
from training.command_line import parse_settings, run_stage
from training.durable_files import write_json
from training.evaluation.asking import Question, Reply, Respondent, ask_all
from training.evaluation.benchmark import Benchmark, BenchmarkScene
from training.evaluation.engines import EngineSettings, respondent
from training.evaluation.manifest import describe_benchmark, describe_run, weights_digest
from training.evaluation.miniature_benchmark import miniature_benchmark
from training.evaluation.paired_bootstrap import draw_scenes, intervals, paired_differences, ratio
from training.miniature.world import PARTNERS, SHAPES

OFF = SteeringRequest(enabled=False)
TARGET, CASES, FOUND, PRESENT = range(4)
"""Counts of a case: the shape is named, 1, other shapes that are there and named, other shapes that are there."""


class EditSettings(EngineSettings):
    """Scenes captioned plain, and again with concepts edited."""

    scenes: int = Field(default=500, ge=20)
    """Held-out scenes with an absent partner."""
    seed: int = Field(default=0, ge=0)
    """Opens the window of held-out scenes, and draws the controls."""
    scene_range: str = "held_out"
    """`dev` to choose numbers on."""
    concepts: int = Field(default=MAX_EDITS, ge=1, le=MAX_EDITS)
    """Concepts edited in each case, those that have the shape foremost in their label."""
    add: float = Field(default=1.0, gt=0, le=4)
    """Activation that is added to each, or taken from it."""
    json_file: Path | None = Field(default=None, alias="json")
    """Where the report goes."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One scene, with the shape that its caption is to lose or to gain."""

    scene: BenchmarkScene
    shape: str
    plain: Reply
    other: str
    """A shape that is neither there nor named."""


def counts_of(benchmark: Benchmark, case: Case, caption: str) -> list[int]:
    """A row of TARGET, CASES, FOUND, PRESENT."""
    named, others = set(benchmark.mentions(caption)), case.scene.truth - {case.shape}
    return [case.shape in named, 1, len(named & others), len(others)]


def metrics(counts: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "named": ratio(counts[..., TARGET], counts[..., CASES]),
        "recall_of_others": ratio(counts[..., FOUND], counts[..., PRESENT]),
    }


class Labels:
    """Concepts by the words of their labels."""

    def __init__(self, artifact: Path, number: int, seed: int) -> None:
        self._concepts = [
            (one["id"], one["label"].split(", "), one.get("mean_activation", 0.0))
            for one in read_concepts(artifact, thumbnails=False)
        ]
        self._number, self._seed = number, seed

    @cache  # noqa: B019 - one object for one run
    def about(self, word: str) -> tuple[int, ...]:
        """Those with the word foremost first, of equals the more active."""
        about = [(words.index(word), -active, one) for one, words, active in self._concepts if word in words]
        return tuple(one for _, _, one in sorted(about)[: self._number])

    def at_random(self, case: Case) -> tuple[int, ...]:
        """As many as there are about the case's shape."""
        drawn = random.Random(f"{self._seed} {case.scene.name}")
        return tuple(drawn.sample([one for one, _, _ in self._concepts], len(self.about(case.shape))))


def edit(ids: Sequence[int], add: float) -> SteeringRequest:
    concepts = {str(one): ConceptEdit(add=add) for one in ids}
    return SteeringRequest(strength=0.0, max_shift=4.0, concepts=concepts)


async def run(settings: EditSettings) -> dict[str, Any]:
    benchmark = miniature_benchmark(
        captions=settings.scenes, questions=2, seed=settings.seed, scene_range=settings.scene_range
    )
    labels = Labels(settings.artifact, settings.concepts, settings.seed)
    rows: list[dict[str, Any]] = []
    async with respondent(settings) as answers:
        scenes = benchmark.scenes[: settings.scenes]
        plain = await caption(benchmark, answers, settings, [(scene, OFF) for scene in scenes], "plain")
        for what, add in (("removing", -settings.add), ("boosting", settings.add)):
            cases = find_cases(benchmark, scenes, plain, settings.seed, removing=add < 0)
            ways: dict[str, Callable[[Case], Sequence[int]]] = {
                "edited": lambda case: labels.about(case.shape),
                "other_shape": lambda case: labels.about(case.other),
                "random": labels.at_random,
            }
            counts = {"plain": [counts_of(benchmark, case, case.plain.text) for case in cases]}
            for name, ids_of in ways.items():
                asked = [(case.scene, edit(ids_of(case), add)) for case in cases]
                replies = await caption(benchmark, answers, settings, asked, f"{what}, {name}")
                pairs = zip(cases, replies, strict=True)
                counts[name] = [counts_of(benchmark, case, reply.text) for case, reply in pairs]
            rows += table_of(what, {name: np.array(one, dtype=float) for name, one in counts.items()}, settings.seed)
    print(written(rows))
    return {
        "ratios": {f"{row['what']}_{row['condition']}": row["ratio"] for row in rows if row["ratio"] is not None},
        "spread": {f"{row['what']}_{row['condition']}": row["named"] for row in rows},
        "table": rows,
        "manifest": describe_run(settings.model_dump(mode="json"))
        | {"benchmark": describe_benchmark(benchmark), "artifact": read_config(settings.artifact).fingerprint}
        | {"model_sha256": weights_digest(settings.model)},
    }


def find_cases(
    benchmark: Benchmark, scenes: Sequence[BenchmarkScene], plain: Sequence[Reply], seed: int, *, removing: bool
) -> list[Case]:
    """One shape a scene: the first that is invented, or the first absent partner that is not."""
    cases = []
    for scene, reply in zip(scenes, plain, strict=True):
        named = list(benchmark.mentions(reply.text))
        absent = [PARTNERS[shape] for shape in SHAPES if shape in scene.truth and PARTNERS.get(shape)]
        absent = [shape for shape in absent if shape not in scene.truth]
        found = [one for one in named if one not in scene.truth] if removing else sorted(set(absent) - set(named))
        if found:
            free = sorted(set(SHAPES) - scene.truth - set(named) - set(absent))
            other = random.Random(f"{seed} {scene.name} other").choice(free or sorted(set(SHAPES) - scene.truth))
            cases.append(Case(scene=scene, shape=found[0], plain=reply, other=other))
    return cases


async def caption(
    benchmark: Benchmark,
    answers: Respondent,
    settings: EditSettings,
    asked: Sequence[tuple[BenchmarkScene, SteeringRequest]],
    label: str,
) -> list[Reply]:
    questions = (
        Question(
            image=scene.image,
            text=benchmark.caption_prompt,
            max_tokens=benchmark.caption_max_tokens,
            steering=steering,
        )
        for scene, steering in asked
    )
    return await ask_all(answers, questions, total=len(asked), concurrency=2 * settings.batch, label=label)


def table_of(what: str, counts: dict[str, np.ndarray], seed: int) -> list[dict[str, Any]]:
    """A row for each condition, with intervals, and the change of others' recall."""
    weights = draw_scenes(len(counts["plain"]), seed=seed)
    plain = metrics(counts["plain"].sum(axis=0))["named"]
    rows = []
    for name, of in counts.items():
        found = intervals(metrics, of, weights)
        change = paired_differences(metrics, of, counts["plain"], weights)
        share = found["named"].value
        rows.append(
            {
                "what": what,
                "condition": name,
                "cases": len(of),
                "named": [round(part, 4) for part in found["named"]],
                "recall_of_others": [round(part, 4) for part in found["recall_of_others"]],
                "recall_change": [round(part, 4) for part in change["recall_of_others"]],
                "ratio": round(share / float(plain), 4) if plain else round(share, 4),
            }
        )
    return rows


def written(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| | condition | cases | names the shape | recall of the others | change of it |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        named, recall, change = ("{:.3f} [{:.3f}, {:.3f}]".format(*row[key]) for key in
                                 ("named", "recall_of_others", "recall_change"))  # fmt: skip
        lines.append(f"| {row['what']} | {row['condition']} | {row['cases']} | {named} | {recall} | {change} |")
    return "\n".join(lines)


def main() -> None:
    settings = parse_settings(EditSettings, program="concept_edits.py", description=__doc__)
    report = asyncio.run(run(settings))
    if settings.json_file:
        write_json(settings.json_file, report)


if __name__ == "__main__":
    run_stage(main)
