"""How much does serving's shortcut cost? `causal` (each position steered once) against `exact` (as published).

    python -m training.compare_modes --captions 300 --questions 600 --json modes.json

Both modes run the preset `captions` on captions and, on questions, `questions` or where that is off the best questions
setting of the form that `captions` uses. Besides both benchmarks: the share of greedy captions that are equal token by
token, and the share of steps at which `causal`, led along the caption that `exact` wrote, would choose the same token.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from pydantic import Field

from steering.artifact_config import read_config
from steering.request import Mode, SteeringRequest
from training.command_line import parse_settings, run_stage
from training.durable_files import write_json
from training.errors import InvalidTraining
from training.evaluate_hallucination import EvaluationSettings
from training.evaluation.asking import InProcess, Question, Reply, ask_all
from training.evaluation.benchmark import Benchmark
from training.evaluation.benchmark_settings import build_benchmark
from training.evaluation.conditions import TASKS, Condition, TunedPresets, as_request, tuned_presets
from training.evaluation.engines import respondent
from training.evaluation.manifest import describe_benchmark, describe_run, weights_digest
from training.evaluation.measuring import measure
from training.evaluation.scores import Scoreboard
from training.evaluation.table import caption_table, question_table

MODES: tuple[Mode, ...] = ("causal", "exact")


class ComparisonSettings(EvaluationSettings):
    """`causal` against `exact` on held-out scenes: benchmarks, equal captions, agreement step by step."""

    captions: int | None = Field(default=300, ge=0)
    """Pictures captioned."""
    questions: int | None = Field(default=600, ge=0)
    """Questions per POPE split; even."""
    led_captions: int = 100
    """Captions along which `causal` is led, one request per token."""


async def compare(settings: ComparisonSettings) -> dict[str, Any]:
    """Run both modes and return the report."""
    if settings.temperature > 0:
        raise InvalidTraining("--temperature: modes are compared greedily, since answers are led token by token")
    benchmark = build_benchmark(settings)
    config = read_config(settings.artifact)
    tuned = tuned_presets(config)
    chosen = [Condition(name="plain", requests=dict.fromkeys(TASKS, SteeringRequest(enabled=False)))]
    chosen += [steered_in(mode, tuned) for mode in MODES]
    async with respondent(settings) as answers:
        if not isinstance(answers, InProcess):
            raise InvalidTraining("--engine: modes are compared in this process, since answers are led token by token")
        measurements = {
            condition.name: await measure(benchmark, condition, answers, concurrency=2 * settings.batch)
            for condition in chosen
        }
        agreement = await token_agreement(benchmark, tuned, answers, settings)
    board = Scoreboard(measurements, seed=settings.seed, resamples=settings.resamples)
    scores = {name: board.scores(name) for name in measurements}
    tables = [caption_table(scores)] * bool(benchmark.captions) + [question_table(scores)] * bool(benchmark.questions)
    print("\n" + "\n\n".join(tables) + "\n")
    equal = [a == b for a, b in zip(*(measurements[mode].captions for mode in MODES), strict=True)]
    agreement["exact_match"] = sum(equal) / max(1, len(equal))
    print("\n".join(f"{name}: {value:.4f}" for name, value in agreement.items()))
    pairs = [("causal", "exact"), ("causal", "plain"), ("exact", "plain")]
    return {
        "conditions": {name: row.as_json() for name, row in scores.items()},
        "differences": {f"{a}_minus_{b}": board.difference(a, b).as_json() for a, b in pairs},
        "agreement": agreement,
        "manifest": describe_run(settings.model_dump(mode="json"))
        | {"benchmark": describe_benchmark(benchmark), "artifact": config.fingerprint}
        | {"model_sha256": weights_digest(settings.model)},
    }


def steered_in(mode: Mode, tuned: TunedPresets) -> Condition:
    """What serving would do to each task, in one of the modes."""
    presets = {task: tuned.presets[task] if tuned.is_on(task) else tuned.of_form(tuned.form, task) for task in TASKS}
    return Condition(name=mode, requests={task: as_request(presets[task], mode=mode) for task in TASKS})


async def token_agreement(
    benchmark: Benchmark, tuned: TunedPresets, answers: InProcess, settings: ComparisonSettings
) -> dict[str, float]:
    """Lead `causal` along the captions that `exact` writes, token by token."""
    concurrency = 2 * settings.batch
    asked = caption_questions(benchmark, steered_in("exact", tuned), settings.led_captions)
    written = await ask_all(answers, asked, concurrency=concurrency, label="exact, to be followed", total=len(asked))
    followed = caption_questions(benchmark, steered_in("causal", tuned), settings.led_captions)
    steps = [
        (replace(question, max_tokens=1, answer_so_far=reply.token_ids[:length]), reply.token_ids[length : length + 1])
        for question, reply in zip(followed, written, strict=True)
        for length in range(_followable(reply, answers.image_token_id, benchmark.caption_max_tokens))
    ]
    replies = await ask_all(
        answers, [step for step, _ in steps], concurrency=concurrency, label="causal, led", total=len(steps)
    )
    agreed = [reply.token_ids == chosen for reply, (_, chosen) in zip(replies, steps, strict=True)]
    return {"steps": len(agreed), "teacher_forced_agreement": sum(agreed) / max(1, len(agreed))}


def _followable(reply: Reply, image_token_id: int, max_tokens: int) -> int:
    """Steps that `exact` took, the one to the end among them; a prompt cannot hold a generated image token."""
    if image_token_id in reply.token_ids:
        return reply.token_ids.index(image_token_id)
    return min(len(reply.token_ids) + 1, max_tokens)


def caption_questions(benchmark: Benchmark, condition: Condition, number: int) -> list[Question]:
    """The first captions to ask for, under a condition."""
    return [
        Question(
            image=scene.image,
            text=benchmark.caption_prompt,
            max_tokens=benchmark.caption_max_tokens,
            steering=condition.requests["captions"],
        )
        for scene in benchmark.scenes[: min(number, benchmark.captions)]
    ]


def main() -> None:
    settings = parse_settings(ComparisonSettings, program="python -m training.compare_modes")
    report = asyncio.run(compare(settings))
    if settings.json_file:
        write_json(settings.json_file, report)


if __name__ == "__main__":
    run_stage(main)
